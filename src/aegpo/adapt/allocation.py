"""How many rollouts each prompt of a step gets, under a budget that is kept exactly."""

from typing import Literal, get_args

import torch
from torch import Tensor

Rule = Literal["uniform", "median_split"]

SMALLEST_GROUP = 2  # a rollout alone in its group has nothing to be better than


def allocate(delta_entropy: Tensor, rule: Rule, low: int = 8, high: int = 16, total: int | None = None) -> Tensor:
    """Rollouts for each of P prompts; they sum to `total` exactly, and every prompt gets at least 2.

    * `uniform`: total // P each, and one more for the first total % P prompts.
    * `median_split`: AEGPO (arXiv 2602.06825). The prompts are ranked by `delta_entropy`, equal ones by index. The
      upper P // 2 get `high` and the others `low`: with an even P and distinct signals, `high` is for those above
      the median. Where that does not add up to `total` (an odd P, or a budget of one's own), rollouts are added one
      at a time, each to the prompt that has fewest, the best ranked first; or taken away one at a time, each from
      the prompt that has most, the worst ranked first. So the numbers follow the ranking, and stay in [low, high]
      wherever the budget allows it. If all signals are equal, as they are before the first update, nothing ranks
      the prompts and the split is `uniform`.

    Args:
        delta_entropy: (P,), float, how far each prompt's attention entropy has moved, already without its sign.
            `uniform` uses its length only.
        rule: how the budget is divided.
        low: rollouts of a prompt in the lower half, at least 2.
        high: rollouts of a prompt in the upper half, at least `low`.
        total: the budget; by default P (low + high) / 2, rounded down.

    Returns:
        (P,), int64, on the CPU.

    Raises:
        ValueError: for an unknown `rule`, a signal that is not finite (naming its position), `low` and `high` out
            of order, and a `total` below 2 P.
    """
    signal = delta_entropy.tolist()
    not_finite = (~delta_entropy.isfinite()).nonzero().flatten().tolist()
    if not_finite:
        raise ValueError(f"delta_entropy[{not_finite[0]}] is {signal[not_finite[0]]}; signals must be finite")
    if not SMALLEST_GROUP <= low <= high:
        raise ValueError(f"low and high must satisfy {SMALLEST_GROUP} <= low <= high, not low={low}, high={high}")
    prompts = len(signal)
    if total is None:
        total = prompts * (low + high) // 2
    if total < SMALLEST_GROUP * prompts:
        raise ValueError(f"{total} rollouts are too few for {prompts} prompts: each needs at least {SMALLEST_GROUP}")
    match rule:
        case "uniform":
            counts = _uniform(prompts, total)
        case "median_split":
            counts = _median_split(signal, low, high, total)
        case _:
            raise ValueError(f"rule must be one of {', '.join(get_args(Rule))}, not {rule!r}")
    assert sum(counts) == total, f"allocated {sum(counts)} rollouts of {total}"
    return torch.tensor(counts, dtype=torch.int64)


def _uniform(prompts: int, total: int) -> list[int]:
    return [total // prompts + (i < total % prompts) for i in range(prompts)]


def _median_split(signal: list[float], low: int, high: int, total: int) -> list[int]:
    prompts = len(signal)
    if min(signal) == max(signal):
        return _uniform(prompts, total)
    upper = prompts // 2
    ranked = [high] * upper + [low] * (prompts - upper)  # best ranked first, and never increasing from here on
    while sum(ranked) < total:
        ranked[ranked.index(min(ranked))] += 1
    while sum(ranked) > total:
        ranked[prompts - 1 - ranked[::-1].index(max(ranked))] -= 1
    by_signal = sorted(range(prompts), key=lambda i: -signal[i])  # stable: equal signals keep the order of their index
    return [count for _, count in sorted(zip(by_signal, ranked, strict=True))]
