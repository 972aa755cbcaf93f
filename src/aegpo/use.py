"""What a run is good for once it has weights: pictures, an export, evaluations, an analysis."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from safetensors.torch import save_file

from aegpo import checkpoint
from aegpo.analysis import analyze as measure
from aegpo.analysis import evaluations, read_entropy
from aegpo.comparison import LEVEL, compare, drawn_as, summary
from aegpo.config import Checks, eval_steps, resolve, with_noise
from aegpo.data import named, prompts_of, refuse_unknown_words
from aegpo.display import bar
from aegpo.evaluation import evaluate as evaluate_policy
from aegpo.folder import checkpoints_of, lora_file, own_config
from aegpo.models import compute_dtype, family_name, load, load_pipeline
from aegpo.models.comfyui import for_comfyui
from aegpo.models.lora import read_lora
from aegpo.report import save_picture, write_analysis
from aegpo.report.analysis import READINGS, SIGNALS, from_one
from aegpo.report.html import correlation, percent
from aegpo.rewards.panel import Panel, load_panel

VIDEOS = (".gif", ".webp", ".png")  # that Pillow animates


def sample(run: Path, prompt: str, out: Path, seed: int = 0) -> None:
    """Draw one picture with a run's weights, exactly as diffusers does after `load_lora_weights(run)`.

    Raises:
        ValueError: there is no such run, it has no weights yet, or the prompt is not one its model can read.
    """
    config = own_config(run)
    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--out: {out} is not named as an image; give a name that ends in .png, for one")
    refuse_unknown_words(config, [prompt], "--prompt")
    if family_name(config.model) == "wan" and out.suffix.lower() not in VIDEOS:
        raise ValueError(f"--out: {out} is a video's, which is written as {', '.join(VIDEOS)}")
    pipe, family = load_pipeline(config.model)
    if config.model.train == "lora":
        lora_file(run)
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
    config = own_config(run)
    if config.model.train == "full":
        raise ValueError(f"run {run} trained all weights, and export is of a LoRA adapter (model.train: lora)")
    weights, alpha = read_lora(lora_file(run))
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
    config = own_config(run, _given(prompts, reward), {"eval_images": images} if images else {})
    option = prompts and "--prompts"
    held_out = prompts_of(config, "eval", option)
    newest = checkpoints_of(run)[-1]
    judge = load_panel(replace(config, reward_checks=Checks()))
    judge.try_out(held_out, named(config.prompts.eval, "eval", option))
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
    config = own_config(run, _given(prompts, None), {"eval_images": images} if images else {})
    option = prompts and "--prompts"
    held_out = prompts_of(config, "eval", option)
    where = named(config.prompts.eval, "eval", option)
    if len(held_out) == 1:
        raise ValueError(f"{where} holds one prompt, and intervals over prompts take two at least")
    newest = checkpoints_of(run)[-1]
    tried = {name: load_panel(replace(config, reward=name, reward_checks=Checks())) for name in judges}
    for judge in tried.values():
        judge.try_out(held_out, where)
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
    config = own_config(run, *over) if trained else resolve(plain, *over, {"model": {"path": model}})
    option = prompts and "--prompts"
    asked = prompts_of(config, "eval", option)
    judge = load_panel(replace(config, reward_checks=Checks()))
    judge.try_out(asked, named(config.prompts.eval, "eval", option))
    found = checkpoints_of(run) if trained else []
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


def _given(prompts: str | None, reward: str | dict[str, Any] | None) -> dict[str, Any]:
    """The settings behind `--prompts` and `--reward`, where they are given."""
    return ({"prompts": {"eval": prompts}} if prompts else {}) | ({"reward": reward} if reward else {})


def _tell(rewards: Panel, console: Console) -> None:
    """Say what the rewards met."""
    for kind, what in {trouble.kind: trouble.what for trouble in reversed(rewards.troubles())}.items():
        console.print(f"{kind}: {what}", highlight=False, markup=False, soft_wrap=True)


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
