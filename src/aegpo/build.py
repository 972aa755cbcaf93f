"""The one place where the names in a config become objects, and a run's folder is made."""

import json
import os
import platform
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file

from aegpo import checkpoint, disk
from aegpo.adapt.memory import Memory
from aegpo.config import Config, dump_yaml, needs_probe
from aegpo.data import named, prompts_of
from aegpo.display import Display
from aegpo.distributed import SaidElsewhere, Team
from aegpo.folder import (
    clear,
    how_to_go_on,
    refuse_another_course,
    refuse_existing,
    resume_point,
    said_of_the_disk,
)
from aegpo.models import Denoiser, absent, compute_dtype, load, memory
from aegpo.report import read_metrics, write_model_card, write_report
from aegpo.rewards.panel import Panel, load_panel
from aegpo.signals import entropy_curves
from aegpo.stopping import Stop, how_to_resume
from aegpo.train import seen_whole, train
from aegpo.types import Prompt


def run(
    config: Config,
    *,
    resume: str | None = None,
    overwrite: bool = False,
    judges: Panel | None = None,
    saved: Callable[[Path], None] = lambda checkpoint: None,
    asked: Callable[[], bool] = lambda: False,
) -> Path:
    """Train as the config says, in `config.output_dir`, and write the run's card and its report.

    Args:
        config: a resolved config.
        resume: `latest`, or a checkpoint folder of this run to go on from.
        overwrite: whether a run that stands in the folder may be replaced.
        judges: the config's rewards, where they are at work elsewhere.
        saved: is told of each checkpoint, in the first process.
        asked: whether the run is to end after its step, also where no signal says so.

    Returns:
        The path of the report.

    Raises:
        ValueError: anything the user got wrong, in one plain line; nothing has been written then.
    """
    folder = fit(config, resume=resume, overwrite=overwrite, judges=judges, saved=saved, asked=asked)
    team = Team.join()
    with team.agreed(), said_of_the_disk(folder):
        if team.is_first:
            _conclude(folder)
    if team.is_first and (last := checkpoint.last_step(folder)) < config.steps:
        said = f"step {last} of {config.steps}: {how_to_go_on(folder)}"
        Console().print(said, highlight=False, markup=False, soft_wrap=True)
    team.wait()
    return folder / "report.html"


def fit(
    config: Config,
    *,
    resume: str | None = None,
    overwrite: bool = False,
    judges: Panel | None = None,
    saved: Callable[[Path], None] = lambda checkpoint: None,
    asked: Callable[[], bool] = lambda: False,
) -> Path:
    """What `run` does but for the card and the report, which tell of what stands in the folder then: the path of it."""
    with ExitStack() as held:  # the folder's lock
        folder, team = Path(config.output_dir), Team.join()
        console = Console(quiet=not team.is_first)
        with team.agreed():
            if not resume:
                refuse_existing(folder, overwrite)
            disk.refuse_unwritable(folder)
            locked = team.is_first and (folder / "config.yaml").is_file()
            if locked:
                held.enter_context(disk.alone_in(folder))
            start = resume_point(folder, resume, console) if resume else None
            if start is not None:
                refuse_another_course(start, config)
            prompts, held_out = prompts_of(config, "train"), prompts_of(config, "eval")
            _refuse_few(prompts, config)
            reward = judges or load_panel(config)
            _refuse_idle(config, reward, team.size)
            reward.try_out(prompts, named(config.prompts.train, "train"), training=True)
            reward.try_out(held_out, named(config.prompts.eval, "eval"))
            if torch.cuda.is_available() and (outline := memory.sizes(config.model)):
                memory.refuse_too_small(memory.estimate(config, outline), config)
            model = load(config.model, config.seed)
            about = environment(config, model) | {"processes": team.size}
            model.sigmas(config.sampler.steps, config.sampler.shift)
            if needs_probe(config):  # what it cannot read of this model is said before anything is written
                entropy_curves(model, prompts[:1], model.encode([prompts[0].text]), config)
                model.forwards = 0
            if start is not None:
                checkpoint.refuse_others(start, model.trainable)
                _check_memory(start, config)
        with team.agreed(), said_of_the_disk(folder):
            if team.is_first:
                folder.mkdir(parents=True, exist_ok=True)
                if not locked:
                    held.enter_context(disk.alone_in(folder))
                    refuse_existing(folder, overwrite)  # another run may have begun there meanwhile
                if start is None:
                    clear(folder)
                disk.write(folder / "config.yaml", dump_yaml(config).encode())
                disk.write(folder / "env.json", json.dumps(about, indent=1).encode())

        if config.model.shard and team.size > 1:
            model.shard()
        elif config.model.shard:
            console.print("model.shard: one process has nobody to share weights with, so it holds them all")
        if start is not None:
            over = (
                ", the last of its steps: nothing is left to train"
                if start.name == f"checkpoint-{config.steps}"
                else ""
            )
            console.print(f"going on from {start}{over}", highlight=False, markup=False, soft_wrap=True)
        words = partial(how_to_go_on, folder)
        with Display(config.steps, console) as display, Stop(words, quiet=not team.is_first) as signals:

            def stop() -> bool:
                return signals.asked or asked()

            try:
                with said_of_the_disk(folder):
                    train(config, model, prompts, held_out, reward, folder, display, start, team, stop, saved)
            except (ValueError, FloatingPointError) as error:
                if isinstance(error, SaidElsewhere) or not checkpoint.checkpoints(folder):
                    raise
                raise ValueError(f"{error}; to go on from the newest checkpoint: {how_to_resume(folder)}") from error
        return folder


