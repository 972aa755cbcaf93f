"""Does the change of attention entropy say which prompts have something to teach? By reading and by layer.

python benchmarks/which_prompts.py [--json FILE] [--seeds 1 2 3] [--algorithm aegpo-fast]

The embedded model trains on 96 prompts, all with the same number of rollouts. Before, at EARLY and at LATE, eight
images of each prompt are drawn from the same noise and judged, which gives its mean reward and the spread of reward
inside its group. At EARLY the entropy of every layer is read under the policy and under the base, for every choice of
queries and keys. What is shown are rank correlations over the prompts, mean and standard error over the seeds: of |dH|
with the spread at EARLY (what allocation is for: an image more where images differ), with what is still to be gained
(one minus the reward), with the gain so far and with the gain to come. The spread of the group before is beside them.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo import git
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from trial import training_prompts

from aegpo import models, rewards
from aegpo.config import resolve
from aegpo.evaluation import draw_and_judge
from aegpo.rewards.panel import alone
from aegpo.signals import entropy_curves
from aegpo.train import train

EARLY, LATE, IMAGES, PROMPTS = 12, 36, 8, 96
READINGS = [("image", "all"), ("image", "text"), ("image", "image"), ("text", "all"), ("all", "all")]
SETTINGS: dict[str, Any] = {
    "model": {"train": "full", "dtype": "float32"},
    "prompts_per_step": 8,
    "rollouts_per_step": 64,
    "allocation": {"rule": "uniform"},
    "optimizer": {"lr": 2e-4, "betas": [0.9, 0.99], "micro_batch": 96},
    "steps": LATE,
    "eval_every": 0,
    "eval_images": 1,
    "save_every": LATE,
}
TARGETS = ("spread", "left to gain", "gain so far", "gain to come")


def measure(algorithm: str, seed: int) -> dict[str, dict[str, float]]:
    """Rank correlations of each signal with each target, over the prompts of one run."""
    with tempfile.TemporaryDirectory() as folder:
        config = resolve({"algorithm": algorithm}, SETTINGS, {"seed": seed, "output_dir": folder})
        prompts, reward, model = training_prompts(PROMPTS), alone(rewards.load("world")), models.load(config.model)
        conditions, judged_as = model.encode([p.text for p in prompts]), replace(config, eval_images=IMAGES)
        scores: dict[int, np.ndarray] = {}
        changes: dict[str, np.ndarray] = {}

        class Reader:
            def begin(self, what: str, total: int) -> None: ...

            def advance(self, count: int) -> None: ...

            def step(self, metrics: dict[str, Any]) -> None:
                if metrics["step"] in (0, EARLY, LATE):
                    judged = draw_and_judge(judged_as, model, prompts, reward)[2]
                    scores[metrics["step"]] = judged.score.reshape(PROMPTS, IMAGES)
                if metrics["step"] == EARLY:
                    for queries, keys in READINGS:
                        reads = replace(config, probe=replace(config.probe, queries=queries, keys=keys))
                        now, _ = entropy_curves(model, prompts, conditions, reads)
                        with model.reference():
                            base, _ = entropy_curves(model, prompts, conditions, reads)
                        moved = (now - base).numpy()  # (layers, P, N)
                        name = f"{queries} to {keys}"
                        changes[name] = np.abs(moved.mean((0, 2)))
                        changes[f"{name}, step by step"] = np.abs(moved.mean(0)).mean(1)
                        if (queries, keys) in READINGS[:2]:
                            for layer, own_moved in enumerate(moved):
                                changes[f"{name}, layer {layer}"] = np.abs(own_moved.mean(1))

        train(config, model, prompts, prompts[:1], reward, Path(folder), Reader())
    mean = {step: score.mean(1) for step, score in scores.items()}
    targets = dict(
        zip(
            TARGETS,
            (scores[EARLY].std(1), 1 - mean[EARLY], mean[EARLY] - mean[0], mean[LATE] - mean[EARLY]),
            strict=True,
        )
    )
    changes["spread of the group before"] = scores[0].std(1)

    def correlation(a: np.ndarray, b: np.ndarray) -> float:
        found: Any = spearmanr(a, b)
        return float(found.statistic)

    return {
        name: {target: correlation(change, value) for target, value in targets.items()}
        for name, change in changes.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--algorithm", default="aegpo-fast")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    code = {"commit": git("rev-parse", "HEAD"), "changed": git("status", "--porcelain", ".")}
    found = {seed: measure(asked.algorithm, seed) for seed in asked.seeds}
    table = Table("signal", *TARGETS)
    for name in found[asked.seeds[0]]:
        cells = []
        for target in TARGETS:
            values = np.array([found[seed][name][target] for seed in asked.seeds])
            cells.append(f"{values.mean():+.2f} ± {values.std(ddof=1) / len(values) ** 0.5:.2f}")
        table.add_row(name, *cells)
    Console(width=130).print(table)
    if asked.json:
        versions = {name: version(name) for name in ("aegpo", "torch", "diffusers", "peft")}
        about = code | {"versions": versions, "settings": SETTINGS | {"algorithm": asked.algorithm}}
        asked.json.write_text(json.dumps(about | {"results": {"correlations": found}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
