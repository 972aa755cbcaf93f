"""The one place where the names in a config become objects, and a run's folder is made."""

import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from aegpo import checkpoint, disk, world
from aegpo.adapt.memory import Memory
from aegpo.analysis import analyze as measure
from aegpo.analysis import evaluations, read_entropy
from aegpo.comparison import LEVEL, compare, drawn_as, summary
from aegpo.config import (
    Checks,
    Config,
    dump_yaml,
    eval_steps,
    load_yaml,
    needs_probe,
    resolve,
    with_noise,
)
from aegpo.data import load_prompts, named
from aegpo.display import Display, bar
from aegpo.distributed import SaidElsewhere, Team
from aegpo.evaluation import evaluate as evaluate_policy
from aegpo.logbook import ASIDE
from aegpo.models import Denoiser, absent, compute_dtype, family_name, load, load_pipeline, memory
from aegpo.models.comfyui import for_comfyui
from aegpo.models.lora import read_lora
from aegpo.report import inside, read_metrics, save_picture, write_analysis, write_model_card, write_report
from aegpo.report.analysis import READINGS, SIGNALS, from_one
from aegpo.report.html import correlation, percent
from aegpo.rewards.panel import Panel, load_panel
from aegpo.signals import entropy_curves
from aegpo.stopping import Stop
from aegpo.train import seen_whole, train
from aegpo.types import Prompt

VIDEOS = (".gif", ".webp", ".png")  # that Pillow animates
RUN_FILES = (
    *("config.yaml", "env.json", "metrics.jsonl", "report.html", "README.md", "samples"),
    *("analysis", "eval", ".fetched", ASIDE, disk.LOCK),
    *("checkpoint-*", ".checkpoint-*", ".weights", "pytorch_lora_weights.safetensors", ".*.partial"),
    *("model_index.json", "scheduler", "transformer", "unet", "vae", "text_encoder*", "tokenizer*"),
)


def run(
    config: Config,
    *,
    resume: str | None = None,
    overwrite: bool = False,
    judges: Panel | None = None,
    saved: Callable[[Path], None] = lambda checkpoint: None,
) -> Path:
    """Train as the config says, in `config.output_dir`, and write the run's card and its report.

    Args:
        config: a resolved config.
        resume: `latest`, or a checkpoint folder of this run to go on from.
        overwrite: whether a run that stands in the folder may be replaced.
        judges: the config's rewards, where they are at work elsewhere.
        saved: is told of each checkpoint, in the first process.

    Returns:
        The path of the report.

    Raises:
        ValueError: anything the user got wrong, in one plain line; nothing has been written then.
    """
    folder = fit(config, resume=resume, overwrite=overwrite, judges=judges, saved=saved)
    team = Team.join()
    with team.agreed(), _said_of_the_disk(folder):
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
            start = _resume_point(folder, resume, console) if resume else None
            if start is not None:
                _refuse_another_course(start, config)
            prompts, held_out = _prompts(config, "train"), _prompts(config, "eval")
            _refuse_few(prompts, config)
            reward = judges or load_panel(config)
            _refuse_idle(config, reward, team.size)
            _try_out(reward, prompts, named(config.prompts.train, "train"), training=True)
            _try_out(reward, held_out, named(config.prompts.eval, "eval"))
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
        with team.agreed(), _said_of_the_disk(folder):
            if team.is_first:
                folder.mkdir(parents=True, exist_ok=True)
                if not locked:
                    held.enter_context(disk.alone_in(folder))
                    refuse_existing(folder, overwrite)  # another run may have begun there meanwhile
                if start is None:
                    _clear(folder)
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
        with Display(config.steps, console) as display, Stop(words, quiet=not team.is_first) as stop:
            try:
                with _said_of_the_disk(folder):
                    train(config, model, prompts, held_out, reward, folder, display, start, team, stop, saved)
            except (ValueError, FloatingPointError) as error:
                if isinstance(error, SaidElsewhere) or not checkpoint.checkpoints(folder):
                    raise
                raise ValueError(
                    f"{error}; to go on from the newest checkpoint: {checkpoint.how_to_resume(folder)}"
                ) from error
        return folder


@contextmanager
def _said_of_the_disk(folder: Path) -> Iterator[None]:
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


def _conclude(folder: Path) -> None:
    """Write the model card and the report, and say how a run went."""
    console = Console()
    write_model_card(folder)
    report = write_report(folder)
    console.print(_before_after(folder))
    trained = [row for row in read_metrics(folder) if "rows" in row]
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


def how_to_go_on(folder: Path) -> str:
    """What to say to whoever stopped a run that trains."""
    if checkpoint.checkpoints(folder):
        return f"stopped; to go on: {checkpoint.how_to_resume(folder)}"
    return "stopped before its first checkpoint; start it again with --overwrite"


