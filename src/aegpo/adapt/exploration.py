"""At which denoising steps each prompt explores: only there is noise injected, and only those steps are trained."""

import math
from itertools import accumulate, groupby
from typing import Literal, get_args

import torch
from torch import Tensor

Rule = Literal["all", "window", "random", "entropy_peaks", "delta_entropy_peaks", "policy_noise", "reward_spread"]
Per = Literal["prompt", "batch"]


def explore(
    entropy: Tensor,
    rule: Rule,
    k: int = 4,
    min_distance: int = 1,
    last: bool = False,
    *,
    local_maxima: bool = False,
    per: Per = "prompt",
    start: int = 0,
    seed: int = 0,
) -> Tensor:
    """The explored steps of each of P prompts, out of N.

    * `all`: every step.
    * `window`: the k steps from `start` on (Flow-GRPO-Fast, arXiv 2505.05470; MixGRPO, arXiv 2507.21802).
    * `random`: k steps drawn anew for each prompt.
    * `entropy_peaks`: the k steps of highest entropy (AEGPO, arXiv 2602.06825).
    * `delta_entropy_peaks`: the k steps where the change of entropy since the base policy is largest in size; the
      caller passes that change, signed or not, as `entropy`. Before the first update it is 0 everywhere, and the k
      first steps are taken, from which exploring spreads rollouts most.
    * `policy_noise`: the k steps at which the sampler's own noise is largest (E-GRPO, whose entropy of a Gaussian step,
      `ln(2 pi e std^2) / 2`, ranks them alike). The caller passes the standard deviations as `entropy`.
    * `reward_spread`: the k steps from which exploring, alone, spreads the rewards of a group most. The caller passes
      that measured spread as `entropy`.

    The last four are the peaks of a curve. Steps are taken highest first, equal ones by index. With `local_maxima`
    those that no neighbour tops come first (of a plateau, its first step; the last step, if it may not be chosen, is no
    neighbour), and others only where there are fewer than k. With `min_distance` above 1 a step too near to one already
    taken is passed over, and so is one that would leave no room for k of them.

    Args:
        entropy: (P, N), float: one row a prompt, one column a denoising step, first step first. The rules `all`,
            `window` and `random` use its shape only.
        rule: how the steps are chosen.
        k: how many steps a prompt explores; `all` ignores it.
        min_distance: smallest difference between two explored steps of a prompt; `all` and `window` ignore it.
        local_maxima: whether true local maxima come before steps that are merely high; for the peaks of a curve.
        per: whether each `prompt` follows its own curve, or all follow the mean curve of the `batch`; likewise.
        last: whether the last step, the one onto sigma = 0, may be chosen. Every sampler's is deterministic.
        start: first step of the `window`.
        seed: what `random` draws from; the same seed gives the same steps on every process.

    Returns:
        (P, N), bool, on the CPU.

    Raises:
        ValueError: for an unknown `rule`, for more steps than there are to choose from (with their distance), and for a
            signal that is not finite, naming its position.
    """
    not_finite = (~entropy.isfinite()).nonzero().tolist()
    if not_finite:
        prompt, step = not_finite[0]
        raise ValueError(f"entropy[{prompt}, {step}] is {entropy[prompt, step].item()}; entropies must be finite")
    prompts, steps = entropy.shape
    available = steps if last else steps - 1
    curves = entropy.abs() if rule == "delta_entropy_peaks" else entropy
    if per == "batch":
        curves = curves.mean(0, keepdim=True).expand_as(curves)
    match rule:
        case "all":
            chosen = [range(available)] * prompts
        case "window":
            if not 0 <= start <= start + k <= available:
                raise ValueError(f"a window of {k} steps from step {start} on does not fit into {available} steps")
            chosen = [range(start, start + k)] * prompts
        case "random":
            noise = torch.rand(prompts, available, generator=torch.Generator().manual_seed(seed))
            chosen = [_highest(row, k, min_distance) for row in noise.tolist()]
        case "entropy_peaks" | "delta_entropy_peaks" | "policy_noise" | "reward_spread":
            chosen = [_highest(row, k, min_distance, local_maxima) for row in curves[:, :available].tolist()]
        case _:
            raise ValueError(f"rule must be one of {', '.join(get_args(Rule))}, not {rule!r}")
    return torch.tensor([[step in row for step in range(steps)] for row in chosen], dtype=torch.bool)


def _highest(signal: list[float], k: int, min_distance: int, local_maxima: bool = False) -> list[int]:
    """The steps of the k highest values, at least `min_distance` apart, highest first."""
    if _room([], len(signal), min_distance) < k:
        raise ValueError(f"{k} steps, {min_distance} apart, do not fit into {len(signal)} steps")
    chosen: list[int] = []
    maxima = _local_maxima(signal) if local_maxima else set()
    by_height = sorted(range(len(signal)), key=lambda i: (i not in maxima, -signal[i]))  # stable: ties by step
    for step in by_height:
        apart = all(abs(step - other) >= min_distance for other in chosen)
        if apart and len(chosen) < k <= len(chosen) + 1 + _room([*chosen, step], len(signal), min_distance):
            chosen.append(step)
    return chosen


def _local_maxima(signal: list[float]) -> set[int]:
    """The steps before and after which the signal falls, the ends counted; of a plateau, the first."""
    runs = [(value, len(list(same))) for value, same in groupby(signal)]
    starts = list(accumulate((length for _, length in runs), initial=0))
    values = [-math.inf, *(value for value, _ in runs), -math.inf]
    return {starts[i] for i in range(len(runs)) if values[i] < values[i + 1] > values[i + 2]}


def _room(chosen: list[int], steps: int, min_distance: int) -> int:
    """How many more steps fit beside the chosen ones: fill from the left."""
    room, free_from = 0, 0
    for step in range(steps):
        if step >= free_from and all(abs(step - other) >= min_distance for other in chosen):
            room, free_from = room + 1, step + min_distance
    return room
