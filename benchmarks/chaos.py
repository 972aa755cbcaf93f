"""A run that is killed again and again, and each time resumed, beside one that nobody disturbed: are they the same?

python benchmarks/chaos.py [--kills N] [--steps N] [--processes N] [--json FILE]

SIGKILL goes to `aegpo train` and to all that it started: a third of the kills at any moment, a third while a checkpoint
is being written, a third while a resumed run reads one and cuts its record. The reward draws random numbers, so the
state of everybody's generators counts too.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from demo import git
from rich.console import Console
from rich.table import Table
from safetensors import deserialize

from aegpo import world

SETTINGS: dict[str, Any] = {
    "algorithm": "aegpo",
    "prompts_per_step": 2,
    "rollouts_per_step": 10,
    "allocation": {"low": 3, "high": 7, "smoothing": 0.5},
    "sampler": {"steps": 5, "solver": "euler"},
    "exploration": {"rule": "entropy_peaks", "k": 2, "until": 4},
    "optimizer": {"micro_batch": 8, "ema": 0.9, "ema_every": 1, "decay": "linear"},
    "model": {"lora": {"rank": 8}},
    "eval_images": 1,
    "eval_every": 10,
    "save_every": 1,
}
HELD_OUT = 24  # every so many of the world's held-out prompts
REWARD = """
import random
from pathlib import Path
import numpy as np
import torch

def score(images, prompts):
    said = images.mean((1, 2, 3)) / 255 + 0.1 * (random.random() + torch.rand(len(images)).numpy())
    said += 0.1 * np.random.rand(len(images))
    Path(__file__).with_name("judged").touch()
    return said
