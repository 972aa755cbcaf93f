"""What a training step costs as it grows: evaluations, seconds and memory against rollouts, prompts, tokens and layers.

python benchmarks/cost.py [--json FILE]

A step of `aegpo-paper` with an adapter: probe, rollouts, update. The network is Stable Diffusion 3's with random
weights, 128 wide, behind the embedded model's encoders and VAE; one size is varied at a time around BASE. Each point is
a process of its own that takes three steps: seconds are the fastest of the last two, memory is the peak above what the
loaded model took. An exponent is the slope of the line through the logarithms: 1 is in proportion, 0 free of charge.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from demo import git
from rich.console import Console
from rich.table import Table

BASE = {"rollouts": 48, "prompts": 4, "image tokens": 64, "layers": 4}
VARIED = {
    "rollouts": (24, 48, 96),
    "prompts": (2, 4, 8, 16),
    "image tokens": (16, 64, 256),
    "layers": (2, 4, 8),
}
COSTS = ("evaluations", "seconds", "MB")


def measure(size: dict[str, int]) -> dict[str, float]:
    """Three steps of this size, in this process."""
    import torch
    from diffusers import SD3Transformer2DModel
    from overhead import Silent

    from aegpo import models
    from aegpo.adapt.memory import Memory
    from aegpo.adapt.plan import make_plan
    from aegpo.config import Model, resolve
    from aegpo.data import draw, load_prompts
    from aegpo.models import load_pipeline
    from aegpo.rollout import collect
    from aegpo.signals import probe
    from aegpo.train import credit, update

    side = int(size["image tokens"] ** 0.5)
    with tempfile.TemporaryDirectory() as folder:
        pipe, _ = load_pipeline(Model())
        torch.manual_seed(0)
        known = dict(pipe.transformer.config) | {"num_layers": size["layers"], "pos_embed_max_size": 32}
        pipe.transformer = SD3Transformer2DModel.from_config(known)
        pipe.save_pretrained(folder)
        group = size["rollouts"] // size["prompts"]
        config = resolve(
            {
                "algorithm": "aegpo-paper",
                "model": {"path": folder, "resolution": side * 4, "dtype": "float32"},
                "prompts_per_step": size["prompts"],
                "rollouts_per_step": size["rollouts"],
                "allocation": {"low": max(2, group * 2 // 3), "high": max(2, group * 4 // 3)},
                "optimizer": {"updates": 1},
            }
        )
        model = models.load(config.model)
    del pipe
    Path("/proc/self/clear_refs").write_text("5")  # from here on the high-water mark counts anew
    batch = draw(load_prompts("world", "train"), config.prompts_per_step, 0, 0)
    memory, optimizer = Memory(), torch.optim.AdamW(model.trainable.values(), lr=1e-6)
    loaded, taken = memory_mb("VmRSS"), []
    for _ in range(3):
        began, before = time.perf_counter(), model.forwards
        conditions = model.encode([prompt.text for prompt in batch])
        signals, trunk = probe(model, batch, conditions, config, 0, memory)
        plan = make_plan(config, batch, signals, memory, model.sigmas(config.sampler.steps), 0)
        drawn = collect(model, batch, conditions, plan, config, 0, trunk)
        scores = torch.rand(len(drawn.group), generator=torch.Generator().manual_seed(0))
        advantage, taught = credit(config, scores, drawn.group, drawn.courses)
        rows = drawn.transitions.judged(advantage, taught)
        update(config, model, optimizer, rows, conditions, 0, Silent())
        taken.append((time.perf_counter() - began, model.forwards - before))
    return {
        "evaluations": taken[-1][1],
        "seconds": min(seconds for seconds, _ in taken[1:]),
        "MB": memory_mb("VmHWM") - loaded,
    }


def memory_mb(what: str) -> float:
    return int(Path("/proc/self/status").read_text().split(f"{what}:")[1].split()[0]) / 2**10


def slope(sizes: tuple[int, ...], costs: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--size", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.size:
        print(json.dumps(measure(json.loads(asked.size))))
        return
    code = {"commit": git("rev-parse", "HEAD"), "changed": git("status", "--porcelain", ".")}
    found: dict[str, Any] = {}
    table = Table("size", "from", "to", *(f"{cost}, exponent" for cost in COSTS), "seconds")
    for name, sizes in VARIED.items():
        points = []
        for size in sizes:
            words = [sys.executable, __file__, "--size", json.dumps(BASE | {name: size})]
            answer = subprocess.run(words, capture_output=True, text=True, check=True)
            points.append(json.loads(answer.stdout.splitlines()[-1]))
        exponents = {cost: slope(sizes, [point[cost] for point in points]) for cost in COSTS}
        found[name] = {"sizes": sizes, "points": points, "exponents": exponents}
        seconds = " ".join(f"{point['seconds']:.2f}" for point in points)
        shown = (f"{exponents[cost]:.2f}" for cost in COSTS)
        table.add_row(name, str(sizes[0]), str(sizes[-1]), *shown, seconds)
    Console(width=130).print(table)
    if asked.json:
        versions = {name: version(name) for name in ("aegpo", "torch", "diffusers", "peft")}
        about = code | {"versions": versions, "settings": {"base": BASE}}
        asked.json.write_text(json.dumps(about | {"results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
