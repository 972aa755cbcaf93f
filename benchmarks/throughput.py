"""How fast a training step is, beside Flow-GRPO's loop as it is published, on the same model, noise and trained rows.

python benchmarks/throughput.py [--json FILE] [--pairs N]

The loop beside it is `reference_loop.py`: rows of one denoising step in a forward, every rollout's prompt encoded by
itself, the forward of each trained row computed twice. Ours are `collect` and `update`. Both draw from the same noises
and train the same adapter of the embedded model at nine of ten steps; that their gradients are equal is checked first,
and each takes the micro-batch that is fastest for it. Steps take turns within one run, and what counts is the median
ratio of a pair. Where graphs are kept the forward of a trained row is that of its rollout, so the update is the way
back alone: the whole step says what that is worth. Peak memory is that of a process that does nothing else.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import reference_loop
import torch
from demo import git
from overhead import Silent, peak_mb, synchronize
from peft.tuners.lora import Linear as LoraLinear
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from aegpo import models, rewards
from aegpo.adapt.memory import Memory
from aegpo.adapt.plan import make_plan
from aegpo.config import Config, resolve
from aegpo.data import draw, load_prompts
from aegpo.rollout import ROLLOUT, collect, noise
from aegpo.train import credit, update

MICRO_BATCHES = (24, 48, 96, 864) if torch.cuda.is_available() else (24, 48, 96)
SETTINGS: dict[str, Any] = {
    "algorithm": "flow-grpo",
    "model": {"train": "lora", "dtype": "float32"},
    "prompts_per_step": 8,
    "rollouts_per_step": 96,
    "loss": {"kl": 0.0},
    "optimizer": {"updates": 1, "keep_graphs": True},
}
KINDS = ("reference", "ours", "ours, graphs not kept")


class Step:
    """A training step of either kind that can be taken again and again."""

    def __init__(self, micro_batch: int, kind: str) -> None:
        self.config: Config = resolve(SETTINGS, {"optimizer": {"micro_batch": micro_batch}})
        self.model: Any = models.load(self.config.model)
        if kind == "reference":  # the adapter as peft computes it
            for module in self.model.network.modules():
                if isinstance(module, LoraLinear):
                    vars(module).pop("forward", None)
        with torch.no_grad():  # past the point where half of an adapter's gradient is zero
            for i, parameter in enumerate(self.model.trainable.values()):
                parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)).to(
                    parameter
                )
        self.batch = draw(load_prompts("world", "train"), self.config.prompts_per_step, 0, 0)
        self.sigmas = self.model.sigmas(self.config.sampler.steps)
        self.group = self.config.rollouts_per_step // self.config.prompts_per_step
        self.asked = [prompt for prompt in self.batch for _ in range(self.group)]
        self.reward = rewards.load("world")
        self.optimizer = torch.optim.AdamW(self.model.trainable.values(), lr=1e-6)

    def take(self, kind: str) -> dict[str, Any]:
        """Seconds of rollouts and of the update; the gradients, before they are shortened; what was evaluated."""
        before = self.model.forwards
        taken = self.reference() if kind == "reference" else self.ours(kind)
        return taken | {"forwards": self.model.forwards - before}

    def judge(self, images: np.ndarray) -> Tensor:
        """The rewards; some noise of their own lets every group differ."""
        texts, about = [p.text for p in self.asked], [p.metadata for p in self.asked]
        scores = torch.from_numpy(self.reward.judge(images, texts, about).score)
        return scores + 0.01 * torch.randn(len(scores), generator=torch.Generator().manual_seed(0))

    def reference(self) -> dict[str, Any]:
        began = time.perf_counter()
        sampler, device = self.config.sampler, self.model.device
        keys = [(ROLLOUT, 0, 0, p.id, i) for p in self.batch for i in range(self.group)]

        @cache
        def drawn_noise(number: int) -> Tensor:
            return torch.stack([noise(self.model.latent_shape, *key, number) for key in keys]).to(device)

        def encode(prompts: list[str]) -> tuple[Tensor, Tensor]:
            embeds, _, pooled, _ = self.model.pipe.encode_prompt(
                prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=0, device=device
            )
            return embeds, pooled

        drawn = reference_loop.sample(
            self.model.pipe,
            encode,
            [prompt.text for prompt in self.asked],
            drawn_noise(0),
            lambda step: drawn_noise(step + 1),
            self.sigmas,
            sampler.eta,
            self.config.optimizer.micro_batch,
        )
        scores = self.judge(np.concatenate([samples.images for samples in drawn]))
        synchronize()
        drew = time.perf_counter()
        self.optimizer.zero_grad()
        advantage = reference_loop.advantages(scores, self.group).to(device)
        ratios = list(reference_loop.update(self.model.pipe, drawn, advantage, self.sigmas, sampler.eta, 1e-4))
        nn.utils.clip_grad_norm_(self.model.trainable.values(), 1.0)
        gradient = [p.grad.clone() for p in self.model.trainable.values()]
        self.optimizer.step()
        worst = float((torch.cat(ratios) - 1).abs().max())
        return {"rollouts": drew - began, "update": time.perf_counter() - drew, "gradient": gradient, "ratio": worst}

    def ours(self, kind: str) -> dict[str, Any]:
        began = time.perf_counter()
        kept = replace(self.config.optimizer, keep_graphs=kind != "ours, graphs not kept")
        config = replace(self.config, optimizer=kept)
        conditions = self.model.encode([prompt.text for prompt in self.batch])
        plan = make_plan(config, self.batch, None, Memory(), self.sigmas, 0)
        drawn = collect(self.model, self.batch, conditions, plan, config, 0)
        scores = self.judge(drawn.images)
        synchronize()
        drew = time.perf_counter()
        advantage, taught = credit(config, scores, drawn.group, drawn.courses)
        rows = drawn.transitions.judged(advantage, taught)
        learned = update(config, self.model, self.optimizer, rows, conditions, 0, Silent(), drawn.kept)
        gradient = [p.grad.clone() for p in self.model.trainable.values()]
        worst = learned["ratio/first_error"]
        return {"rollouts": drew - began, "update": time.perf_counter() - drew, "gradient": gradient, "ratio": worst}


def gradient_error() -> float:
    """The largest difference of a gradient from the reference loop's over the largest one, in the worst weight."""
    gradients = {kind: Step(96, kind).take(kind)["gradient"] for kind in KINDS}
    return max(
        float((own - other).abs().max() / other.abs().max())
        for kind in KINDS[1:]
        for own, other in zip(gradients[kind], gradients["reference"], strict=True)
    )


