"""What it saves to ask a reward elsewhere while further rollouts are drawn.

python benchmarks/overlap.py [--pairs N] [--json FILE]

Training steps of the embedded model, by a reward that takes as long for an image as drawing it took: it waits, one
image after another, as a server with a GPU of its own would let us wait. Once a step asks it when all rollouts are
drawn (in turn), once as soon as each part of them is (overlapped). Both take the same steps to the same numbers. Runs
of both alternate; a ratio is of two neighbours, and the median over the pairs is reported. What is
to gain depends on the rest of the step: with u times the rollouts for it, and B parts, (2 + u) / (1 + 1/B + u) at most.
So it is measured with one and with two explored steps of 20.
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from demo import git
from rich.console import Console
from rich.table import Table

from aegpo import models
from aegpo.config import Checks, resolve
from aegpo.data import load_prompts
from aegpo.rewards import Metadata, Reward, load
from aegpo.rewards.panel import Panel
from aegpo.train import train
from aegpo.types import Judgement

STEPS = 4  # of a run; the first one warms up, and the last one is followed by an evaluation
EXPLORED = (1, 2)  # denoising steps of a rollout that are trained
SETTINGS: dict[str, Any] = {
    "algorithm": "aegpo",
    "exploration": {"rule": "window"},
    "sampler": {"steps": 20},
    "allocation": {"rule": "uniform"},
    "steps": STEPS,
    "prompts_per_step": 16,
    "rollouts_per_step": 96,
    "optimizer": {"micro_batch": 6},
    "eval_every": 0,
    "eval_images": 1,
    "save_every": 100,
}


@dataclass
class Clock:
    """Notes when rollouts and updates of a step begin, and when the step ends."""

    rollouts: list[float] = field(default_factory=list)
    drawn: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)
    end: list[float] = field(default_factory=list)

    def begin(self, what: str, total: int) -> None:
        self.what, self.left = what, total
        if what != "rewards":
            (self.rollouts if what == "rollouts" else self.update).append(time.perf_counter())

    def advance(self, count: int) -> None:
        self.left -= count
        if self.left == 0 and self.what == "rollouts":
            self.drawn.append(time.perf_counter())

    def step(self, metrics: dict[str, Any]) -> None:
        if metrics["step"]:
            self.end.append(time.perf_counter())


def run(explored: int, seconds: float, elsewhere: bool) -> dict[str, Any]:
    """Median seconds of a step's parts, where an image takes the reward so long."""
    verifier, one_at_a_time = load("world"), threading.Lock()

    def judge(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Judgement:
        with one_at_a_time:
            time.sleep(seconds * len(images))
        return verifier.judge(images, prompts, metadata)

    panel = Panel({"world": (Reward("slow", judge, elsewhere=elsewhere), 1.0)}, Checks())
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = resolve(SETTINGS, {"exploration": {"k": explored}, "output_dir": folder})
        prompts, held_out = load_prompts("world", "train"), load_prompts("world", "eval")[:1]
        train(config, models.load(config.model), prompts, held_out, panel, Path(folder), clock)
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    began, later = np.array(clock.rollouts), slice(1, -1)
    return {
        "step": median((np.array(clock.end) - began)[later]),
        "rollouts": median((np.array(clock.drawn) - began)[later]),
        "update": median((np.array(clock.end) - np.array(clock.update))[later]),
        "rewards": [line["reward/mean"] for line in lines if "reward/mean" in line],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    code = {"commit": git("rev-parse", "HEAD"), "changed": git("status", "--porcelain", ".")}
    images, results, console = SETTINGS["rollouts_per_step"], {}, Console(width=100)
    for explored in EXPLORED:
        pairs = []
        for _ in range(asked.pairs):
            alone = run(explored, 0.0, elsewhere=False)
            seconds = alone["rollouts"] / images
            turn, overlapped = (run(explored, seconds, elsewhere) for elsewhere in (False, True))
            differ = float(np.abs(np.subtract(turn.pop("rewards"), overlapped.pop("rewards"))).max())
            pairs.append({"alone": alone, "in_turn": turn, "overlapped": overlapped, "rewards_differ": differ})
        ratios = [pair["in_turn"]["step"] / pair["overlapped"]["step"] for pair in pairs]
        title = f"{explored} of 20 steps explored: a step is {median(ratios):.2f} times as fast overlapped"
        table = Table("", "step, s", "rollouts, s", "update, s", title=title)
        for name in ("alone", "in_turn", "overlapped"):
            means = (median(pair[name][part] for pair in pairs) for part in ("step", "rollouts", "update"))
            table.add_row(name, *(f"{mean:.2f}" for mean in means))
        console.print(table)
        worst = max(pair["rewards_differ"] for pair in pairs)
        console.print(
            f"ratios {', '.join(f'{ratio:.2f}' for ratio in ratios)}; mean rewards differ by {worst:.2g} at most"
        )
        results[f"explored_{explored}"] = {"step_ratio": median(ratios), "ratios": ratios, "pairs": pairs}
    if asked.json:
        versions = {name: version(name) for name in ("aegpo", "torch", "diffusers")}
        about = code | {"versions": versions, "settings": SETTINGS, "results": results}
        asked.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
