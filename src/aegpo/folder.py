"""A run's folder: what is a run's in it, what may be done there, and where a run that stands there goes on."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rich.console import Console

from aegpo import checkpoint, disk
from aegpo.config import Config, eval_steps, load_yaml, resolve
from aegpo.logbook import ASIDE
from aegpo.report import inside, read_metrics
from aegpo.stopping import how_to_resume

RUN_FILES = (
    *("config.yaml", "env.json", "metrics.jsonl", "report.html", "README.md", "samples"),
    *("analysis", "eval", ".fetched", ASIDE, disk.LOCK),
    *("checkpoint-*", ".checkpoint-*", ".weights", "pytorch_lora_weights.safetensors", ".*.partial"),
    *("model_index.json", "scheduler", "transformer", "unet", "vae", "text_encoder*", "tokenizer*"),
)


def refuse_existing(folder: Path, overwrite: bool) -> None:
    """Raise ValueError unless a run may begin in the folder: it is empty, or to be overwritten and a run's own."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise ValueError(f"output_dir: {there} is not a folder")
    names = [item.name for item in folder.iterdir()] if folder.exists() else []
    if all(name.startswith(".") and is_a_runs(name) for name in names):  # none, or what a run killed at once leaves
        return
    if not overwrite:
        raise ValueError(f"output_dir: {folder} exists; give --overwrite, --resume latest, or another --output-dir")
    others = [name for name in names if not is_a_runs(name)]
    if others or not (folder / "config.yaml").exists():
        what = f"holds {others[0]}, which is not a run's" if others else "is not a run's folder"
        raise ValueError(f"output_dir: {folder} {what}; it is not overwritten")


def is_a_runs(name: str) -> bool:
    """Whether a run, and nobody else, writes a file of that name: only such are ever deleted."""
    return any(fnmatch(name, pattern) for pattern in RUN_FILES)


def clear(folder: Path) -> None:
    """Delete a run: first its checkpoints and last its config, so that what a kill leaves is known for a run's."""
    for old in reversed(checkpoint.checkpoints(folder)):
        disk.delete(old)
    items = [item for item in folder.iterdir() if item.name != disk.LOCK]
    for item in sorted(items, key=lambda item: item.name == "config.yaml"):
        shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()


def own_config(run: Path, *layers: dict[str, Any]) -> Config:
    """The run's own, with other settings laid over it; raises ValueError where it cannot be read, or not resolved."""
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run} is not a run's folder: it has no config.yaml")
    own = load_yaml(run / "config.yaml")
    try:
        resolve(own)
    except ValueError as error:
        raise ValueError(f"{run}/config.yaml: {error}") from None
    return resolve(own, *layers)


def checkpoints_of(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first, of which there is one at least."""
    found = checkpoint.checkpoints(run)
    if not found:
        raise ValueError(f"run {run} has no checkpoint yet: its first is written after its first evaluation")
    return found


def lora_file(run: Path) -> Path:
    """The run's adapter; raises ValueError if it has none yet."""
    file = run / "pytorch_lora_weights.safetensors"
    if not file.exists():
        raise ValueError(f"run {run} has no weights yet: {file.name} is missing")
    return file


# ---------------------------------------------------------------- going on


def resume_point(folder: Path, resume: str, console: Console) -> Path:
    """The checkpoint that `--resume` names, or the newest that is whole, which is said where others are not.

    Raises:
        ValueError: there is none, or it is damaged, or of another run.
    """
    if resume != "latest":
        if not Path(resume).is_dir() or checkpoint.step_of(Path(resume)) < 0:
            raise ValueError(
                f"--resume: {resume} is not a checkpoint folder; give 'latest' or a path such as {folder}/checkpoint-10"
            )
        if Path(resume).resolve().parent != folder.resolve():
            raise ValueError(
                f"--resume: {resume} belongs to another run than {folder}; give --output-dir {Path(resume).parent}"
            )
        checkpoint.verify(Path(resume))
        return Path(resume)
    try:
        newest, damaged = checkpoint.newest_whole(folder)
    except ValueError as error:
        raise ValueError(f"--resume: {error}") from None
    for wrong in damaged:
        said = f"{folder / wrong}; going on from {newest.name}"
        console.print(said, highlight=False, markup=False, soft_wrap=True)
    return newest


def refuse_another_course(start: Path, config: Config) -> None:
    """Raise ValueError where a resumed run would change what its record says of the steps that are done."""
    folder, done = start.parent, checkpoint.step_of(start)
    before = own_config(folder)
    kept = {
        "seed": (before.seed, config.seed),
        "algorithm": (before.algorithm, config.algorithm),
        "sampler.steps": (before.sampler.steps, config.sampler.steps),
        "eval_steps": (eval_steps(before), eval_steps(config)),
        "optimizer.kind": (before.optimizer.kind, config.optimizer.kind),
    }
    for name, (was, now) in kept.items():
        if was != now:
            raise ValueError(f"{name}: the run in {folder} has {name} {was}, not {now}; start another --output-dir")
    if config.steps < done:
        raise ValueError(f"steps: {start} is past step {config.steps}; ask for at least {done}")
    for item in folder.rglob("*"):
        if item.is_symlink():  # what the run writes there would be written elsewhere
            inside(folder.resolve(), str(item.relative_to(folder)))
    read_metrics(folder)  # a damaged line is said while nothing has been written


def how_to_go_on(folder: Path) -> str:
    """What to say to whoever stopped a run that trains."""
    if checkpoint.checkpoints(folder):
        return f"stopped; to go on: {how_to_resume(folder)}"
    return "stopped before its first checkpoint; start it again with --overwrite"


@contextmanager
def said_of_the_disk(folder: Path) -> Iterator[None]:
    """Say in a line what keeps a run from being written, and how it goes on."""
    try:
        yield
    except OSError as error:
        elsewhere = error.filename and not Path(error.filename).absolute().is_relative_to(folder.absolute())
        if error.errno not in disk.REFUSALS or elsewhere:
            raise
        again = (
            ""
            if checkpoint.checkpoints(folder)
            else "; start it again with --overwrite once it can, or give another --output-dir"
        )
        raise ValueError(f"output_dir: {folder} cannot be written to: {os.strerror(error.errno)}{again}") from error
