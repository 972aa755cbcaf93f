"""Advantages: how much better a rollout did than the others of its group."""

from typing import Literal, get_args

import torch
from torch import Tensor

Std = Literal["group", "global", "none"]


def group_advantages(
    rewards: Tensor,
    group: Tensor,
    std: Std = "group",
    ddof: int = 0,
    eps: float = 1e-4,
    clip: float = 5.0,
) -> Tensor:
    """Group-relative advantages `(R - mean of its group) / (std + eps)`, clamped to [-clip, clip].

    A group is the rollouts of one prompt, of any number and in any order. The mean is always the group's own; the
    standard deviation is the group's (`group`: GRPO, arXiv 2402.03300, and DanceGRPO, arXiv 2505.07818, with ddof 1
    and eps 1e-8), that of all rewards of the step about their common mean (`global`: Flow-GRPO, arXiv 2505.05470),
    or not divided by at all (`none`: Dr. GRPO, arXiv 2503.20783). A group whose rewards are all equal gets exactly
    0, whatever `std` and `eps` are, so its rows can be left out before the forward.

    Args:
        rewards: (n,), any float dtype, finite.
        group: (n,), int64, the group each reward belongs to: arbitrary ids, groups of any size.
        std: which standard deviation divides.
        ddof: subtracted from the number of rewards in the variance: 0 population, 1 unbiased.
        eps: added to the standard deviation.
        clip: bound on the advantage's size.

    Returns:
        (n,), float32; the arithmetic is float64.

    Raises:
        ValueError: for an unknown `std`, and for a reward that is not finite, naming its position.
    """
    assert group.dtype == torch.int64, f"group ids must be int64, not {group.dtype}"
    not_finite = (~rewards.isfinite()).nonzero().flatten().tolist()
    if not_finite:
        raise ValueError(f"rewards[{not_finite[0]}] is {rewards[not_finite[0]].item()}; rewards must be finite")
    rewards = rewards.double()
    _, segment, size = group.unique(return_inverse=True, return_counts=True)
    deviation = _deviation(rewards, segment, size)
    match std:
        case "group":
            scale = _std(deviation, segment, size, ddof) + eps
        case "global":
            one, total = torch.zeros_like(segment), size.sum(dim=0, keepdim=True)
            scale = _std(_deviation(rewards, one, total), one, total, ddof) + eps
        case "none":
            scale = torch.ones_like(deviation)
        case _:
            raise ValueError(f"std must be one of {', '.join(get_args(Std))}, not {std!r}")
    return torch.where(deviation == 0, 0.0, deviation / scale).clamp(-clip, clip).float()


def _sum(values: Tensor, segment: Tensor, size: Tensor) -> Tensor:
    """Sum of `values` (n,) over each segment, (segments,)."""
    return torch.zeros_like(size, dtype=values.dtype).index_add(0, segment, values)


def _deviation(values: Tensor, segment: Tensor, size: Tensor) -> Tensor:
    """`values` (n,) less their segment's mean, counted from its minimum so that equal values give exactly 0."""
    minimum = values.new_zeros(size.shape).scatter_reduce(0, segment, values, "amin", include_self=False)
    above = values - minimum[segment]
    return above - (_sum(above, segment, size) / size)[segment]


def _std(deviation: Tensor, segment: Tensor, size: Tensor, ddof: int) -> Tensor:
    """Each value's segment's standard deviation, (n,); not a number for one value with ddof 1, whose deviation is 0."""
    return (_sum(deviation.square(), segment, size) / (size - ddof)).sqrt()[segment]
