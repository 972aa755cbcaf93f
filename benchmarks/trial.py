"""One training of the embedded model under a budget of network evaluations: what the comparisons have in common."""

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

BASE: dict[str, dict[str, float]] = {}  # how the base policy is judged, by what that depends on


class Enough(Exception):
    """The budget is spent."""


def train_to(
    marks: tuple[int, ...], prompts: int, seed: int, *layers: dict[str, Any], guard: bool = False
) -> dict[str, Any]:
    """Train until the last mark is passed, and judge the policy on the held-out prompts before and at each mark.

    Args:
        marks: network evaluations x samples spent on training (the probe's and the base's among them, a backward
            counted as two, judging not) after which the policy is judged, at the end of the training step.
        prompts: how many of the world's training prompts are used, so that each is visited again and again.
        seed: of the run.
        layers: settings, the later over the earlier.
        guard: whether to judge the base and the last policy in two more ways, in which what was learned by heart or to
            please the judge would not show: on prompts of other kinds, and by a stricter verifier.

    Returns:
        `curve`: forwards, rollouts, seconds of training, reward, pass rate and training steps at 0 and at each mark.
        `guard`: the mean reward before and after, on `unseen` prompts and by the `strict` verifier. `drawn`: the
        mean reward of each training step's rollouts. `explored`: the share of explorations that each denoising step
        had. `seconds` in all.
    """
    import torch
    from diffusers.training_utils import EMAModel

    from aegpo import models
    from aegpo.config import resolve
    from aegpo.data import load_prompts
    from aegpo.evaluation import evaluate
    from aegpo.models.base import acting
    from aegpo.rewards.panel import load_panel
    from aegpo.train import take_average, train
    from aegpo.world import verifier

    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        config = resolve(*layers, {"seed": seed, "output_dir": folder})
        held_out = load_prompts("world", "eval")
        judged_as = replace(config, seed=0)  # from the same noise whatever the run's seed
        reward, model = load_panel(config), models.load(config.model, seed)
        average = EMAModel(model.trainable.values(), decay=config.optimizer.ema) if config.optimizer.ema else None
        curve: list[dict[str, float]] = []
        explored, drawn = np.zeros(config.sampler.steps), []
        guarded: dict[str, list[float]] = {"unseen": [], "strict": []}
        judging, pause, rollouts = (
            0,
            0.0,
            0,
        )  # evaluations x samples, and seconds, spent on judging, which are not counted

        def stand_guard() -> None:
            if guard:
                guarded["unseen"].append(evaluate(judged_as, model, unseen(), reward)["eval/reward_mean"])
                with strictness(verifier, MIN_IOU=0.82, MAX_COLOR_DISTANCE=50.0):
                    guarded["strict"].append(evaluate(judged_as, model, held_out, reward)["eval/reward_mean"])

        class Judge:
            """The loop's display: judges the policy at the marks, and ends the run with the budget."""

            def begin(self, what: str, total: int) -> None: ...

            def advance(self, count: int) -> None: ...

            def step(self, metrics: dict[str, Any]) -> None:
                nonlocal judging, explored, pause, rollouts
                now = time.monotonic()
                if metrics["step"] == 0:
                    known = repr((config.model, config.eval_images, config.eval_steps, config.sampler.steps))
                    if known not in BASE:  # every run of a process begins with the same policy
                        BASE[known] = evaluate(judged_as, model, held_out, reward)
                    curve.append(point(0, 0, 0.0, BASE[known], metrics))
                    stand_guard()
                    judging, pause = model.forwards, time.monotonic()
                    return
                if average:
                    take_average(average, config, model, metrics["step"] - 1)
                rollouts += metrics["rollouts"]
                explored = explored + metrics["explored_steps"]
                drawn.append(metrics["reward/mean"])
                spent = metrics["forwards"] - judging
                if spent < marks[len(curve) - 1]:
                    return
                with acting(model, average.shadow_params if average and average.optimization_step else None):
                    judged = evaluate(judged_as, model, held_out, reward)
                    if len(curve) == len(marks):
                        stand_guard()
                curve.append(point(spent, rollouts, now - pause, judged, metrics))
                judging += model.forwards - metrics["forwards"]
                pause += time.monotonic() - now
                if len(curve) > len(marks):
                    raise Enough

        with suppress(Enough):
            train(config, model, training_prompts(prompts), held_out[:1], reward, Path(folder), Judge())
    return {
        "seed": seed,
        "curve": curve,
        "guard": guarded,
        "drawn": drawn,
        "explored": (explored / explored.sum()).round(4).tolist(),
        "seconds": time.monotonic() - began,
    }


def training_prompts(count: int) -> list[Any]:
    """So many of the world's training prompts, always the same."""
    from aegpo import world
    from aegpo.data import load_prompts

    everything = world.training()
    kept = np.random.default_rng(0).permutation(len(everything))[:count]
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder, "train.jsonl")
        own.write_text("".join(json.dumps(everything[i]) + "\n" for i in sorted(kept)))
        return load_prompts(str(own), "train")


def base_under(guidance: float, *layers: dict[str, Any]) -> float:
    """The held-out reward of the base policy under guidance, which costs two evaluations where the others take one."""
    from aegpo import models
    from aegpo.config import resolve
    from aegpo.data import load_prompts
    from aegpo.evaluation import evaluate
    from aegpo.rewards.panel import load_panel

    config = resolve(*layers, {"algorithm": "flow-grpo", "sampler": {"guidance": guidance}, "seed": 0})
    judged = evaluate(config, models.load(config.model), load_prompts("world", "eval"), load_panel(config))
    return judged["eval/reward_mean"]


def unseen(count: int = 96) -> list[Any]:
    """Prompts of kinds that no task has: a position with colours, and a number with a colour."""
    from aegpo.types import Prompt
    from aegpo.world import scenes

    rng, found = np.random.default_rng(1), {}
    while len(found) < count:
        request = scenes.random_request(rng)
        colored = all(color for _, color in request.objects)
        counted = len(request.objects) > 1 and len(set(request.objects)) == 1
        if colored and (request.relation or counted):
            about = {"objects": request.objects, "relation": request.relation, "task": request.task}
            found.setdefault(scenes.write(request, rng), about)
    return [Prompt(i, text, about) for i, (text, about) in enumerate(found.items())]


@contextmanager
def strictness(module: Any, **limits: float) -> Iterator[None]:
    """The verifier with other limits."""
    before = {name: getattr(module, name) for name in limits}
    vars(module).update(limits)
    yield
    vars(module).update(before)


def point(
    forwards: int, rollouts: int, seconds: float, judged: dict[str, float], metrics: dict[str, Any]
) -> dict[str, float]:
    return {
        "forwards": forwards,
        "rollouts": rollouts,
        "seconds": seconds,
        "reward": judged["eval/reward_mean"],
        "pass": judged["eval/pass_rate"],
        "steps": metrics["step"],
    }
