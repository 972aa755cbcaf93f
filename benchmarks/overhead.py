"""What the probe costs: a training step with it against the same rollouts and trained transitions without it.

python benchmarks/overhead.py [--json FILE] [--pairs N]

Both do the same plan: rollouts, reward, update. One probes first, and lets rollouts begin where the probe has been. The
other has no trunk: each rollout is drawn from a first latent of its own, which costs what it costs from a shared one. A
row of its own sets the probe beside a trunk that is walked without reading, as `sampler.shared_noise` does it where no
rule asks for entropy. Steps take turns within one run, and what counts is the median ratio of a pair. The update is the
same computation in both steps of a pair, and counts in both with their mean time. The base policy's
entropies are known by then, as they are from a prompt's second visit on; what the first visit costs is a row too. What
measuring the spread of reward costs, every tenth step under `aegpo`, is no part of this (`--dry-run` says it). Peak
memory is that of a process that does nothing else.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo import git
from rich.console import Console
from rich.table import Table

from aegpo import models, rewards
from aegpo.adapt.memory import Memory
from aegpo.adapt.plan import make_plan
from aegpo.algorithms import merge
from aegpo.config import Config, resolve
from aegpo.data import draw, load_prompts
from aegpo.rewards.panel import alone
from aegpo.rollout import collect, shared_trunk
from aegpo.signals import probe, reward_spread
from aegpo.train import credit, update
from aegpo.types import Plan, Signals

PAPER = {
    "time": 1.11,
    "memory": 1.03,
}  # FLUX.1-dev on DanceGRPO: 469 -> 521 s a step, 33.5 -> 34.5 GB (arXiv 2602.06825)
COMMON = {
    "prompts_per_step": 48,  # of a step as Flow-GRPO publishes it (arXiv 2505.05470)
    "rollouts_per_step": 576,  # 12 a prompt in the mean, as AEGPO's 8 and 16 make it
    "allocation": {"rule": "median_split"},
    "optimizer": {"micro_batch": 96},
}
FEW = {"prompts_per_step": 8, "rollouts_per_step": 96}  # of a step of the embedded model's own recipe
# `aegpo` without leaving out steps, as the published figures have it.
ALL_STEPS = {"algorithm": "aegpo", "sampler": {"solver": "euler", "compress": 1.0}, "optimizer": {"updates": 2}}
SETTINGS: dict[str, dict[str, Any]] = {
    "aegpo-paper": {"algorithm": "aegpo-paper"},
    "aegpo-paper, trunk shared": {"algorithm": "aegpo-paper", "sampler": {"shared_noise": True}},
    "aegpo": ALL_STEPS,
    "aegpo, trunk shared": merge(ALL_STEPS, {"sampler": {"shared_noise": True}}),
    "aegpo-paper, 8 prompts": {"algorithm": "aegpo-paper"} | FEW,
    "aegpo-paper, 8 prompts, trunk shared": {"algorithm": "aegpo-paper", "sampler": {"shared_noise": True}} | FEW,
    "aegpo, 8 prompts": ALL_STEPS | FEW,
    "aegpo, 8 prompts, trunk shared": merge(ALL_STEPS, {"sampler": {"shared_noise": True}}) | FEW,
    "matching, all weights, 8 prompts": {
        "sampler": {"kind": "ode"},
        "exploration": {"rule": "random"},
        "model": {"train": "full"},
        "loss": {"kl": 0.08, "clip_low": 0.1, "clip_high": 0.1},
        "optimizer": {"updates": 4},
    }
    | FEW,
}


class Step:
    """A training step that can be taken again and again, with and without the probe."""

    def __init__(self, name: str, plan: Plan | None = None) -> None:
        self.config: Config = resolve(COMMON, SETTINGS[name])
        self.model = models.load(self.config.model)
        self.reward = rewards.load("world")
        self.batch = draw(load_prompts("world", "train"), self.config.prompts_per_step, 0, 0)
        self.conditions = self.model.encode([prompt.text for prompt in self.batch])
        self.memory = Memory()
        self.optimizer = torch.optim.AdamW(self.model.trainable.values(), lr=1e-6)
        self.plan = self.made() if plan is None else plan

    def made(self) -> Plan:
        """The plan that the probe gives once the prompts have moved, each by its own."""
        signals, trunk = self.probe()
        if self.config.exploration.rule == "reward_spread":
            given = (self.model, self.batch, self.conditions, alone(self.reward), self.config)
            self.memory.reward_spread = reward_spread(*given, step=0, visit=0, trunk=trunk)
        moved = Signals(signals.entropy + 0.01 * torch.arange(len(self.batch))[:, None], signals.base_entropy)
        return make_plan(self.config, self.batch, moved, self.memory, self.model.sigmas(self.config.sampler.steps), 0)

    def probe(self) -> Any:
        return probe(self.model, self.batch, self.conditions, self.config, 0, self.memory)

    def take(self, how: str) -> tuple[float, float, int]:
        """Seconds of drawing and of the update, and network evaluations x samples."""
        began, before = time.perf_counter(), self.model.forwards
        match how:
            case "probed":
                trunk = self.probe()[1]
            case "first visit":
                self.memory = Memory()
                trunk = self.probe()[1]
            case "walked":
                trunk = shared_trunk(self.model, self.batch, self.conditions, self.plan, self.config, 0, 0)
            case _:
                trunk = None
        drawn = collect(self.model, self.batch, self.conditions, self.plan, self.config, 0, trunk)
        asked = [self.batch[i] for i in drawn.group.tolist()]
        judged = self.reward.judge(drawn.images, [p.text for p in asked], [p.metadata for p in asked])
        synchronize()
        drew = time.perf_counter()
        advantage, taught = credit(self.config, torch.from_numpy(judged.score), drawn.group, drawn.courses)
        rows = drawn.transitions.judged(advantage + 1e-3, taught)  # none is left out
        update(self.config, self.model, self.optimizer, rows, self.conditions, 0, Silent())
        synchronize()
        return drew - began, time.perf_counter() - drew, self.model.forwards - before


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Silent:
    def begin(self, what: str, total: int) -> None: ...

    def advance(self, count: int) -> None: ...

    def step(self, metrics: dict[str, Any]) -> None: ...


def pairs(name: str, count: int, one: str = "probed", other: str = "plain") -> dict[str, Any]:
    """Ratios of so many pairs, each in the other order than the one before; a pair for warming up comes first."""
    step, ratios, forwards = Step(name), [], [0, 0]
    for i in range(count + 1):
        taken = {how: step.take(how) for how in ((one, other) if i % 2 else (other, one))}
        forwards = [taken[how][2] for how in (one, other)]
        update = np.mean([taken[how][1] for how in (one, other)])
        ratios.append((taken[one][0] + update) / (taken[other][0] + update))
    low, median, high = np.quantile(ratios[1:], [0.25, 0.5, 0.75])
    return {
        "time_ratio": median,
        "quartiles": [low, high],
        "pairs": count,
        "forwards_ratio": forwards[0] / forwards[1],
        "forwards": forwards,
        "first_explored_step": step.plan.explored.int().argmax(1).double().mean().item(),
    }


def peak(name: str, how: str, plan: Plan) -> float:
    """Peak memory in MB of a process of its own that takes two steps."""
    given = json.dumps(
        {"rollouts": plan.rollouts.tolist(), "explored": plan.explored.tolist(), "weight": plan.weight.tolist()}
    )
    words = [sys.executable, __file__, "--peak", name, how, given]
    return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-1])


def measure_peak(name: str, how: str, given: str) -> float:
    step = Step(name, Plan(**{key: torch.tensor(value) for key, value in json.loads(given).items()}))
    for _ in range(2):
        step.take(how)
    return peak_mb()


def peak_mb() -> float:
    """Peak memory of this process so far, or of the GPU if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")  # getrusage would give the peak of the parent, where that was larger
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # of macOS, in bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pairs", type=int, default=9, help="of steps, in each row")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.peak:
        print(measure_peak(*asked.peak))
        return
    code = {"commit": git("rev-parse", "HEAD"), "changed": git("status", "--porcelain", ".")}
    rows = {name: pairs(name, asked.pairs) for name in SETTINGS}
    rows["aegpo-paper, trunk shared, beside a walked one"] = pairs(
        "aegpo-paper, trunk shared", asked.pairs, other="walked"
    )
    rows["aegpo-paper, first visit"] = pairs("aegpo-paper", asked.pairs, one="first visit")
    plan = Step("aegpo-paper").plan
    peaks = {how: float(np.median([peak("aegpo-paper", how, plan) for _ in range(3)])) for how in ("probed", "plain")}
    results = {
        "time_ratio_rows": rows["aegpo-paper"]["time_ratio"],
        "time_ratio_trunk": rows["aegpo-paper, trunk shared"]["time_ratio"],
        "memory_ratio": peaks["probed"] / peaks["plain"],
        "peak_mb": peaks,
        "paper": PAPER,
        "rows": rows,
    }
    table = Table("step", "time with / without", "quartiles", "evaluations with / without", "first explored step, mean")
    for name, row in rows.items():
        low, high = row["quartiles"]
        table.add_row(
            name,
            f"{row['time_ratio']:.3f}",
            f"{low:.3f} {high:.3f}",
            f"{row['forwards_ratio']:.3f}",
            f"{row['first_explored_step']:.1f}",
        )
    table.add_row("the paper's own, FLUX.1-dev", f"{PAPER['time']:.2f}", "", "", "")
    Console(width=130).print(table)
    print(f"peak memory {peaks['probed']:.0f} / {peaks['plain']:.0f} MB = {results['memory_ratio']:.4f}", end="; ")
    print(f"the paper's own: {PAPER['memory']:.2f}")
    if asked.json:
        versions = {name: version(name) for name in ("aegpo", "torch", "diffusers", "peft")}
        device = (
            torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
        )
        about = code | {"versions": versions, "settings": {"common": COMMON, "device": device}}
        asked.json.write_text(json.dumps(about | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
