"""A run beside its base policy: the same prompts from the same noise, judged by several rewards."""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from aegpo.config import Config, eval_steps
from aegpo.models.base import Denoiser
from aegpo.report import save_picture
from aegpo.rewards.panel import Panel
from aegpo.rollout import draw
from aegpo.types import Prompt

POLICIES = ("base", "run")
RESAMPLES, LEVEL = 2000, 0.95
RESAMPLE = 8  # what a random choice is for: its key, always the same
PICTURE = re.compile(r"[0-9]{5,}-[0-9]+\.png")  # what `compare` writes, and nothing else is ever deleted

Scores = dict[str, dict[str, np.ndarray]]


def compare(
    config: Config,
    model: Denoiser,
    prompts: Sequence[Prompt],
    judges: Mapping[str, Panel],
    folder: Path,
    progress: Callable[[int], None] = lambda _: None,
) -> Scores:
    """Draw `eval_images` pictures of each prompt by the base policy and by the run, each once, and have all judge them.

    Pictures are drawn in the batches that `evaluate` makes, judged and written before the next are drawn: as
    `base/00012-0.png` and `run/00012-0.png`, by the prompt's id and the picture's number. Those that an earlier call
    left there are deleted first.

    Args:
        config: of the run, resolved.
        model: the policy.
        prompts: to draw.
        judges: rewards by name.
        folder: where the pictures go.
        progress: told how many more of the 2 x prompts x `eval_images` pictures are done.

    Returns:
        By reward, and by `base` and `run`: scores, float64 (prompts, images).
    """
    for policy in POLICIES:
        (folder / policy).mkdir(parents=True, exist_ok=True)
        for old in (folder / policy).iterdir():
            if PICTURE.fullmatch(old.name):
                old.unlink()
    scores = {name: {policy: [] for policy in POLICIES} for name in judges}
    most = config.optimizer.micro_batch
    for part in (prompts[at : at + most] for at in range(0, len(prompts), most)):
        asked = [(prompt, number) for prompt in part for number in range(config.eval_images)]
        prompted = [prompt for prompt, _ in asked]
        for policy in POLICIES:
            with model.reference() if policy == "base" else nullcontext():
                images = draw(model, part, config)
            for image, (prompt, number) in zip(images, asked, strict=True):
                save_picture(folder / policy / f"{prompt.id:05}-{number}.png", image)
            for name, judge in judges.items():
                scores[name][policy].append(judge.judge(images, prompted).score)
            progress(len(images))
    shape = len(prompts), config.eval_images
    return {
        name: {policy: np.concatenate(rows).astype(float).reshape(shape) for policy, rows in both.items()}
        for name, both in scores.items()
    }


def interval(values: np.ndarray) -> tuple[float, float]:
    """The bootstrap's percentile interval of the mean, at LEVEL, from RESAMPLES resamples of values (n,)."""
    rng = np.random.default_rng(RESAMPLE)
    means = [rng.choice(values, len(values)).mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def summary(scores: Scores) -> dict[str, Any]:
    """The scores with the means of base and run and of what the run gained, each with its interval.

    The pictures of a prompt are averaged first: prompts are what is resampled, for the gain by both policies at once.

    Args:
        scores: what `compare` returns.

    Returns:
        By reward, `base`, `run` and `gain`, each with `mean` and `interval`; the first two with their `scores`, a list
        of pictures a prompt.
    """
    return {name: _summary(both["base"], both["run"]) for name, both in scores.items()}


def _summary(base: np.ndarray, run: np.ndarray) -> dict[str, Any]:
    return {
        "base": _estimate(base.mean(1)) | {"scores": base.tolist()},
        "run": _estimate(run.mean(1)) | {"scores": run.tolist()},
        "gain": _estimate((run - base).mean(1)),
    }


def _estimate(values: np.ndarray) -> dict[str, Any]:
    return {"mean": float(values.mean()), "interval": interval(values)}


def drawn_as(config: Config) -> dict[str, Any]:
    """The settings that the pictures depend on, and those of the intervals; plain, for JSON."""
    return {
        "model": config.model.path,
        "resolution": config.model.resolution,
        "steps": eval_steps(config),
        "guidance": config.sampler.guidance,
        "seed": config.seed,
        "images": config.eval_images,
        "prompts": config.prompts.eval,
        "level": LEVEL,
        "resamples": RESAMPLES,
    }
