"""Advantages: how much better a rollout did than the others of its group."""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Std = Literal["group", "global", "none"]
Combine = Literal["rewards", "advantages", "gdpo"]


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
    rewards, group = _finite(rewards, group), _whole(group)
    return _relative(rewards, group, rewards, std, ddof, eps).clamp(-clip, clip).float()


def node_returns(rewards: Tensor, node: Tensor, log_prob: Tensor | None = None) -> Tensor:
    """What each node of a tree of rollouts is worth: the mean reward of the leaves under it (arXiv 2509.06040).

    With `log_prob` it is the mean weighted by the softmax, over a node's leaves, of the log-probability of the path
    from that node to the leaf, as in that paper's path-probability fusion.

    Args:
        rewards: (n,), of the leaves, any float dtype, finite.
        node: (n, T), int64: which node each leaf lies under at each of T depths, ids of at least 0 in any order, one
            id for one node within a depth; -1 where it lies under none.
        log_prob: (n, T), nats, any float dtype; not looked at where `node` is -1.

    Returns:
        (n, T), float64: every leaf's node's return; 0 where `node` is -1.

    Raises:
        ValueError: for a reward that is not finite, naming its position.
    """
    assert node.dtype == torch.int64 and node.shape[:1] == rewards.shape and node.ndim == 2
    rewards = _finite(rewards, node)
    leaf, depth, which, size, _ = _nodes(node)
    if log_prob is None:
        weight = 1 / size.double()[which]
    else:
        assert log_prob.shape == node.shape
        logits = log_prob.detach()[leaf, depth].double()
        largest = logits.new_zeros(size.shape).scatter_reduce(0, which, logits, "amax", include_self=False)
        weight = (logits - largest[which]).exp()
        weight = weight / _sum(weight, which, size)[which]
    values = rewards[leaf]
    minimum = values.new_zeros(size.shape).scatter_reduce(0, which, values, "amin", include_self=False)
    returns = minimum + _sum(weight * (values - minimum[which]), which, size)
    return rewards.new_zeros(node.shape).index_put((leaf, depth), returns[which])


def tree_advantages(
    rewards: Tensor,
    group: Tensor,
    node: Tensor,
    std: Std = "group",
    ddof: int = 0,
    eps: float = 1e-4,
    clip: float = 5.0,
    *,
    log_prob: Tensor | None = None,
) -> Tensor:
    """Advantages of the edges of a tree of rollouts (BranchGRPO, arXiv 2509.06040), clamped to [-clip, clip].

    An edge's advantage is its child's return (`node_returns`) relative to those of the other nodes of the same group
    at the same depth, each counted once however many leaves it has. The standard deviation is that set's (`group`),
    that of all leaves' rewards about their common mean (`global`), or none, as in `group_advantages`, which this is
    at a depth where each leaf is a node of its own. A set whose returns are all equal gets exactly 0.

    Args:
        rewards: (n,), of the leaves, any float dtype, finite.
        group: (n,), int64, the prompt of each leaf: arbitrary ids, groups of any size.
        node: (n, T), int64: the child node that each leaf lies under at each of T depths, as for `node_returns`. The
            leaves of a node are of one group.
        std: which standard deviation divides.
        ddof: subtracted from the number of nodes (`group`) or of leaves (`global`) in the variance.
        eps: added to the standard deviation.
        clip: bound on the advantage's size.
        log_prob: (n, T), nats, to weigh the leaves of a node by; by default they count alike.

    Returns:
        (n, T), float32, every leaf's own path, so one edge's advantage stands in the row of each leaf under it; 0
        where `node` is -1. The arithmetic is float64.

    Raises:
        ValueError: for an unknown `std`, and for a reward that is not finite, naming its position.
    """
    returns = node_returns(rewards, node, log_prob)
    rewards, group = _finite(rewards, group), _whole(group)
    leaf, depth, which, _, first = _nodes(node)
    assert (group[leaf] == group[leaf[first]][which]).all(), "the leaves of a node are of one group"
    siblings = _segments(depth[first], group[leaf[first]])
    per_node = _relative(returns[leaf[first], depth[first]], siblings, rewards, std, ddof, eps)
    return returns.new_zeros(node.shape).index_put((leaf, depth), per_node[which]).clamp(-clip, clip).float()


def combined_advantages(
    rewards: Tensor,
    group: Tensor,
    node: Tensor,
    weights: Sequence[float],
    combine: Combine = "rewards",
    std: Std = "group",
    ddof: int = 0,
    eps: float = 1e-4,
    clip: float = 5.0,
) -> Tensor:
    """Advantages of a tree's edges, as `tree_advantages`, by several rewards, bounded once they are combined.

    Args:
        rewards: (n, k), of the leaves, any float dtype, finite.
        group, node, eps, clip: as for `tree_advantages`.
        weights: k, how much each reward counts.
        combine: `rewards`: advantages of their weighted sum (Flow-GRPO, arXiv 2505.05470). `advantages`: the weighted
            sum of each one's (MixGRPO, arXiv 2507.21802). `gdpo`: that, each divided by its group's population
            deviation, over its own root mean square over all edges of all leaves (GDPO, arXiv 2601.05242); where every
            leaf explores alike and is a node of its own it is `gdpo`.
        std, ddof: as for `tree_advantages`, but of no effect on `gdpo`.

    Returns:
        (n, T), float32; exactly 0 throughout a group whose rewards are all equal.
    """
    each = rewards.double().unbind(1)
    std, ddof = ("group", 0) if combine == "gdpo" else (std, ddof)
    if combine == "rewards":  # added one by one: a product of matrices may round equal rows differently
        return tree_advantages(weighted_sum(weights, each), group, node, std, ddof, eps, clip)
    total = weighted_sum(weights, [tree_advantages(one, group, node, std, ddof, eps, math.inf) for one in each])
    if combine == "gdpo":
        total = total / (total[node >= 0].square().mean().sqrt() + eps)
    return total.clamp(-clip, clip)


