"""The plan of a step: what the signals say, turned into rollouts for each prompt and steps to explore."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from aegpo.adapt.allocation import allocate
from aegpo.adapt.exploration import explore
from aegpo.adapt.memory import Memory
from aegpo.config import Config
from aegpo.math.transitions import transition
from aegpo.types import Plan, Prompt, Signals

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
            curves = torch.zeros(shape)
    return Plan(
        allocate(to_teach, how.rule, low=how.low, high=how.high, total=config.rollouts_per_step),
        explore(
            curves,
            where.rule,
            k=where.k,
            min_distance=where.min_distance,
            local_maxima=where.local_maxima,
            per=where.per,
            seed=seed_of(STEPS, config.seed, step),
        ),
    )


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
    """The standard deviation of the sampler's noise at each step, float64 (N,); the last step, unexplored, has none."""
    one = torch.zeros(len(sigmas) - 2, 1, dtype=torch.float64)
    sampler = config.sampler
    _, std = transition(one, one, sigmas[:-2], sigmas[1:-1], sampler.kind, sampler.eta, sigmas[1])
    return torch.cat([std.flatten(), torch.zeros(1, dtype=torch.float64)])


def seed_of(*key: int) -> int:
    """One number from a key of several, well mixed."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
