"""A run's `metrics.jsonl`: one object a training step, and what of a step is worth writing down."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from aegpo.types import Plan, Signals


def write(run: Path, metrics: dict[str, Any]) -> None:
    """Append one line."""
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(metrics) + "\n")


def cut(run: Path, step: int) -> None:
    """Drop the lines of later steps, and a half-written last one: the run goes on from after `step`."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    aside = path.with_suffix(".partial")
    aside.write_text("".join(kept), encoding="utf-8")
    aside.replace(path)


def describe(plan: Plan, signals: Signals | None, scores: Tensor, advantage: Tensor) -> dict[str, Any]:
    """What a step's plan was, and what it brought, as plain numbers."""
    group = plan.group
    silent = len(plan.rollouts) - len(group[advantage != 0].unique())
    metrics = {
        "reward/mean": scores.mean().item(),
        "reward/std": scores.std(correction=0).item(),
        "allocation": plan.rollouts.tolist(),
        "explored_steps": (plan.explored * plan.rollouts[:, None]).sum(0).tolist(),
        "zero_advantage_groups": silent,
    }
    if signals is not None:
        metrics |= {
            "entropy": signals.entropy.mean(0).tolist(),
            "delta_entropy": (signals.entropy - signals.base_entropy).mean(0).tolist(),
            "entropy/mean": signals.entropy.mean().item(),
            "delta_entropy/mean": signals.delta_entropy.mean().item(),
        }
    return metrics
