"""How good the policy is now: the same held-out prompts from the same noise, every time."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from aegpo.config import Config
from aegpo.models.base import Denoiser
from aegpo.report import save_grid
from aegpo.rewards import Reward
from aegpo.rollout import draw
from aegpo.types import Judgement, Prompt

SHOWN = 24  # pictures in a grid of samples


def evaluate(
    config: Config, model: Denoiser, held_out: Sequence[Prompt], reward: Reward, grid: Path | None = None
) -> dict[str, float]:
    """Draw `eval_images` pictures of each held-out prompt by ODE and judge them.

    Args:
        config: the run's; its sampler, seed and `eval_images` count.
        model: the policy.
        held_out: the prompts.
        reward: the judge.
        grid: where to write a PNG of some of the pictures.

    Returns:
        `eval/reward_mean`, and `eval/pass_rate` where the reward has a strict verdict; both again by task where the
        prompts have one.
    """
    images, asked, judged = draw_and_judge(config, model, held_out, reward)
    if grid:
        shown = evenly_spaced(len(held_out), SHOWN) * config.eval_images
        save_grid(
            grid,
            stills(images[shown]),
            [asked[i].text for i in shown],
            judged.score[shown].tolist(),
            None if judged.passed is None else judged.passed[shown].tolist(),
        )
    return _means(judged, [prompt.metadata.get("task") for prompt in asked])


def draw_and_judge(
    config: Config, model: Denoiser, prompts: Sequence[Prompt], reward: Reward
) -> tuple[np.ndarray, list[Prompt], Judgement]:
    """`eval_images` pictures of each prompt, uint8 (n, H, W, 3), the prompt of each, and what the reward says of it."""
    images = draw(model, prompts, config)
    asked = [prompt for prompt in prompts for _ in range(config.eval_images)]
    return images, asked, reward.judge(images, [prompt.text for prompt in asked], [prompt.metadata for prompt in asked])


def stills(images: np.ndarray) -> np.ndarray:
    """Pictures (n, H, W, 3) as they are; of videos (n, frames, H, W, 3) the first, middle and last frame in a row."""
    if images.ndim == 4:
        return images
    last = images.shape[1] - 1
    return np.concatenate([images[:, 0], images[:, last // 2], images[:, last]], axis=2)


def evenly_spaced(count: int, most: int) -> np.ndarray:
    """At most `most` of the places 0 to count - 1, from the first to the last."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(int)


def _means(judged: Judgement, tasks: Sequence[str | None]) -> dict[str, float]:
    metrics = {"eval/reward_mean": float(judged.score.mean())}
    if judged.passed is not None:
        metrics["eval/pass_rate"] = float(judged.passed.mean())
    for task in dict.fromkeys(task for task in tasks if task):
        here = np.array([other == task for other in tasks])
        metrics[f"eval/reward/{task}"] = float(judged.score[here].mean())
        if judged.passed is not None:
            metrics[f"eval/pass_rate/{task}"] = float(judged.passed[here].mean())
    return metrics