"""
AIMS = ANY, WRITING, FIRST = "any moment", "a checkpoint's writing", "a resumed run's first moments"
TRAINING = 4.0  # seconds of training, at most, before a kill at any moment
PAUSE = 0.0005  # seconds between two looks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    code = {"commit": git("rev-parse", "HEAD"), "changed": git("status", "--porcelain", ".")}  # as when it begins
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        settings = SETTINGS | {"steps": asked.steps}
        results = torment(Path(folder), asked.kills, asked.processes, settings, partial(print, flush=True))
    results["seconds"] = time.monotonic() - began
    table = Table("killed while", "times")
    for where, count in results["where"].items():
        table.add_row(where, str(count))
    Console().print(table)
    same = "the same to the bit" if results["equal"] else f"NOT the same: {results['differs']}"
    Console().print(f"{results['kills']} kills, {results['steps_done_again']} steps done again; the runs are {same}")
    if asked.json:
        about = {name: version(name) for name in ("aegpo", "torch", "diffusers", "peft")}
        settings |= {"kills": asked.kills, "processes": asked.processes}
        content = code | {"versions": about, "settings": settings, "results": results}
        asked.json.write_text(json.dumps(content, indent=1) + "\n")
    sys.exit(not results["equal"])


def torment(
    folder: Path,
    kills: int,
    processes: int,
    settings: dict[str, Any],
    say: Callable[[str], None] = lambda line: None,
    seed: int = 0,
) -> dict[str, Any]:
    """Kill a run so many times, resume it each time, let it end, and see whether it is what it would have been.

    Args:
        folder: an empty one, to work in.
        kills: how many.
        processes: that train together.
        settings: of the runs.
        say: told of each kill.
        seed: of the moments.

    Returns:
        `kills`; `where` they fell, and what they were aimed at; `lost_before_a_checkpoint`: how often the run had to
        be started again; `steps_done_again`: steps that had their line of metrics and were done again; `equal`, and
        `differs`, what is not.
    """
    recipe = prepared(folder, settings)
    whole, run = folder / "whole", folder / "run"
    finish(command(recipe, whole, processes), folder / "whole.log")
    rng, where, aimed = random.Random(seed), Counter(), Counter()
    ready, again, lost = 5.0, 0, 0
    words = command(recipe, run, processes)
    while (count := sum(where.values())) < kills:
        aim = AIMS[count % len(AIMS)]
        began = time.monotonic()
        fell, loaded = killed(words, run, folder, aim, rng, ready)
        if not fell:
            raise SystemExit(f"the run ended after {count} kills; give it more steps")
        ready = loaded or ready
        where[fell] += 1
        aimed[aim] += 1
        newest, lines = last_checkpoint(run), line_count(run)
        lost += newest < 0
        again += max(0, lines - 1 - newest) if newest >= 0 else 0
        words = command(recipe, run, processes, resume=newest >= 0)
        say(f"{count + 1:>3}: {fell}, in step {newest + 1}, after {time.monotonic() - began:.1f} s; aimed at {aim}")
    finish(words, folder / "run.log")
    differs = differences(whole, run)
    return {
        "kills": sum(where.values()),
        "where": dict(where.most_common()),
        "aimed_at": dict(aimed),
        "lost_before_a_checkpoint": lost,
        "steps_done_again": again,
        "steps": settings["steps"],
        "equal": not differs,
        "differs": differs,
    }


def prepared(folder: Path, settings: dict[str, Any]) -> Path:
    """A recipe in the folder, with a reward and held-out prompts of its own."""
    (folder / "own.py").write_text(REWARD)
    held_out = world.held_out()[::HELD_OUT]
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    own = {"reward": f"{folder / 'own.py'}:score", "prompts": {"train": "world", "eval": str(folder / "eval.jsonl")}}
    recipe = folder / "chaos.yaml"
    recipe.write_text(json.dumps(settings | own))
    return recipe


def command(recipe: Path, run: Path, processes: int, resume: bool = False) -> list[str]:
    """The command that starts the run anew, or goes on with it."""
    how = ["--resume", "latest"] if resume else [str(recipe), "--overwrite"]
    several = ["--processes", str(processes)] if processes > 1 else []
    return [sys.executable, "-m", "aegpo.cli", "train", *how, *several, "--output-dir", str(run)]


def finish(words: list[str], log: Path) -> None:
    """Let a command end, well."""
    with log.open("w") as file:
        done = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, env=alike())
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}:\n{log.read_text()[-2000:]}")


def alike() -> dict[str, str]:
    """The environment of all runs: sums over other numbers of threads round otherwise."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


# ---------------------------------------------------------------- one kill


def killed(
    words: list[str], run: Path, folder: Path, aim: str, rng: random.Random, ready: float
) -> tuple[str, float | None]:
    """Start the command, kill it when it is time, and say at what it was, and after how long it trained, if it did.

    What it was at is empty where it ended before. `ready` is after how many seconds it will train, more or less.
    """
    log, loaded = folder / "run.log", None
    record, left, began, start = identity(run / "metrics.jsonl"), writing(run), time.time(), time.monotonic()
    with started(words, log) as process:
        if aim == ANY:
            moment = start + rng.uniform(0, ready + TRAINING)
            reached = until(process, lambda: time.monotonic() > moment)
        else:
            reached = until(process, lambda: trains(run, log, began))
            loaded = time.monotonic() - start
            for _ in range(rng.randint(1, 3) if aim == WRITING else 0):
                reached = until(process, lambda: not writing(run) - left)
                reached = reached and until(process, lambda: bool(writing(run) - left))
            time.sleep(rng.uniform(0, 0.03 if aim == WRITING else 0.5))
        if not reached or process.poll() is not None:
            return "", None
    return at_what(run, folder, log, began, record, left), loaded


def trains(run: Path, log: Path, began: float) -> bool:
    """Whether a run that was started then has gone on from a checkpoint, or has begun anew."""
    return "going on from" in log.read_text() or ((run / "config.yaml").exists() and changed(run) > began)