def sample(run: Path, prompt: str, out: Path, seed: int = 0) -> None:
    """Draw one picture with a run's weights, exactly as diffusers does after `load_lora_weights(run)`.

    Raises:
        ValueError: there is no such run, it has no weights yet, or the prompt is not one its model can read.
    """
    config = _config(run)
    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--out: {out} is not named as an image; give a name that ends in .png, for one")
    _check_words(config, [prompt], "--prompt")
    if family_name(config.model) == "wan" and out.suffix.lower() not in VIDEOS:
        raise ValueError(f"--out: {out} is a video's, which is written as {', '.join(VIDEOS)}")
    pipe, family = load_pipeline(config.model)
    if config.model.train == "lora":
        _lora_file(run)
        pipe.load_lora_weights(str(run))
    else:
        if not (run / "model_index.json").exists():
            raise ValueError(f"run {run} has no weights yet: model_index.json is missing")
        network = type(getattr(pipe, family.part))
        weights = network.from_pretrained(run, subfolder=family.part, dtype=compute_dtype(config.model))
        pipe.register_modules(**{family.part: weights})
    if torch.cuda.is_available():
        pipe.enable_model_cpu_offload()  # each part is on the GPU for its turn
    drawn = pipe(
        prompt=prompt,
        num_inference_steps=eval_steps(config),
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
        **family.call(config.sampler.guidance),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    picture = drawn["frames"] if "frames" in drawn else drawn["images"]
    save_picture(out, (picture[0] * 255).round().astype(np.uint8))


def export(run: Path, out: Path) -> None:
    """Write a run's adapter as ComfyUI reads it, to a .safetensors file.

    Raises:
        ValueError: there is no such run, it has no weights yet, it trained all weights, or one of the layers that it
            adapted has no name in ComfyUI that we know.
    """
    config = _config(run)
    if config.model.train == "full":
        raise ValueError(f"run {run} trained all weights, and export is of a LoRA adapter (model.train: lora)")
    weights, alpha = read_lora(_lora_file(run))
    named = for_comfyui(weights, family_name(config.model), alpha)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(named, out, metadata={"format": "pt"})
    out.chmod(0o644)  # safetensors writes for its user alone


def evaluate(
    run: Path, prompts: str | None = None, reward: str | dict[str, Any] | None = None, images: int | None = None
) -> dict[str, float]:
    """Evaluate a run's newest checkpoint, on its held-out prompts and by its reward, or by others.

    Raises:
        ValueError: there is no such run or it has no checkpoint, or the prompts or the reward cannot be used.
    """
    config = _config(run, _given(prompts, reward), {"eval_images": images} if images else {})
    option = prompts and "--prompts"
    held_out = _prompts(config, "eval", option)
    newest = _checkpoints(run)[-1]
    judge = load_panel(replace(config, reward_checks=Checks()))
    _try_out(judge, held_out, named(config.prompts.eval, "eval", option))
    checkpoint.verify(newest)
    model = load(config.model, config.seed)
    model.prepare([prompt.text for prompt in held_out])
    checkpoint.load_weights(newest, model.trainable)
    metrics = evaluate_policy(config, model, held_out, judge)
    _tell(judge, Console(stderr=True))
    return metrics


def evaluate_by_all(
    run: Path, judges: Sequence[str], prompts: str | None = None, images: int | None = None, out: Path | None = None
) -> dict[str, Any]:
    """Judge pictures of a run's newest checkpoint, and of its base policy from the same noise, by several rewards.

    Args:
        run: the run's folder.
        judges: the rewards' names, each once.
        prompts: by default the run's held-out ones.
        images: for each prompt; by default the run's own number.
        out: the folder to write `eval.json` and `images` into; by default `eval` in the run's folder.

    Returns:
        What `eval.json` holds.

    Raises:
        ValueError: as `evaluate` does, or there is but one prompt; nothing has been written then.
    """
    config = _config(run, _given(prompts, None), {"eval_images": images} if images else {})
    option = prompts and "--prompts"
    held_out = _prompts(config, "eval", option)
    where = named(config.prompts.eval, "eval", option)
    if len(held_out) == 1:
        raise ValueError(f"{where} holds one prompt, and intervals over prompts take two at least")
    newest = _checkpoints(run)[-1]
    tried = {name: load_panel(replace(config, reward=name, reward_checks=Checks())) for name in judges}
    for judge in tried.values():
        _try_out(judge, held_out, where)
    checkpoint.verify(newest)
    model = load(config.model, config.seed)
    model.prepare([prompt.text for prompt in held_out])
    checkpoint.load_weights(newest, model.trainable)
    out = out or run / "eval"
    out.mkdir(parents=True, exist_ok=True)
    (out / "eval.json").unlink(missing_ok=True)  # it must not stand beside other pictures than its own

    console = Console()
    count = 2 * len(held_out) * config.eval_images
    console.print(
        f"{len(held_out)} prompts, {count:,} pictures; eval.json is written when all is done", highlight=False
    )
    with bar("eval", count, console) as advance:
        scores = compare(config, model, held_out, tried, out / "images", advance)
    content = {
        "run": run.resolve().name,
        "checkpoint": newest.name,
        "settings": drawn_as(config),
        "prompts": [{"id": prompt.id, "prompt": prompt.text} for prompt in held_out],
        "rewards": summary(scores),
    }
    (out / "eval.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print(_base_and_run(content["rewards"]))
    for judge in tried.values():
        _tell(judge, console)
    console.print(f"eval: {out / 'eval.json'}", highlight=False, markup=False, soft_wrap=True)
    return content


def analyze(
    model: str,
    prompts: str | None = None,
    reward: str | dict[str, Any] | None = None,
    images: int = 4,
    out: Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Check on a run, or on a model before training, where attention entropy points and where there is to gain.

    Args:
        model: a run's folder, or what `model.path` may be.
        prompts: a file, or `world`; by default a run's held-out ones, and the embedded model's.
        reward: by default the run's own.
        images: judged for each prompt.
        out: the folder to write `analysis.html` and `analysis.json` into; by default `analysis` in the run's folder,
            or in `runs`.
        settings: nested, over the run's own or over the defaults: how to sample, and what to read.

    Returns:
        The path of the page.

    Raises:
        ValueError: anything the user got wrong, in one plain line; nothing has been written then.
    """
    run = Path(model)
    trained = (run / "config.yaml").is_file()
    if not trained and model != "world" and prompts is None:
        raise ValueError(
            f"{model} is not the folder of a run (it holds no config.yaml), and any other model needs --prompts: a "
            f".txt with one prompt a line, or a .jsonl"
        )
    over = (dict(settings or {}), _given(prompts, reward), {"eval_images": images})
    plain = {"algorithm": "flow-grpo"}  # whose choices are not used, so never wrong; its sampler has noise
    config = _config(run, *over) if trained else resolve(plain, *over, {"model": {"path": model}})
    option = prompts and "--prompts"
    asked = _prompts(config, "eval", option)
    judge = load_panel(replace(config, reward_checks=Checks()))
    _try_out(judge, asked, named(config.prompts.eval, "eval", option))
    found = _checkpoints(run) if trained else []
    for folder in found:
        checkpoint.verify(folder)
    policy = load(config.model, config.seed)
    policy.prepare([prompt.text for prompt in asked])
    for folder in found:
        checkpoint.refuse_others(folder, policy.trainable)
    read_entropy(with_noise(config), policy, asked[:1], moved=False)  # what cannot be read is said before the long part
    out = out or (run if trained else Path("runs")) / "analysis"
    out.mkdir(parents=True, exist_ok=True)

    console = Console()
    stages = 1 + sum(checkpoint.step_of(folder) > 0 for folder in found)
    cost = evaluations(config, len(asked), stages, policy.doubles(config.sampler.guidance))
    console.print(f"{len(asked)} prompts, {cost:,} network evaluations; written when all is done", highlight=False)
    with bar("analysis", cost, console) as advance:
        measured = measure(config, policy, asked, judge, found, advance)
    page = write_analysis(out, config, run.resolve().name, measured)
    _tell(judge, console)
    for table in _correlations(measured):
        console.print(table)
    console.print(f"analysis: {page}", highlight=False, markup=False, soft_wrap=True)
    return page


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


def _config(run: Path, *layers: dict[str, Any]) -> Config:
    """The run's own, with others laid over it."""
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run} is not a run's folder: it has no config.yaml")
    own = load_yaml(run / "config.yaml")
    try:
        resolve(own)
    except ValueError as error:
        raise ValueError(f"{run}/config.yaml: {error}") from None
    return resolve(own, *layers)


def _lora_file(run: Path) -> Path:
    file = run / "pytorch_lora_weights.safetensors"
    if not file.exists():
        raise ValueError(f"run {run} has no weights yet: {file.name} is missing")
    return file


def _given(prompts: str | None, reward: str | dict[str, Any] | None) -> dict[str, Any]:
    """The settings behind `--prompts` and `--reward`, where they are given."""
    return ({"prompts": {"eval": prompts}} if prompts else {}) | ({"reward": reward} if reward else {})


def _try_out(rewards: Panel, prompts: Sequence[Prompt], where: str, training: bool = False) -> None:
    try:
        rewards.try_out(prompts, training)
    except ValueError as error:
        raise ValueError(f"{error} (tried on a prompt of {where})") from error


def _tell(rewards: Panel, console: Console) -> None:
    """Say what the rewards met."""
    for kind, what in {trouble.kind: trouble.what for trouble in reversed(rewards.troubles())}.items():
        console.print(f"{kind}: {what}", highlight=False, markup=False, soft_wrap=True)


def _checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first, of which there is one at least."""
    found = checkpoint.checkpoints(run)
    if not found:
        raise ValueError(f"run {run} has no checkpoint yet: its first is written after its first evaluation")
    return found


def _prompts(config: Config, split: str, option: str | None = None) -> list[Prompt]:
    source = getattr(config.prompts, split)
    prompts = load_prompts(source, split, option)
    _check_words(config, [prompt.text for prompt in prompts], named(source, split, option))
    return prompts


def _check_words(config: Config, prompts: Sequence[str], where: str) -> None:
    """The embedded tokenizer spells unknown words out in letters the model never saw; say so instead."""
    if config.model.path != "world":
        return
    for prompt in prompts:
        if len(prompt.split()) > world.MAX_WORDS:
            raise ValueError(f"{where}: {prompt!r} is longer than the {world.MAX_WORDS} words the embedded model reads")
        if unknown := world.unknown_words(prompt):
            raise ValueError(
                f"{where}: the embedded model does not know {unknown[0]!r} in {prompt!r}; "
                f"it knows {', '.join(sorted(world.words()))}"
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


def _clear(folder: Path) -> None:
    """Delete a run: first its checkpoints and last its config, so that what a kill leaves is known for a run's."""
    for old in reversed(checkpoint.checkpoints(folder)):
        disk.delete(old)
    items = [item for item in folder.iterdir() if item.name != disk.LOCK]
    for item in sorted(items, key=lambda item: item.name == "config.yaml"):
        shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()


def _resume_point(folder: Path, resume: str, console: Console) -> Path:
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


def _refuse_another_course(start: Path, config: Config) -> None:
    """A resumed run may change its settings, but not what its record says of the steps that are done."""
    folder, done = start.parent, checkpoint.step_of(start)
    before = _config(folder)
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


def _check_memory(start: Path, config: Config) -> None:
    try:
        memory = Memory.of(load_file(start / "memory.safetensors"))
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"checkpoint {start} is damaged: memory.safetensors: {error}") from None
    curves = [curve for curve in (*memory.base_entropy.values(), memory.reward_spread) if curve is not None]
    if any(len(curve) != config.sampler.steps for curve in curves):
        raise ValueError(f"checkpoint {start} is damaged: memory.safetensors holds curves of other denoising steps")


def _correlations(measured: dict[str, Any]) -> Iterator[Table]:
    """The correlations of `aegpo.analysis`, in short; those over prompts where there are any."""
    if measured["correlations"]:
        table = Table("gain from step", "to", *SIGNALS.values(), title="correlation with what a prompt gained")
        for row in measured["correlations"]:
            if row["gain"] == "gain_to_next":
                table.add_row(str(row["step"]), str(row["next"]), *(correlation(row[signal]) for signal in SIGNALS))
        yield table
    table = Table("curve", "correlation", "steps", "of the best", title="correlation with what a step is worth")
    for name, reading in measured["readings"].items():
        steps, share = from_one(reading["chosen"]), percent(reading["share"])
        table.add_row(READINGS[name], correlation(reading["correlation"]), steps, share)
    yield table


def _base_and_run(judged: dict[str, Any]) -> Table:
    """A row for each reward: means, and under each its interval."""
    policies = ("base", "run", "gain")
    columns = Column("reward", overflow="fold"), *(Column(name, no_wrap=True) for name in policies)
    table = Table(*columns, title=f"means, and {LEVEL:.0%} intervals over prompts")
    for name, row in judged.items():
        both = [(row[column]["mean"], *row[column]["interval"]) for column in policies]
        table.add_row(escape(name), *(f"{mean:.4f}\n[{low:.4f}, {high:.4f}]" for mean, low, high in both))
    return table


def _before_after(folder: Path) -> Table:
    evaluations = [row for row in read_metrics(folder) if "eval/reward_mean" in row]
    table = Table("held-out", "before", "after", "change")
    if not evaluations:
        return table
    first, last = evaluations[0], evaluations[-1]
    for name in [key for key in first if key.startswith("eval/") and key in last]:
        label = name.removeprefix("eval/").replace("_", " ").replace("/", ": ")
        table.add_row(escape(label), f"{first[name]:.3f}", f"{last[name]:.3f}", f"{last[name] - first[name]:+.3f}")
    return table
