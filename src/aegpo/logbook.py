"""What a run writes down as it goes: `metrics.jsonl`, one object a training step, and its weights."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from aegpo import disk
from aegpo.types import Plan, Rollouts, Signals, Transitions, Verdict

ASIDE = "not-finite"  # where rows stand whose loss or gradient was not finite


def write(run: Path, metrics: dict[str, Any]) -> None:
    """Append one line, which is on the disk on return."""
    disk.append(run / "metrics.jsonl", json.dumps(metrics))


def cut(run: Path, step: int) -> None:
    """Drop the lines and samples of later steps, and a half-written last line: the run goes on from after `step`."""
    for sample in (run / "samples").glob("step-*"):
        number = sample.stem.removeprefix("step-")
        if number.isdecimal() and int(number) > step:
            sample.unlink()
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    disk.write(path, "".join(kept).encode())


def put(run: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder, and move what it wrote into the run's, so that no file there is ever half written."""
    aside = run / ".weights"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        with disk.writing(aside):
            write(aside)
        disk.sync_all(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for item in aside.iterdir():
        target = run / item.name
        if target.is_dir():
            shutil.rmtree(target)
        if item.is_file():
            item.chmod(0o644)  # safetensors writes for its user alone
        item.replace(target)
    aside.rmdir()
    disk.sync(run)


def keep_aside(run: Path, step: int, process: int, prompts: Sequence[str], number: int, rows: Transitions) -> None:
    """Keep the rows of an optimizer step that was not taken, to look into, with their prompts in the file's header.

    Args:
        run: the run's folder.
        step: the training step.
        process: which of the processes trained them.
        prompts: of the step.
        number: of the optimizer step in the training step.
        rows: m of them.
    """
    folder = run / ASIDE
    folder.mkdir(parents=True, exist_ok=True)  # it may be on another machine than the run's
    tensors = {name: tensor.contiguous() for name, tensor in vars(rows).items()}
    file = folder / f"step-{step:06d}-update-{number}-process-{process}.safetensors"
    with disk.writing(file):
        save_file(tensors, file, metadata={"prompts": json.dumps(list(prompts))})


def fingerprint(*settings: Any) -> str:
    """A short name for settings, to see whether they are still the same."""
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]


def describe(
    plan: Plan, rollouts: Rollouts, signals: Signals | None, verdict: Verdict, advantage: Tensor
) -> dict[str, Any]:
    """What a step's plan was, and what it brought, as plain numbers; `advantage` is (n, N)."""
    silent = len(plan.rollouts) - len(rollouts.group[(advantage != 0).any(1)].unique())
    scores = verdict.score[verdict.kept]
    metrics = {
        "reward/mean": float(scores.mean()) if len(scores) else None,
        "reward/std": float(scores.std()) if len(scores) else None,
        "dropped_groups": len(rollouts.group[torch.from_numpy(~verdict.kept)].unique()),
        "allocation": plan.rollouts.tolist(),
        "explored_steps": rollouts.courses.explored.sum(0).tolist(),
        "zero_advantage_groups": silent,
    }
    for name, said in verdict.parts.items() if len(verdict.parts) > 1 else ():
        finite = said.score[verdict.kept & np.isfinite(said.score)]
        metrics[f"reward/{name}/mean"] = float(finite.mean()) if len(finite) else None
        metrics[f"reward/{name}/std"] = float(finite.std()) if len(finite) else None
    if signals is not None:
        metrics |= {
            "entropy": signals.entropy.mean(0).tolist(),
            "delta_entropy": (signals.entropy - signals.base_entropy).mean(0).tolist(),
            "entropy/mean": signals.entropy.mean().item(),
            "delta_entropy/mean": signals.delta_entropy.mean().item(),
        }
    return metrics
