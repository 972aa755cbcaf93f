"""Whether attention entropy says of a model and a reward what AEGPO reads in it (arXiv 2602.06825).

That is, which prompts have most to gain (the change of entropy since the base policy) and at which denoising steps to
explore (its peaks). Both are set beside what they should foretell, and beside plainer signals that might do as well.

Shape letters: C stages of the policy, P prompts, N denoising steps.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from aegpo.adapt.exploration import explore
from aegpo.adapt.plan import policy_noise
from aegpo.checkpoint import load_weights, step_of
from aegpo.config import SPREAD_ROLLOUTS, Config, eval_steps, with_noise
from aegpo.evaluation import draw_and_judge, evenly_spaced
from aegpo.models.base import Denoiser
from aegpo.rewards.panel import Panel
from aegpo.signals import entropy_curves, reward_spread
from aegpo.types import Prompt, Signals, Trunk

SPREAD_OVER = 24  # prompts, at most, over which the spread of reward is measured
CHOSEN = 4  # steps that a reading of entropy would choose, as AEGPO does


@dataclass(frozen=True)
class Stage:
    """What the policy was at one point of its training, on the same prompts from the same noise each time.

    Attributes:
        step: of the training; 0 is the base policy.
        entropy: float64 (layers, P, N), in nats.
        reward: float64 (P, images).
    """

    step: int
    entropy: Tensor
    reward: np.ndarray


def analyze(
    config: Config,
    model: Denoiser,
    prompts: Sequence[Prompt],
    reward: Panel,
    checkpoints: Sequence[Path] = (),
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure the policy at each checkpoint, and of the newest what exploring each denoising step is worth.

    Args:
        config: a resolved config; `eval_images` pictures of each prompt are judged.
        model: the policy, fresh from `aegpo.models.load`; it is left with the newest weights.
        prompts: to look at.
        reward: judges images.
        checkpoints: of the run, oldest first; none for a model that was not trained.
        progress: told how many more of the `evaluations` are done.

    Returns:
        Plain numbers, ready for JSON, under `images`, `prompts`, `entropy` (layers, N), and what `over_prompts` and
        `over_steps` return.
    """
    stages = follow(config, model, prompts, reward, checkpoints, progress)
    base, newest = stages[0], stages[-1]
    moved = newest.step > 0
    config = with_noise(config)
    where = evenly_spaced(len(prompts), SPREAD_OVER).tolist()
    some = [prompts[i] for i in where]
    before = model.forwards
    readings, trunk = read_entropy(config, model, some, moved)
    progress(model.forwards - before)
    spread = spread_of_each(config, model, some, reward, trunk, progress)
    return {
        "images": config.eval_images,
        "prompts": [prompt.text for prompt in prompts],
        "entropy": {
            "base": base.entropy.mean(1).tolist(),
            "policy": newest.entropy.mean(1).tolist() if moved else None,
            "step": newest.step,
        },
        **over_prompts(stages),
        "spread_over": {
            "step": newest.step,
            "prompts": where,
            "rollouts": SPREAD_ROLLOUTS,
            "sampler": {"kind": config.sampler.kind, "eta": config.sampler.eta},
        },
        **over_steps(spread, readings),
    }


def evaluations(config: Config, prompts: int, stages: int, doubled: bool) -> int:
    """Network evaluations that `analyze` takes for so many prompts and stages of the policy, the base among them.

    `doubled` says whether guidance costs a second one.
    """
    steps, some = config.sampler.steps, min(prompts, SPREAD_OVER)
    followed = stages * prompts * (steps + config.eval_images * eval_steps(config))
    read = some * steps * (2 + (stages > 1))
    spread = some * SPREAD_ROLLOUTS * steps * (steps - 1) // 2
    return (followed + read + spread) * (2 if doubled else 1)


# ---------------------------------------------------------------- measurements


def follow(
    config: Config,
    model: Denoiser,
    prompts: Sequence[Prompt],
    reward: Panel,
    checkpoints: Sequence[Path],
    progress: Callable[[int], None] = lambda _: None,
) -> list[Stage]:
    """The base policy, and the policy at each checkpoint that was trained."""
    with model.reference():
        stages = [_measure(config, model, prompts, reward, 0, progress)]
    for folder in checkpoints:
        if step_of(folder) > 0:
            load_weights(folder, model.trainable)
            stages.append(_measure(config, model, prompts, reward, step_of(folder), progress))
    return stages


def _measure(
    config: Config,
    model: Denoiser,
    prompts: Sequence[Prompt],
    reward: Panel,
    step: int,
    progress: Callable[[int], None],
) -> Stage:
    most, entropies, scores = config.optimizer.micro_batch, [], []
    for part in (prompts[at : at + most] for at in range(0, len(prompts), most)):  # the batches that `evaluate` makes
        before = model.forwards
        entropies.append(entropy_curves(model, part, model.encode([prompt.text for prompt in part]), config)[0])
        scores.append(draw_and_judge(config, model, part, reward)[2].score)
        progress(model.forwards - before)
    return Stage(step, torch.cat(entropies, 1), np.concatenate(scores).astype(float).reshape(len(prompts), -1))


