"""The plan of a step: what the signals say, turned into rollouts for each prompt and steps to explore."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from aegpo.adapt.allocation import allocate
from aegpo.adapt.exploration import draw_levels, explore, window_start
from aegpo.adapt.memory import Memory
from aegpo.config import Config, explorable
from aegpo.math.transitions import transition
from aegpo.types import Plan, Prompt, Signals

CURVES = ("entropy_peaks", "delta_entropy_peaks", "policy_noise", "reward_spread")  # rules that follow a curve
STEPS = 4  # what a random choice is for: the first number of its key


def make_plan(
    config: Config, prompts: Sequence[Prompt], signals: Signals | None, memory: Memory, sigmas: Tensor, step: int
) -> Plan:
    """Rollouts for each prompt, and the steps at which they explore.

    Args:
        config: a resolved config.
        prompts: of the step.
        signals: what the probe measured; none where no rule asks for it.
        memory: of earlier visits; what allocation goes by is folded into it.
        sigmas: the noise schedule, float64 (N + 1,).
        step: of the training, for the random rules.
    """
    how, where = config.allocation, config.exploration
    ids = [prompt.id for prompt in prompts]
    shape = (len(prompts), config.sampler.steps)
    match how.rule:
        case "median_split" | "proportional":
            assert signals is not None, f"{how.rule} needs the probe"
            moved = signals.relative_delta_entropy if how.relative else signals.delta_entropy
            to_teach = memory.visit(ids, moved, how.smoothing)
        case "reward_variance":
            to_teach = memory.recall(ids)
        case "uniform":
            to_teach = torch.zeros(len(prompts))
    match where.rule:
        case "entropy_peaks":
            assert signals is not None, f"{where.rule} needs the probe"
            curves = _reading(config, signals, sigmas)
        case "delta_entropy_peaks":
            assert signals is not None, f"{where.rule} needs the probe"
            curves = signals.change
        case "policy_noise":
            curves = policy_noise(config, sigmas).expand(shape)
        case "reward_spread":
            assert memory.reward_spread is not None, "the spread is measured before the first plan"
            curves = memory.reward_spread.expand(shape)
        case "all" | "window" | "random":
            curves = torch.zeros(shape, dtype=torch.float64)
    rollouts = allocate(to_teach, how.rule, low=how.low, high=how.high, total=config.rollouts_per_step)
    room, seed = explorable(config), seed_of(STEPS, config.seed, step)
    weight = torch.ones(shape, dtype=torch.float64)
    if config.sampler.kind == "ode" and where.rule in CURVES:
        curves = curves.abs() if where.rule == "delta_entropy_peaks" else curves
        if where.per == "batch":
            curves = curves.mean(0, keepdim=True).expand_as(curves)
        explored = torch.zeros(shape, dtype=torch.bool)
        here = slice(room.start, room.stop)
        explored[:, here], weight[:, here] = draw_levels(curves[:, here], where.k, seed, where.importance)
        return Plan(rollouts, explored, weight)
    last = room.stop - 1 - (where.k - 1) * where.min_distance
    start = room.start
    if where.rule == "window":
        start = window_start(where.moves, step, room.start, last, where.moves_every, seed)
    explored = explore(
        curves,
        where.rule,
        k=where.k,
        min_distance=where.min_distance,
        local_maxima=where.local_maxima,
        per=where.per,
        start=start,
        until=room.stop,
        seed=seed,
    )
    return Plan(rollouts, explored, weight)


def remember(config: Config, prompts: Sequence[Prompt], scores: Tensor, group: Tensor, memory: Memory) -> None:
    """What the next plans need to know of this step's rewards: their spread inside each prompt's group.

    Args:
        config: a resolved config.
        prompts: of the step.
        scores: (n,), the rewards; not a number in a group of which nothing is known this time.
        group: int64 (n,), the prompt of each.
        memory: of all visits.
    """
    if config.allocation.rule == "reward_variance":
        spread = torch.stack([scores[group == i].std() for i in range(len(prompts))])  # groups differ in size
        known = spread.isfinite()
        ids = [prompt.id for prompt, is_known in zip(prompts, known.tolist(), strict=True) if is_known]
        memory.visit(ids, spread[known], config.allocation.smoothing)


def _reading(config: Config, signals: Signals, sigmas: Tensor) -> Tensor:
    """The curves, (P, N), whose peaks `entropy_peaks` looks for."""
    match config.exploration.reading:
        case "plain":
            return signals.entropy
        case "above_batch":
            return signals.entropy - signals.entropy.mean(0)
        case "times_noise":
            return signals.entropy * policy_noise(config, sigmas)


def policy_noise(config: Config, sigmas: Tensor) -> Tensor:
    """The standard deviation of the sampler's noise at each step, float64 (N,); the last step, unexplored, has none.

    Where rollouts are ODE throughout, it is that of the noise put on a finished image to bring it back: sigma.
    """
    sampler, nothing = config.sampler, torch.zeros(1, dtype=torch.float64)
    if sampler.kind == "ode":
        return torch.cat([sigmas[:-2], nothing])
    one = torch.zeros(len(sigmas) - 2, 1, dtype=torch.float64)
    _, std = transition(one, one, sigmas[:-2], sigmas[1:-1], sampler.kind, sampler.eta, sigmas[1])
    return torch.cat([std.flatten(), nothing])


def seed_of(*key: int) -> int:
    """One number from a key of several, well mixed."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
