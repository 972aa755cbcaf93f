"""How many rollouts each prompt of a step gets, under a budget that is kept exactly."""

from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import Tensor

Rule = Literal["uniform", "median_split", "proportional", "reward_variance"]

SMALLEST_GROUP = 2  # a rollout alone in its group has nothing to be better than


def allocate(delta_entropy: Tensor, rule: Rule, low: int = 8, high: int = 16, total: int | None = None) -> Tensor:
    """Rollouts for each of P prompts; they sum to `total` exactly, and every prompt gets at least 2.

    * `uniform`: total // P each, and one more for the first total % P prompts.
    * `median_split`: AEGPO (arXiv 2602.06825). The prompts are ranked by `delta_entropy`, equal ones by index. The
      upper P // 2 get `high` and the others `low`: with an even P and distinct signals, `high` is for those above
      the median. Where that does not add up to `total` (an odd P, or a budget of one's own), rollouts are added one
      at a time, each to the prompt that has fewest, the best ranked first; or taken away one at a time, each from
      the prompt that has most, the worst ranked first. So the numbers follow the ranking, and stay in [low, high]
      wherever the budget allows it.
    * `proportional`: in proportion to `delta_entropy`, by largest remainder. A prompt whose share would be below 2 gets
      2, and the others share what is left.
    * `reward_variance`: the same in proportion to the spread of reward inside each prompt's group (Neyman's
      allocation), which the caller passes as `delta_entropy`.

    If all signals are equal, as they are before the first update, nothing tells the prompts apart and the split is
    `uniform`, whatever the rule.

    Args:
        delta_entropy: (P,), float, how far each prompt's attention entropy has moved, already without its sign; or any
            other signal of how much a prompt has to teach. `uniform` uses its length only.
        rule: how the budget is divided.
        low: rollouts of a prompt in the lower half of `median_split`, at least 2; the other rules have no bounds of
            their own, and use `low` and `high` for the default of `total` only.
        high: rollouts of a prompt in the upper half, at least `low`.
        total: the budget; by default P (low + high) / 2, rounded down.

    Returns:
        (P,), int64, on the CPU.

    Raises:
        ValueError: for an unknown `rule`, a signal that is not finite or (in proportion to which nothing can be shared)
            negative, naming its position, `low` and `high` out of order, and a `total` below 2 P.
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
    if rule not in get_args(Rule):
        raise ValueError(f"rule must be one of {', '.join(get_args(Rule))}, not {rule!r}")
    match rule:
        case "median_split" if min(signal) < max(signal):
            counts = _median_split(signal, low, high, total)
        case "proportional" | "reward_variance" if min(signal) < max(signal):
            counts = _proportional(signal, total)
        case _:
            counts = [total // prompts + (i < total % prompts) for i in range(prompts)]
    assert sum(counts) == total, f"allocated {sum(counts)} rollouts of {total}"
    return torch.tensor(counts, dtype=torch.int64)


def _median_split(signal: list[float], low: int, high: int, total: int) -> list[int]:
    prompts = len(signal)
    upper = prompts // 2
    ranked = [high] * upper + [low] * (prompts - upper)  # best ranked first, and never increasing from here on
    while sum(ranked) < total:
        ranked[ranked.index(min(ranked))] += 1
    while sum(ranked) > total:
        ranked[prompts - 1 - ranked[::-1].index(max(ranked))] -= 1
    by_signal = sorted(range(prompts), key=lambda i: -signal[i])  # stable: equal signals keep the order of their index
    return [count for _, count in sorted(zip(by_signal, ranked, strict=True))]


def _proportional(signal: list[float], total: int) -> list[int]:
    for i, value in enumerate(signal):
        if value < 0:
            raise ValueError(f"delta_entropy[{i}] is {value}; signals to share in proportion to must not be negative")
    weights = {i: Fraction(value) for i, value in enumerate(signal)}  # exact: no rounding can break the budget
    while True:
        budget = total - SMALLEST_GROUP * (len(signal) - len(weights))
        whole = sum(weights.values())
        shares = {i: budget * weight / whole for i, weight in weights.items()}
        enough = {i: weight for i, weight in weights.items() if shares[i] >= SMALLEST_GROUP}
        if len(enough) == len(weights):
            break
        weights = enough
    counts = [int(shares.get(i, SMALLEST_GROUP)) for i in range(len(signal))]
    by_remainder = sorted(shares, key=lambda i: int(shares[i]) - shares[i])  # stable: equal ones by index
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts
