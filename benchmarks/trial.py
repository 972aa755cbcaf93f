"""One training of the embedded model under a budget of network evaluations: what the comparisons have in common."""

import json
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np


class Enough(Exception):
    """The budget is spent."""


def train_to(marks: tuple[int, ...], prompts: int, seed: int, *layers: dict[str, Any]) -> dict[str, Any]:
    """Train until the last mark is passed, and judge the policy on the held-out prompts before and at each mark.

    Args:
        marks: network evaluations x samples spent on training (the probe's and the base's among them, a backward
            counted as two, judging not) after which the policy is judged, at the end of the training step.
        prompts: how many of the world's training prompts are used, so that each is visited again and again.
        seed: of the run.
        layers: settings, the later over the earlier.

    Returns:
        `curve`: forwards, seconds of training, reward, pass rate and training steps at 0 and at each mark. `drawn`: the
        mean reward of each training step's rollouts. `explored`: the share of explorations that each denoising step
        had. `seconds` in all.
    """
    import torch
    from diffusers.training_utils import EMAModel

    from aegpo import models, rewards, world
    from aegpo.config import resolve
    from aegpo.data import load_prompts
    from aegpo.evaluation import evaluate
    from aegpo.models.base import acting
    from aegpo.train import take_average, train

    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        config = resolve(*layers, {"seed": seed, "output_dir": folder})
        everything = world.training()
        kept = np.random.default_rng(0).permutation(len(everything))[:prompts]
        own = Path(folder, "train.jsonl")
        own.write_text("".join(json.dumps(everything[i]) + "\n" for i in sorted(kept)))
        held_out = load_prompts("world", "eval")
        judged_as = replace(config, seed=0)  # from the same noise whatever the run's seed
        reward, model = rewards.load(config.reward), models.load(config.model, seed)
        average = EMAModel(model.trainable.values(), decay=config.optimizer.ema) if config.optimizer.ema else None
        curve: list[dict[str, float]] = []
        explored, drawn = np.zeros(config.sampler.steps), []
        judging, pause = 0, 0.0  # evaluations x samples, and seconds, spent on judging, which are not counted

        class Judge:
            """The loop's display: judges the policy at the marks, and ends the run with the budget."""

            def begin(self, what: str, total: int) -> None: ...

            def advance(self, count: int) -> None: ...

            def step(self, metrics: dict[str, Any]) -> None:
                nonlocal judging, explored, pause
                now = time.monotonic()
                if metrics["step"] == 0:
                    curve.append(point(0, 0.0, evaluate(judged_as, model, held_out, reward), metrics))
                    judging, pause = model.forwards, time.monotonic()
                    return
                if average:
                    take_average(average, config, model, metrics["step"] - 1)
                explored = explored + metrics["explored_steps"]
                drawn.append(metrics["reward/mean"])
                spent = metrics["forwards"] - judging
                if spent < marks[len(curve) - 1]:
                    return
                with acting(model, average.shadow_params if average and average.optimization_step else None):
                    judged = evaluate(judged_as, model, held_out, reward)
                curve.append(point(spent, now - pause, judged, metrics))
                judging += model.forwards - metrics["forwards"]
                pause += time.monotonic() - now
                if len(curve) > len(marks):
                    raise Enough

        with suppress(Enough):
            train(config, model, load_prompts(str(own), "train"), held_out[:1], reward, Path(folder), Judge())
    return {
        "seed": seed,
        "curve": curve,
        "drawn": drawn,
        "explored": (explored / explored.sum()).round(4).tolist(),
        "seconds": time.monotonic() - began,
    }


def point(forwards: int, seconds: float, judged: dict[str, float], metrics: dict[str, Any]) -> dict[str, float]:
    return {
        "forwards": forwards,
        "seconds": seconds,
        "reward": judged["eval/reward_mean"],
        "pass": judged["eval/pass_rate"],
        "steps": metrics["step"],
    }
