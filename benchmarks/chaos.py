"""A run that is killed again and again, beside one that is left alone.

python benchmarks/chaos.py [--kills N] [--steps N] [--processes N] [--json FILE]

A small run of the embedded model is killed by SIGKILL, processes and all, and resumed from its latest checkpoint, until
it was killed so often; then it may end. Kills are aimed in turn: at any moment from the start on, as soon as a
checkpoint is being written, as soon as a line of metrics is, and while the run goes back. Metrics (but for
`seconds`) and the last checkpoint's tensors have to be those of the undisturbed run, bit for bit.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from demo import git
from rich.console import Console
from rich.table import Table

SETTINGS: dict[str, Any] = {
    "algorithm": "aegpo",
    "prompts_per_step": 2,
    "rollouts_per_step": 8,
    "allocation": {"low": 2, "high": 6, "smoothing": 0.5},
    "sampler": {"steps": 4, "solver": "euler", "compress": 1.0},
    "exploration": {"rule": "entropy_peaks", "k": 2},
    "optimizer": {"micro_batch": 8, "updates": 2, "ema": 0.9, "ema_every": 1},
    "model": {"lora": {"rank": 4}},
    "eval_every": 50,
    "eval_images": 1,
}
AIMS = ("anywhere", "checkpoint", "line", "return")
LOADING = 8.0  # seconds that a run takes to begin, about: kills `anywhere` fall within these and two more


def begin(run: Path, words: list[str], processes: int) -> psutil.Popen:
    """Start `aegpo train`, silently."""
    command = [sys.executable, "-m", "aegpo.cli", "train", *words, "--output-dir", str(run)]
    command += ["--processes", str(processes)] if processes > 1 else []
    alike = os.environ | {"OMP_NUM_THREADS": "1"}
    out = (run.parent / "out.txt").open("ab")
    return psutil.Popen(command, stdout=out, stderr=out, env=alike)


def kill(process: psutil.Popen) -> None:
    """SIGKILL to it and all that it started, of which none is left on return."""
    family = [*process.children(recursive=True), process]
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(family)


def newest(run: Path) -> int:
    """The step of the newest checkpoint, -1 without any."""
    return max((int(folder.name[11:]) for folder in run.glob("checkpoint-*")), default=-1)


def lines(run: Path) -> list[dict[str, Any]]:
    """The metrics, but for `seconds`."""
    file = run / "metrics.jsonl"
    whole = (
        [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")] if file.exists() else []
    )
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in whole]


def aim(how: str, run: Path, chance: random.Random) -> Callable[[], bool]:
    """A function that says whether the moment to kill has come."""
    began, before, wait = time.monotonic(), newest(run), chance.uniform(0, LOADING + 2)
    size = (run / "metrics.jsonl").stat().st_size if (run / "metrics.jsonl").exists() else 0
    more, seen = chance.randint(0, 4), set[str]()

    def come() -> bool:
        match how:
            case "anywhere":
                return time.monotonic() - began > wait
            case "checkpoint":
                seen.update(folder.name for folder in run.glob(".checkpoint-*.partial"))
                return len(seen) > more
            case "line":
                file = run / "metrics.jsonl"
                return newest(run) >= before + more and file.exists() and file.stat().st_size > size + 1000 * more
            case _:
                return newest(run) > before  # the first step after it went back

    return come


def fell(run: Path, before: int) -> str:
    """What a killed run was at, as its folder shows."""
    if any(run.glob(".checkpoint-*.partial")):
        return "writing a checkpoint"
    if any(run.glob(".*.partial")) or any(run.glob(".weights")) or any(run.glob(".checkpoint-*.old")):
        return "writing or deleting another file"
    last = lines(run)
    if last and last[-1]["step"] > newest(run):
        return "between a line and its checkpoint"
    return "loading" if newest(run) <= before else "drawing or training"


def chaos(folder: Path, kills: int, steps: int, processes: int = 1, seed: int = 0, report=print) -> dict[str, Any]:
    """Run undisturbed, then killed so often, and compare.

    Args:
        folder: to run in, empty.
        kills: how many, at most: a run that ends is not killed.
        steps: training steps.
        processes: of both runs.
        seed: of when to kill.
        report: told of each kill.

    Returns:
        `kills`, where they fell, and whether metrics and checkpoints are `equal`.
    """
    recipe, chance, where = folder / "own.yaml", random.Random(seed), Counter[str]()
    recipe.write_text(json.dumps(SETTINGS | {"steps": steps}))
    alone, run = folder / "alone", folder / "killed"
    if begin(alone, [str(recipe)], processes).wait():
        raise SystemExit((folder / "out.txt").read_text())
    done = 0
    while True:
        words = ["--resume", "latest"] if newest(run) >= 0 else [str(recipe), "--overwrite"]
        before, process = newest(run), begin(run, words, processes)
        come = aim(AIMS[done % len(AIMS)], run, chance)
        while process.poll() is None and (done == kills or not come()):
            time.sleep(0.0005)
        if process.poll() is not None:
            if process.returncode:
                raise SystemExit((folder / "out.txt").read_text())
            break
        kill(process)
        done += 1
        where[fell(run, before)] += 1
        report(f"kill {done}: {fell(run, before)}, at step {newest(run)}")
    last = f"checkpoint-{steps}"
    files = sorted(file.name for file in (alone / last).glob("*.safetensors"))
    alike = {name: (alone / last / name).read_bytes() == (run / last / name).read_bytes() for name in files}
    same = lines(alone) == lines(run)
    return {"kills": done, "equal": same and all(alike.values()), "metrics": same, "files": alike, "where": dict(where)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    code = {"commit": git("rev-parse", "HEAD"), "changed": git("status", "--porcelain", ".")}
    console = Console(width=100)
    with tempfile.TemporaryDirectory() as folder:
        results = chaos(Path(folder), asked.kills, asked.steps, asked.processes, report=console.print)
    table = Table(
        "the run was", "kills", title=f"{results['kills']} kills; equal to the undisturbed run: {results['equal']}"
    )
    for name, count in sorted(results["where"].items()):
        table.add_row(name, str(count))
    console.print(table)
    if asked.json:
        versions = {name: version(name) for name in ("aegpo", "torch", "diffusers")}
        settings = SETTINGS | {"steps": asked.steps, "processes": asked.processes}
        about = code | {"versions": versions, "settings": settings, "results": results}
        asked.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