def weighted_sum(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """The weighted sum of tensors of one shape, which is the same wherever they are."""
    return torch.stack([weight * value for weight, value in zip(weights, values, strict=True)]).sum(0)


def best_of(rewards: Tensor, group: Tensor, keep: int) -> Tensor:
    """DanceGRPO's best-of-N (arXiv 2505.07818): of each group the rollouts that say most, its best and its worst.

    Each group is put in one order, from the highest reward to the lowest and equal ones by position; the first
    `ceil(keep / 2)` and the last `floor(keep / 2)` of it stay. A group of at most `keep` stays whole.

    Args:
        rewards: (n,), any float dtype, finite; advantages of the same groups give the same.
        group: (n,), int64, arbitrary ids, groups of any size.
        keep: how many of each group, at least 2.

    Returns:
        (n,), bool: which stay.

    Raises:
        ValueError: for `keep` below 2, and for a reward that is not finite, naming its position.
    """
    if keep < 2:
        raise ValueError(f"best-of-N keeps at least 2 of a group, one good and one bad, not {keep}")
    rewards = _finite(rewards, group)
    _, segment, size = _whole(group).unique(return_inverse=True, return_counts=True)
    order = rewards.argsort(descending=True, stable=True)
    order = order[segment[order].argsort(stable=True)]
    own = segment[order]
    rank = torch.arange(len(order), device=order.device) - (size.cumsum(0) - size)[own]
    stays = (rank < (keep + 1) // 2) | (rank >= size[own] - keep // 2)
    return torch.zeros_like(stays).index_put((order,), stays)


def gdpo(rewards: Tensor, group: Tensor, weights: Tensor, eps: float = 1e-4) -> Tensor:
    """Advantages from several rewards, each normalised on its own before they are summed (GDPO, arXiv 2601.05242).

    Each reward is normalised in its group, `(R - mean) / (std + eps)`; these are weighed and summed; and the sum is
    normalised over the batch, `/ (std + eps)`. Both standard deviations are population ones. The sum's mean over the
    batch is 0 already, since it is in every group, so it is not subtracted: what is exactly 0 stays so.

    Args:
        rewards: (n, k), any float dtype, finite: k rewards of each rollout.
        group: (n,), int64, arbitrary ids, groups of any size.
        weights: (k,), how much each reward counts.
        eps: added to both standard deviations.

    Returns:
        (n,), float32; the arithmetic is float64. A group in which no reward varies gets exactly 0.

    Raises:
        ValueError: for a reward that is not finite, naming its position.
    """
    assert rewards.ndim == 2 and weights.shape == rewards.shape[1:]
    rewards, group = _finite(rewards, group), _whole(group)
    each = [_relative(one, group, one, "group", 0, eps) for one in rewards.unbind(1)]
    total = torch.stack(each, 1) @ weights.to(rewards)
    return (total / (total.square().mean().sqrt() + eps)).float()


def _finite(rewards: Tensor, group: Tensor) -> Tensor:
    """The rewards in float64, one row of them for each row of `group`."""
    assert len(rewards) == len(group)
    not_finite = (~rewards.isfinite()).nonzero().tolist()
    if not_finite:
        at = ", ".join(map(str, not_finite[0]))
        raise ValueError(f"rewards[{at}] is {rewards[tuple(not_finite[0])].item()}; rewards must be finite")
    return rewards.double()


def _whole(group: Tensor) -> Tensor:
    assert group.dtype == torch.int64, f"group ids must be int64, not {group.dtype}"
    assert group.ndim == 1
    return group


def _nodes(node: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The entries of a tree that are nodes, and the m nodes themselves.

    Returns:
        leaf, depth: (entries,), where each stands in `node` (n, T).
        which: (entries,), its node, 0 to m - 1.
        size: (m,), how many leaves each node has.
        first: (m,), the first entry of each node.
    """
    leaf, depth = (node >= 0).nonzero(as_tuple=True)
    which = _segments(depth, node[leaf, depth])
    size = torch.bincount(which)
    first = which.argsort(stable=True)[size.cumsum(0) - size]
    return leaf, depth, which, size, first


def _segments(major: Tensor, minor: Tensor) -> Tensor:
    """Pairs of ids, (n,) each, numbered from 0 in their order; the ids may be so large that no product holds them."""
    return torch.stack([major, minor]).unique(dim=1, return_inverse=True)[1]


def _relative(values: Tensor, group: Tensor, rewards: Tensor, std: Std, ddof: int, eps: float) -> Tensor:
    """`values` (n,) less their group's mean, divided by what `std` says; `global` is the std of `rewards`."""
    _, segment, size = group.unique(return_inverse=True, return_counts=True)
    deviation = _deviation(values, segment, size)
    match std:
        case "group":
            scale = _std(deviation, segment, size, ddof) + eps
        case "global":
            one = torch.zeros(len(rewards), dtype=torch.int64, device=rewards.device)
            total = torch.bincount(one, minlength=1)
            scale = _std(_deviation(rewards, one, total), one, total, ddof)[:1] + eps
        case "none":
            scale = torch.ones_like(deviation)
        case _:
            raise ValueError(f"std must be one of {', '.join(get_args(Std))}, not {std!r}")
    return torch.where(deviation == 0, 0.0, deviation / scale)


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