def seconds(taken: dict[str, Any]) -> float:
    return taken["rollouts"] + taken["update"]


def peak(kind: str, micro_batch: int) -> float:
    """Peak memory in MB of a process of its own that takes two steps."""
    words = [sys.executable, __file__, "--peak", kind, str(micro_batch)]
    return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-1])


def measure_peak(kind: str, micro_batch: int) -> float:
    step = Step(micro_batch, kind)
    for _ in range(2):
        step.take(kind)
    return peak_mb()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pairs", type=int, default=9, help="of steps, in each row")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.peak:
        print(measure_peak(asked.peak[0], int(asked.peak[1])))
        return
    code = {"commit": git("rev-parse", "HEAD"), "changed": git("status", "--porcelain", ".")}
    error = gradient_error()
    steps, fastest, trials = {}, {}, {}
    for kind in KINDS:
        tried = {micro_batch: Step(micro_batch, kind) for micro_batch in MICRO_BATCHES}
        trials[kind] = {size: min(seconds(step.take(kind)) for _ in range(3)) for size, step in tried.items()}
        fastest[kind] = min(trials[kind], key=trials[kind].__getitem__)
        steps[kind] = tried[fastest[kind]]
    rows: dict[str, Any] = {}
    for kind in KINDS[1:]:
        updates, wholes, forwards = [], [], {}
        for i in range(asked.pairs):
            order = ("reference", kind) if i % 2 else (kind, "reference")
            taken = {one: steps[one].take(one) for one in order}
            updates.append(taken["reference"]["update"] / taken[kind]["update"])
            wholes.append(seconds(taken["reference"]) / seconds(taken[kind]))
            forwards = {"ours": taken[kind]["forwards"], "ratio/first_error": taken[kind]["ratio"]}
        rows[kind] = {
            "update_ratio": float(np.median(updates)),
            "update_quartiles": np.quantile(updates, [0.25, 0.75]).tolist(),
            "step_ratio": float(np.median(wholes)),
            "step_quartiles": np.quantile(wholes, [0.25, 0.75]).tolist(),
            "micro_batch": fastest[kind],
            **forwards,
        }
    peaks = {kind: peak(kind, fastest[kind]) for kind in KINDS}
    results = {
        "update_ratio": rows["ours"]["update_ratio"],
        "step_ratio": rows["ours"]["step_ratio"],
        "gradient_error": error,
        "micro_batch": {"fastest": fastest, "seconds": trials},
        "peak_mb": peaks,
        "rows": rows,
    }
    table = Table("step", "whole step, times as fast", "quartiles", "update", "quartiles", "micro-batch", "peak, MB")
    for kind, row in rows.items():
        spans = (" ".join(f"{value:.2f}" for value in row[f"{part}_quartiles"]) for part in ("step", "update"))
        ratios = (f"{row[f'{part}_ratio']:.2f}" for part in ("step", "update"))
        cells = [cell for pair in zip(ratios, spans, strict=True) for cell in pair]
        table.add_row(kind, *cells, str(row["micro_batch"]), f"{peaks[kind]:.0f}")
    Console(width=130).print(table)
    print(f"gradients differ by {error:.1e}; the reference loop: micro-batch {fastest['reference']}", end=", ")
    print(f"peak {peaks['reference']:.0f} MB")
    if asked.json:
        versions = {name: version(name) for name in ("aegpo", "torch", "diffusers", "peft")}
        gpu = torch.cuda.is_available()
        device = torch.cuda.get_device_name() if gpu else f"cpu, {torch.get_num_threads()} threads"
        about = code | {"versions": versions, "settings": SETTINGS | {"device": device, "pairs": asked.pairs}}
        asked.json.write_text(json.dumps(about | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