def read_entropy(
    config: Config, model: Denoiser, prompts: Sequence[Prompt], moved: bool
) -> tuple[dict[str, Tensor], Trunk]:
    """Every curve in whose peaks one might explore, float64 (P, N), and the prompts' noiseless trajectories.

    Args:
        config: a resolved config, with a sampler that has noise.
        model: the policy.
        prompts: to look at.
        moved: whether the policy was trained, so that its change since the base is a curve too.
    """
    conditions = model.encode([prompt.text for prompt in prompts])

    def image_to(keys: Literal["all", "text"]) -> tuple[Tensor, Trunk]:
        looking = replace(config, probe=replace(config.probe, queries="image", keys=keys))
        layers, trunk = entropy_curves(model, prompts, conditions, looking)
        return layers.mean(0), trunk

    entropy, trunk = image_to("all")
    noise = policy_noise(config, model.sigmas(config.sampler.steps)).expand_as(entropy)
    readings = {
        "entropy": entropy,
        "entropy_to_text": image_to("text")[0],
        "entropy_times_noise": entropy * noise,
    }
    if moved:
        with model.reference():
            readings["delta_entropy"] = (entropy - image_to("all")[0]).abs()
    return readings | {"policy_noise": noise}, trunk


def spread_of_each(
    config: Config,
    model: Denoiser,
    prompts: Sequence[Prompt],
    reward: Panel,
    trunk: Trunk,
    progress: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """The `reward_spread` of each prompt, float64 (P, N)."""
    spreads = []
    for i, prompt in enumerate(prompts):
        before, own = (
            model.forwards,
            Trunk(trunk.latents[i : i + 1], trunk.velocities[i : i + 1], torch.zeros(1).long()),
        )
        conditions = model.encode([prompt.text])
        spreads.append(reward_spread(model, [prompt], conditions, reward, config, step=0, visit=0, trunk=own))
        progress(model.forwards - before)
    return torch.stack(spreads)


# ---------------------------------------------------------------- what they say


def over_prompts(stages: Sequence[Stage]) -> dict[str, Any]:
    """Set the change of entropy, and its rivals, beside what each prompt gained afterwards.

    Args:
        stages: of the policy, the base first.

    Returns:
        `checkpoints`: for each stage lists over the prompts: `delta_entropy` (as it is allocated by), mean `reward`,
        `reward_std` inside the prompt's images, `gain_to_next` and `gain_to_last` (null for the last).
        `correlations`: for each stage but the last, and each of the two gains, Spearman's with the three signals (null
        where one side is constant), and the standard error it has where there is no relation, 1 / sqrt(n - 1).
        `ranking`: the newest stage that has both a change of entropy and a later one, and the prompts by that change,
        largest first; or null.
    """
    base, last = stages[0], stages[-1]
    checkpoints = []
    for stage, later in zip(stages, [*stages[1:], None], strict=True):
        row = {
            "step": stage.step,
            "delta_entropy": Signals(stage.entropy.mean(0), base.entropy.mean(0)).delta_entropy.numpy(),
            "reward": stage.reward.mean(1),
            "reward_std": stage.reward.std(1),
            "gain_to_next": None if later is None else (later.reward - stage.reward).mean(1),
            "gain_to_last": None if later is None else (last.reward - stage.reward).mean(1),
        }
        checkpoints.append(row)
    followed = [row for row in checkpoints[1:-1] if np.ptp(row["delta_entropy"]) > 0]
    return {
        "checkpoints": [{name: _plain(value) for name, value in row.items()} for row in checkpoints],
        "correlations": [
            _correlations(row, later["step"], gain)
            for row, later in pairwise(checkpoints)
            for gain in ("gain_to_next", "gain_to_last")
        ],
        "ranking": _ranking(followed[-1]) if followed else None,
    }


def _ranking(row: dict[str, Any]) -> dict[str, Any]:
    return {"step": row["step"], "order": np.argsort(-row["delta_entropy"], kind="stable").tolist()}


def _correlations(row: dict[str, Any], following: int, gain: str) -> dict[str, Any]:
    n = len(row[gain])
    return {
        "step": row["step"],
        "next": following,
        "gain": gain,
        "n": n,
        "standard_error": (n - 1) ** -0.5 if n > 1 else None,
        **{signal: rank_correlation(row[signal], row[gain]) for signal in ("delta_entropy", "reward", "reward_std")},
    }


def over_steps(spread: Tensor, readings: Mapping[str, Tensor]) -> dict[str, Any]:
    """Set every reading of entropy beside the spread of reward that exploring each step alone brings.

    Args:
        spread: (P, N), of each prompt's rewards when it explores that step alone.
        readings: by name, each (P, N).

    Returns:
        `spread`: its mean over the prompts, a number a step. `best`: the CHOSEN steps where it is largest, counted from
        0. `random_share`: what steps drawn at random have on average of the sum of spread that the best ones have.
        `readings`: by name, `curve` (mean over the prompts), Spearman's `correlation` with the spread over all steps
        but the last, which nobody explores (null where one side is constant), the steps `chosen`, and their `share` of
        the best ones' sum (null where exploring spreads nothing).
    """
    worth = spread.mean(0)
    best = _highest(worth)
    most = worth[best].sum().item()

    def share(total: float) -> float | None:
        return total / most if most > 0 else None

    def beside(curve: Tensor) -> dict[str, Any]:
        chosen = _highest(curve)
        return {
            "curve": curve.tolist(),
            "correlation": rank_correlation(curve[:-1].numpy(), worth[:-1].numpy()),
            "chosen": chosen,
            "share": share(worth[chosen].sum().item()),
        }

    return {
        "spread": worth.tolist(),
        "best": best,
        "random_share": share(len(best) * worth[:-1].mean().item()),
        "readings": {name: beside(curves.mean(0)) for name, curves in readings.items()},
    }


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's, between two rows of numbers; None where one of them is constant, for then there is none."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(spearmanr(a, b).statistic)  # pyright: ignore[reportAttributeAccessIssue] (scipy has no types)


def _highest(curve: Tensor) -> list[int]:
    """The CHOSEN steps at which a curve, (N,), is highest, never the last step; in order."""
    most = min(CHOSEN, len(curve) - 1)
    return explore(curve[None], "reward_spread", most)[0].nonzero().flatten().tolist()


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value
