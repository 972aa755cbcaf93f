"""How good the policy is now: the same held-out prompts from the same noise, every time."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from aegpo.config import Config
from aegpo.distributed import ALONE, Team
from aegpo.models.base import Denoiser
from aegpo.report import save_grid
from aegpo.rewards.panel import Inquiry, Panel
from aegpo.rollout import draw
from aegpo.types import Prompt, Verdict

SHOWN = 24  # pictures in a grid of samples


def evaluate(
    config: Config,
    model: Denoiser,
    held_out: Sequence[Prompt],
    reward: Panel,
    grid: Path | None = None,
    team: Team = ALONE,
) -> dict[str, float]:
    """Draw `eval_images` pictures of each held-out prompt by ODE and judge them.

    Args:
        config: the run's; its sampler, seed and `eval_images` count.
        model: the policy.
        held_out: the prompts.
        reward: the judge.
        grid: where the first process is to write a PNG of some of the pictures.
        team: the processes, each of which draws its share.

    Returns:
        Nothing where no picture could be judged; else `eval/reward_mean`, and `eval/pass_rate` where the reward has a
        strict verdict; both again by task where the prompts have one; of several rewards each one's own,
        `eval/reward_mean/NAME` and `eval/pass_rate_of/NAME`.
    """
    own = team.share(len(held_out))
    images = draw(model, [held_out[i] for i in own], config)
    asked = [prompt for prompt in held_out for _ in range(config.eval_images)]
    inquiry = Inquiry(reward, asked, [prompt.id for prompt in asked], team, training=False)
    first = own.start * config.eval_images
    if len(images):
        inquiry.ask(images, torch.arange(first, first + len(images)))
    judged = inquiry.verdict()
    if grid:
        shown = evenly_spaced(len(held_out), SHOWN) * config.eval_images
        mine = shown[(shown >= first) & (shown < first + len(images))]
        own = stills(images[mine - first])
        shape = next(shape for count, shape in team.tell([len(images), own.shape[1:]]) if count)  # some drew none
        pictures = team.gather(torch.from_numpy(own.reshape(-1, *shape)))
        with team.agreed():
            if team.is_first:
                passed = None if judged.passed is None else judged.passed[shown].tolist()
                texts = [asked[i].text for i in shown]
                save_grid(grid, pictures.numpy(), texts, judged.score[shown].tolist(), passed)
    return _means(judged, [prompt.metadata.get("task") for prompt in asked])


def draw_and_judge(
    config: Config, model: Denoiser, prompts: Sequence[Prompt], reward: Panel
) -> tuple[np.ndarray, list[Prompt], Verdict]:
    """`eval_images` pictures of each prompt, uint8 (n, H, W, 3), the prompt of each, and what the reward says of it."""
    images = draw(model, prompts, config)
    asked = [prompt for prompt in prompts for _ in range(config.eval_images)]
    return images, asked, reward.judge(images, asked)


def stills(images: np.ndarray) -> np.ndarray:
    """Pictures (n, H, W, 3) as they are; of videos (n, frames, H, W, 3) the first, middle and last frame in a row."""
    if images.ndim == 4:
        return images
    last = images.shape[1] - 1
    return np.concatenate([images[:, 0], images[:, last // 2], images[:, last]], axis=2)


def evenly_spaced(count: int, most: int) -> np.ndarray:
    """At most `most` of the places 0 to count - 1, from the first to the last."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(int)


def _means(judged: Verdict, tasks: Sequence[str | None]) -> dict[str, float]:
    metrics: dict[str, float] = {}

    def take(places: np.ndarray, reward: str, pass_rate: str) -> None:
        if places.any():
            metrics[reward] = float(judged.score[places].mean())
            if judged.passed is not None:
                metrics[pass_rate] = float(judged.passed[places].mean())

    take(judged.kept, "eval/reward_mean", "eval/pass_rate")
    for task in dict.fromkeys(task for task in tasks if task):
        here = np.array([other == task for other in tasks])
        take(judged.kept & here, f"eval/reward/{task}", f"eval/pass_rate/{task}")
    for name, said in judged.parts.items() if len(judged.parts) > 1 else ():
        finite = judged.kept & np.isfinite(said.score)
        if finite.any():
            metrics[f"eval/reward_mean/{name}"] = float(said.score[finite].mean())
            if said.passed is not None:
                metrics[f"eval/pass_rate_of/{name}"] = float(said.passed[finite].mean())
    return metrics