@contextmanager
def started(words: list[str], log: Path) -> Iterator[psutil.Popen]:
    """The process of a command; it and all that it started are killed at the end, and none of them is left."""
    with log.open("w") as file:
        process = psutil.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=alike())
    try:
        yield process
    finally:
        family = [*process.children(recursive=True), process] if process.poll() is None else []
        for one in family:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(family)


def until(process: psutil.Popen, holds: Callable[[], bool]) -> bool:
    """Wait until something holds; False where the process ended first."""
    while not holds():
        if process.poll() is not None:
            return False
        time.sleep(PAUSE)
    return True


def writing(run: Path) -> set[tuple[str, int]]:
    """What there is only while a checkpoint is written or an old one deleted: names, and what tells them apart."""
    found = set()
    for name in (".checkpoint-*.partial", ".checkpoint-*.old"):
        for path in run.glob(name):
            with suppress(FileNotFoundError):
                found.add((path.name, path.stat().st_ino))
    return found


def at_what(
    run: Path, folder: Path, log: Path, began: float, record: tuple[int, float] | None, left: set[tuple[str, int]]
) -> str:
    """What a killed run was at, from what it left.

    Args:
        run: its folder.
        folder: where its reward leaves a mark each time it has judged.
        log: what it printed.
        began: when it was started.
        record: the identity of its `metrics.jsonl` then, if there was one.
        left: what `writing` found then, of the kill before.
    """
    if not trains(run, log, began):
        return "loading"
    if fresh := writing(run) - left:
        return "writing a checkpoint" if any(name.endswith(".partial") for name, _ in fresh) else "deleting an old one"
    goes_on = "going on from" in log.read_text()
    if goes_on and identity(run / "metrics.jsonl") == record:
        return "reading a checkpoint"
    if any((run / name).exists() for name in (".weights", ".metrics.jsonl.partial")):
        return "writing weights" if (run / ".weights").exists() else "cutting the record"
    newest, lines = last_checkpoint(run), line_count(run)
    if newest < 0 and not lines:
        return "the first evaluation"
    if lines - 1 > newest:
        return "between a line and its checkpoint"
    judged = folder / "judged"
    if judged.exists() and judged.stat().st_mtime > max(began, (run / "metrics.jsonl").stat().st_mtime):
        return "update and evaluation"
    return "rollouts and rewards"


def changed(run: Path) -> float:
    return (run / "config.yaml").stat().st_mtime


def identity(file: Path) -> tuple[int, float] | None:
    """What tells a file from the one that takes its place, or from itself when it has grown."""
    return (file.stat().st_ino, file.stat().st_mtime) if file.exists() else None


def last_checkpoint(run: Path) -> int:
    """The step of the newest checkpoint; -1 where there is none."""
    return max((int(path.name.rpartition("-")[2]) for path in run.glob("checkpoint-*")), default=-1)


def line_count(run: Path) -> int:
    """How many whole lines of metrics there are."""
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


# ---------------------------------------------------------------- the same?


def differences(whole: Path, run: Path) -> list[str]:
    """What two finished runs have that is not alike to the bit, but for the seconds that they took."""
    found = ["metrics.jsonl"] if metrics(whole) != metrics(run) else []
    last = f"checkpoint-{last_checkpoint(whole)}"
    names = sorted({path.name for folder in (whole, run) for path in (folder / last).glob("*.safetensors")})
    for name in [*(f"{last}/{name}" for name in names), "pytorch_lora_weights.safetensors"]:
        one, other = whole / name, run / name
        if not (one.exists() and other.exists() and tensors(one) == tensors(other)):
            found.append(name)
    leftover = [path.name for path in run.glob(".*") if path.name != ".lock"]
    return found + leftover


def tensors(file: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """The tensors of a file, to the bit; its header may name the adapted layers in any order."""
    return {name: (one["dtype"], one["shape"], bytes(one["data"])) for name, one in deserialize(file.read_bytes())}


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


if __name__ == "__main__":
    main()