def _conclude(folder: Path) -> None:
    """Write the model card and the report, and say how a run went."""
    console = Console()
    write_model_card(folder)
    report = write_report(folder)
    rows = read_metrics(folder)
    trained = [row for row in rows if "rows" in row]
    if trained and sum("eval/reward_mean" in row for row in rows) == 1:
        console.print("held-out prompts: evaluated before the first step alone", highlight=False)
    else:
        console.print(_before_after(rows))
    if trained and not any(row["rows"] for row in trained):
        warning = "nothing was learned: in no step did any prompt's rewards differ; look at reward and sampler"
        console.print(warning, highlight=False, soft_wrap=True)
    console.print(f"report: {report}", highlight=False, markup=False, soft_wrap=True)


def _refuse_few(prompts: Sequence[Prompt], config: Config) -> None:
    """Refuse fewer prompts than a step takes."""
    if len(prompts) < config.prompts_per_step:
        raise ValueError(
            f"prompts_per_step: a step takes {config.prompts_per_step} prompts, but {config.prompts.train} holds "
            f"{len(prompts)}; lower it (and rollouts_per_step), or give more prompts"
        )


def _refuse_idle(config: Config, reward: Panel, processes: int) -> None:
    """Refuse more processes than there is work for, and what accelerate was told otherwise."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not config.model.shard:
        raise ValueError(
            "model.shard: accelerate was told to shard the model, but each process would hold all of it; set "
            "--model.shard true (FSDP2), or start accelerate without FSDP"
        )
    whole = seen_whole(config, reward) or config.exploration.branch == "tree" or config.model.shard
    name, most = ("prompts", config.prompts_per_step) if whole else ("rollouts", config.rollouts_per_step)
    if processes > most:
        why = " (here, a prompt's rollouts stay with one process)" if whole else ""
        raise ValueError(
            f"{name}_per_step: {most} {name} cannot be shared by {processes} processes{why}; raise it, or start fewer"
        )


def environment(config: Config, model: Denoiser) -> dict[str, Any]:
    """What the run ran on: versions, device, platform, and how its pipeline is loaded and called to draw alike."""
    packages = ("aegpo", "torch", "diffusers", "transformers", "peft", "accelerate", "numpy")
    gpu = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "threads": torch.get_num_threads(),
        "pipeline": {
            "dtype": str(compute_dtype(config.model)).removeprefix("torch."),
            "absent": absent(config.model),
            "scheduler": model.family.scheduler if model.is_lora else "",  # all weights are saved with the scheduler
            "call": model.family.call(config.sampler.guidance),
        },
        "versions": {package: version(package) for package in packages},
    }


def _check_memory(start: Path, config: Config) -> None:
    try:
        memory = Memory.of(load_file(start / "memory.safetensors"))
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"checkpoint {start} is damaged: memory.safetensors: {error}") from None
    curves = [curve for curve in (*memory.base_entropy.values(), memory.reward_spread) if curve is not None]
    if any(len(curve) != config.sampler.steps for curve in curves):
        raise ValueError(f"checkpoint {start} is damaged: memory.safetensors holds curves of other denoising steps")


def _before_after(rows: Sequence[dict[str, Any]]) -> Table:
    """The first evaluation beside the last."""
    evaluations = [row for row in rows if "eval/reward_mean" in row]
    table = Table("held-out", "before", "after", "change")
    if not evaluations:
        return table
    first, last = evaluations[0], evaluations[-1]
    for name in [key for key in first if key.startswith("eval/") and key in last]:
        label = name.removeprefix("eval/").replace("_", " ").replace("/", ": ")
        table.add_row(escape(label), f"{first[name]:.3f}", f"{last[name]:.3f}", f"{last[name] - first[name]:+.3f}")
    return table
