"""Each rollout's way through the denoising steps: what a plan says of prompts, worked out for every rollout."""

import itertools
import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from aegpo.config import Config, Sampler, explorable
from aegpo.math.transitions import transition
from aegpo.types import Courses, Plan, Prompt

TRAINED = 7  # what a random choice is for: the first number of its key


def lay_out(plan: Plan, config: Config, prompts: Sequence[Prompt], sigmas: Tensor, step: int) -> Courses:
    """The courses of a step's rollouts.

    * `exploration.branch: none`: every rollout takes noise at all steps that its prompt explores.
    * `each` (TempFlow-GRPO, arXiv 2508.04324): at one of them, which its group has dealt among itself so that no step
      falls to a rollout alone; with too few rollouts for all steps, some wait for another training step.
    * `tree` (BranchGRPO, arXiv 2509.06040): at every step that may explore, and those the plan chose part it: a node's
      leaves go two ways, or as many as it takes for all to stand alone after the last parting.

    Args:
        plan: rollouts for each prompt, and the steps they explore.
        config: a resolved config.
        prompts: of the step, whose ids are part of the random choices' keys.
        sigmas: the noise schedule, float64 (N + 1,).
        step: of the training.
    """
    room, steps = explorable(config), config.sampler.steps
    group, explored = plan.group, plan.explored[plan.group]
    alone = torch.arange(len(group))
    node = alone.unsqueeze(1).repeat(1, steps + 1)
    match config.exploration.branch:
        case "each":
            for p in range(len(plan.rollouts)):
                explored[group == p] &= _dealt(plan.explored[p], int(plan.rollouts[p]), step)
        case "tree":
            for p in range(len(plan.rollouts)):
                node[group == p] = alone[group == p][_tree(plan.explored[p], int(plan.rollouts[p]))]
            explored[:, room.start : room.stop] = True
    without_noise = config.sampler.kind == "ode"
    ways = [
        _way(tuple(row), config.sampler, config.exploration.merge, tuple(sigmas.tolist()))
        for row in (explored & (not without_noise)).tolist()
    ]
    lands, noisy = torch.tensor([way[0] for way in ways]), torch.tensor([way[1] for way in ways])
    explored = explored if without_noise else noisy
    keys = [
        (TRAINED, config.seed, step, prompts[p].id, i) for p, n in enumerate(plan.rollouts.tolist()) for i in range(n)
    ]
    return Courses(lands, noisy, node, explored, explored & _kept(explored, config, keys, step))


def _dealt(explored: Tensor, rollouts: int, step: int) -> Tensor:
    """One explored step for each of a prompt's rollouts, in turn; bool (rollouts, N)."""
    steps = explored.nonzero().flatten()
    few = max(1, min(len(steps), rollouts // 2))
    chosen = steps.roll(-few * step)[:few]
    dealt = torch.zeros(rollouts, len(explored), dtype=torch.bool)
    dealt[torch.arange(rollouts), chosen[torch.arange(rollouts) % few]] = True
    return dealt


def _tree(parts: Tensor, leaves: int) -> Tensor:
    """The first leaf of the node that each leaf lies under at each point; int64 (leaves, N + 1)."""
    left = int(parts.sum())
    nodes, points = [range(leaves)], []
    for parting in [False, *parts.tolist()]:
        if parting:
            left -= 1
            nodes = [child for node in nodes for child in _children(node, left)]
        points.append([node[0] for node in nodes for _ in node])
    return torch.tensor(points).T


def _children(node: range, left: int) -> list[range]:
    """A node's leaves in as few parts, but two at least, as can stand alone after `left` more partings in two."""
    parts = max(min(2, len(node)), math.ceil(len(node) / 2**left))
    cuts = [len(node) * i // parts for i in range(parts + 1)]
    return [node[a:b] for a, b in itertools.pairwise(cuts)]


@cache
def _way(
    noisy: tuple[bool, ...], sampler: Sampler, least: float | None, sigmas: tuple[float, ...]
) -> tuple[list[int], list[bool]]:
    """Where each step lands and whether it is noisy, once steps are merged and those after the last noisy one fewer."""
    steps, at = len(noisy), 0
    lands, takes_noise = [0] * steps, [False] * steps
    while at < steps:
        if at > max((i for i in range(steps) if noisy[i]), default=steps):
            break
        takes_noise[at] = noisy[at]
        lands[at] = _merged(at, sampler, least, sigmas) if noisy[at] else at + 1
        at = lands[at]
    few = max(1, int((steps - at) * sampler.compress))
    points = [at + (steps - at) * i // few for i in range(few + 1)]
    for here, there in itertools.pairwise(points):
        if here < steps:
            lands[here] = there
    return lands, takes_noise


def _merged(at: int, sampler: Sampler, least: float | None, sigmas: tuple[float, ...]) -> int:
    """The first point after `at` to which a step takes noise of enough entropy (E-GRPO, arXiv 2601.00423).

    The last point is never reached so: the step onto it is deterministic.
    """
    if least is None:
        return at + 1
    one = torch.zeros(1, 1, dtype=torch.float64)
    for there in range(at + 1, len(sigmas) - 1):
        _, std = transition(one, one, sigmas[at], sigmas[there], sampler.kind, sampler.eta, sigmas[1])
        if entropy_of_noise(std.item()) >= least:
            return there
    return len(sigmas) - 2


def entropy_of_noise(std: float) -> float:
    """Differential entropy of a Gaussian step per element, ln(2 pi e std^2) / 2, in nats."""
    return math.log(2 * math.pi * math.e * std**2) / 2


def _kept(explored: Tensor, config: Config, keys: Sequence[tuple[int, ...]], step: int) -> Tensor:
    """Which steps may be trained, bool (n, N): a share of each rollout's, without those left out this time."""
    how, kept = config.exploration, torch.ones_like(explored)
    if how.share < 1:
        for i, key in enumerate(keys):
            steps = explored[i].nonzero().flatten()
            order = np.random.default_rng(key).permutation(len(steps))
            kept[i, steps[torch.from_numpy(order[max(1, int(len(steps) * how.share)) :])]] = False
    if how.skip:
        room = explorable(config)
        first = step % (len(room) - how.skip + 1)
        kept[:, room[first] : room[first] + how.skip] = False
    return kept
