"""How much faster two processes train than one, and what to expect of many.

python benchmarks/scaling.py [--pairs N] [--steps N] [--json FILE] [--simulate]

Training steps of the embedded model by one process and by two (gloo), each with one thread, for groups of equal and of
unequal size. Both take the same steps to the same numbers. Runs of both alternate; a ratio is of two neighbours, and
the median over the pairs is reported. The parts of a step are timed on the way.

Then a simulation of 8 to 1,024 GPUs, from times measured on one (gpu.json) and the dealing that the loop itself does:
plans with unequal groups are drawn, dealt by the loop's own functions, and each part takes as long as the process with
most of it. It is a calculation, not a measurement; what it assumes is printed with it.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from demo import git
from rich.console import Console
from rich.table import Table

from aegpo import models, train
from aegpo.adapt.allocation import allocate
from aegpo.config import resolve
from aegpo.data import load_prompts
from aegpo.display import Display
from aegpo.distributed import Team, shares
from aegpo.rewards.panel import Inquiry, load_panel

SETTINGS: dict[str, Any] = {
    "prompts_per_step": 30,
    "rollouts_per_step": 360,
    "eval_every": 0,
    "eval_images": 1,
}
GROUPS = {"uniform": {"algorithm": "flow-grpo"}, "uneven": {"algorithm": "aegpo"}}
PARTS = ("probe", "rollouts", "reward", "update", "all-reduce")


# ---------------------------------------------------------------- two processes beside one


def worker(out: Path, settings: dict[str, Any]) -> None:
    """Train, and let the first process write how long steps and their parts took."""
    torch.set_num_threads(1)
    team, spent = Team.join(), defaultdict(float)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*words: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*words, **named)
            finally:
                spent[name] += time.perf_counter() - began

        return call

    for name, function in {"probe": "probe", "rollouts": "collect", "update": "update"}.items():
        setattr(train, function, timed(name, getattr(train, function)))
    Inquiry.verdict = timed("reward", Inquiry.verdict)
    Team.add_up = timed("all-reduce", Team.add_up)
    with tempfile.TemporaryDirectory() as folder:
        config = resolve(settings, {"output_dir": folder})
        prompts, held_out = load_prompts("world", "train"), load_prompts("world", "eval")[:2]
        display, model = Display(config.steps, Console(quiet=True)), models.load(config.model)
        begun: list[float] = []

        def step(metrics: dict[str, Any]) -> None:
            begun.append(time.perf_counter())
            if metrics["step"] == 1:  # the first one warms up
                spent.clear()

        display.step = step
        train.train(config, model, prompts, held_out, load_panel(config), Path(folder), display, team=team)
        team.wait()
        if not team.is_first:
            return
        rewards = [json.loads(line).get("reward/mean") for line in (Path(folder) / "metrics.jsonl").open()]
        seconds = np.diff(begun)[1:-1]  # the last one is followed by an evaluation
        parts = {name: spent[name] / (config.steps - 1) for name in PARTS}
        out.write_text(json.dumps({"step": float(np.median(seconds)), "parts": parts, "rewards": rewards}))


def run(settings: dict[str, Any], processes: int) -> dict[str, Any]:
    """What `worker` found, in so many processes."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        out, started = Path(folder) / "out.json", []
        for rank in range(processes):
            alike = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "5000"}
            own |= {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
            command = [sys.executable, __file__, "--worker", str(out), json.dumps(settings)]
            started.append(subprocess.Popen(command, env=os.environ | alike | own))
        if any([process.wait() for process in started]):
            raise SystemExit("a process failed")
        return json.loads(out.read_text())


def measure(pairs: int, steps: int, console: Console) -> dict[str, Any]:
    """Pairs of runs by one and by two processes, for each kind of groups."""
    results: dict[str, Any] = {}
    for groups, algorithm in GROUPS.items():
        both = []
        for _ in range(pairs):
            one, two = (run(SETTINGS | algorithm | {"steps": steps}, processes) for processes in (1, 2))
            differ = max(abs((a or 0) - (b or 0)) for a, b in zip(one["rewards"], two["rewards"], strict=True))
            both.append({"one": one, "two": two, "speedup": one["step"] / two["step"], "rewards_differ": differ})
        ratios = [pair["speedup"] for pair in both]
        title = f"{groups} groups: {median(ratios):.2f} times as fast ({', '.join(f'{r:.2f}' for r in ratios)})"
        table = Table("processes", "step, s", *(f"{part}, s" for part in PARTS), title=title)
        for name in ("one", "two"):
            means = [median(pair[name]["parts"][part] for pair in both) for part in PARTS]
            table.add_row(name, *(f"{x:.3f}" for x in (median(pair[name]["step"] for pair in both), *means)))
        console.print(table)
        worst = max(pair["rewards_differ"] for pair in both)
        console.print(f"mean rewards differ by {worst:.1e} at most; update includes all-reduce")
        results[f"speedup_{groups}"] = median(ratios)
        results[groups] = both
    return results


# ---------------------------------------------------------------- many GPUs, calculated

GPU = json.loads((Path(__file__).parent / "results" / "gpu.json").read_text())["results"]["flow-grpo, compiled"]
GUIDED = 2  # evaluations of a guided prediction
STEPS, TRAINED = 10, 5  # denoising steps; those that a rollout is trained at
EVALUATION = GPU["rollouts"] / GPU["forwards"]["rollouts"]  # seconds, measured on one H100 at SD3.5-M's size, 512 px
ROW = GPU["update"] / GPU["rows"]  # seconds of a trained row, guided, there and back
GRADIENT = 75e6  # bytes: 18.8 million float32 numbers of the adapter of rank 32
LATENT = 16 * 64 * 64 * 4  # bytes
LINK, LATENCY = 20e9, 30e-6  # bytes a second for each GPU between machines of eight, and seconds a message takes
REWARD = 0.02  # seconds an image: a scorer of CLIP's size
ASSUMED = (
    f"an evaluation takes {EVALUATION * 1e3:.1f} ms and a trained row {ROW * 1e3:.0f} ms, both measured on one H100 "
    f"(gpu.json); rewards {REWARD * 1e3:.0f} ms an image, gradients {GRADIENT / 1e6:.0f} MB, {LINK / 1e9:.0f} GB/s a "
    f"GPU and {LATENCY * 1e6:.0f} us a message are assumed; {STEPS} denoising steps, {TRAINED} trained, one update; no "
    "overlap of work and traffic; no process is slower than another; evaluations and checkpoints left out"
)


def simulate(console: Console) -> dict[str, Any]:
    """Seconds of a step and its efficiency for 8 to 1,024 GPUs, beside one GPU with the same work."""
    results: dict[str, Any] = {"assumed": ASSUMED}
    table = Table(
        "GPUs", "prompts", "rollouts", "step, s", "probe", "rollouts", "reward", "update", "traffic", "of ideal"
    )
    table.title = "calculated, from one H100's times"
    for title, prompts_of in (("24 rollouts a GPU", lambda gpus: gpus), ("1,152 rollouts in all", lambda gpus: 48)):
        for gpus in (8, 16, 32, 64, 128, 256, 512, 1024):
            parts = _step(gpus, prompts_of(gpus))
            alone = _step(1, prompts_of(gpus))
            efficiency = sum(alone.values()) / gpus / sum(parts.values())
            shown = (f"{seconds:.2f}" for seconds in parts.values())
            rollouts = f"{24 * prompts_of(gpus):,}"
            table.add_row(
                f"{gpus:,}",
                f"{prompts_of(gpus):,}",
                rollouts,
                f"{sum(parts.values()):.2f}",
                *shown,
                f"{efficiency:.1%}",
            )
            results.setdefault(title, {})[str(gpus)] = parts | {"efficiency": efficiency}
        table.add_section()
    console.print(table)
    console.print(f"assumed: {ASSUMED}")
    return results


def _step(gpus: int, prompts: int) -> dict[str, float]:
    """Seconds of each part of a step: as long as the process takes that has most of it."""
    random = np.random.default_rng(0)
    groups = allocate(torch.from_numpy(random.random(prompts)), "median_split", 16, 32, 24 * prompts).tolist()
    owner = [p for p, count in enumerate(groups) for _ in range(count)]
    leaves = random.integers(0, STEPS - TRAINED, prompts)  # the rider of each prompt begins where it leaves the trunk
    first = [i == 0 or owner[i - 1] != owner[i] for i in range(len(owner))]
    cost = [STEPS + 1 - (int(leaves[p]) + 1 if is_first else 0) for p, is_first in zip(owner, first, strict=True)]
    dealt = shares(cost, gpus)
    drawn = max(sum(cost[i] - 1 for i in part) for part in dealt)
    images = max(len(part) for part in dealt)
    rows = -(-len(owner) * TRAINED // gpus)
    probed = -(-prompts // gpus) * STEPS
    ring = 2 * (gpus - 1) / gpus * GRADIENT / LINK + 2 * (gpus - 1) * LATENCY if gpus > 1 else 0.0
    moved = 3 * LATENT * rows * (gpus - 1) / gpus / LINK + (gpus - 1) * LATENCY
    return {
        "probe": probed * GUIDED * EVALUATION,
        "rollouts": drawn * GUIDED * EVALUATION,
        "reward": images * REWARD,
        "update": rows * ROW,
        "traffic": ring + moved,
    }


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return worker(Path(sys.argv[2]), json.loads(sys.argv[3]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--simulate", action="store_true", help="only calculate")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    code = {"commit": git("rev-parse", "HEAD"), "changed": git("status", "--porcelain", ".")}
    console = Console(width=120)
    results = {} if asked.simulate else measure(asked.pairs, asked.steps, console)
    results["simulation"] = simulate(console)
    if asked.json:
        versions = {name: version(name) for name in ("aegpo", "torch", "diffusers", "accelerate")}
        settings = SETTINGS | {"steps": asked.steps, "pairs": asked.pairs, "groups": GROUPS}
        asked.json.write_text(
            json.dumps(code | {"versions": versions, "settings": settings, "results": results}, indent=1)
        )


if __name__ == "__main__":
    main()
