"""`README.md` of a run's folder: the model card, ready for the Hub."""

import re
from collections.abc import Callable
from html import escape
from pathlib import Path, PurePath
from typing import Any

import yaml

from aegpo import disk
from aegpo.algorithms import PAPERS
from aegpo.report.html import count, duration, percent, reward
from aegpo.report.images import sample_names
from aegpo.report.records import Change, RunRecord, pass_rate_changes, read_run, reward_changes

EMBEDDED = "world"  # the `model.path` that means the pipeline in the package
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

CITATION = """@misc{{arxiv{key},
  title         = {{{title}}},
  year          = {{20{year}}},
  eprint        = {{{paper}}},
  archivePrefix = {{arXiv}}
}}
"""


def write_model_card(run: Path) -> Path:
    """Writes `README.md` into a run's folder and returns its path; raises ValueError as `model_card` does."""
    card = model_card(run)
    disk.write(run.resolve() / "README.md", card.encode())
    return run / "README.md"


def model_card(run: Path, repo: str = "") -> str:
    """The card of a run, from what its folder holds.

    Args:
        run: its folder.
        repo: the repository on the Hub that the card is for, by whose name it then loads the weights.

    Raises:
        ValueError: `run` is no run's folder, one of its files leads outside of it, or its metrics are damaged.
    """
    record = read_run(run)
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(record), sort_keys=False)}---",
        f"# {_plain(_last_part(repo) or record.folder.name)}\n\n{_summary(record)}",
        _results(record),
        _pictures(record),
        _loading(record, repo),
        _licence(record),
        _versions(record),
        _citation(record),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(record: RunRecord) -> dict[str, Any]:
    base = _base(record)
    known = {"license": "apache-2.0"} if base == EMBEDDED else {}
    if _is_on_hub(base):
        known = {"base_model": base, "base_model_relation": "adapter" if _is_lora(record) else "finetune"}
    tags = ["text-to-video" if _is_video(record) else "text-to-image", "diffusers", "aegpo", "reinforcement-learning"]
    return known | {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-video" if _is_video(record) else "text-to-image",
        "tags": ["lora", *tags] if _is_lora(record) else tags,
    }


def _summary(record: RunRecord) -> str:
    kind = "LoRA adapter for" if _is_lora(record) else "Full fine-tuning of"
    said = ("algorithm", "sampler.kind", "allocation.rule", "exploration.rule")
    names = (f"`{record.setting(name)}`" for name in said)
    method = "aligned by online reinforcement learning ({}, transitions {}, allocation {}, explored steps {})".format(
        *names
    )
    sentence = f"{kind} {_base_in_words(_base(record))}, {method}"
    if not record.training:
        return f"{sentence}."
    last = record.training[-1]
    effort = f"{last['step']} steps, {count(last['forwards'])} forwards, {duration(last['seconds'])}"
    return f"{sentence}: {effort}."


def _results(record: RunRecord) -> str:
    tables = [
        _table("Graded reward", reward_changes(record.evaluations), reward),
        _table("Pass rate (change in points)", pass_rate_changes(record.evaluations), percent),
    ]
    return "\n\n".join(["## Results on held-out prompts", *filter(None, tables)]) if any(tables) else ""


def _table(title: str, changes: list[Change], written: Callable[..., str]) -> str:
    head = [f"| {title} | before | after | change |", "| :-- | --: | --: | --: |"]
    rows = [
        f"| {_plain(c.name)} | {written(c.before)} | {written(c.after)} | {written(c.difference, signed=True)} |"
        for c in changes
    ]
    return "\n".join([*head, *rows]) if rows else ""


def _pictures(record: RunRecord) -> str:
    shown = shown_pictures(record.folder)
    if not shown:
        return ""
    before, after = f"![before training]({shown[0]})", f"![after training]({shown[1]})"
    return "\n\n".join(["## Pictures", "Before:", before, "After:", after])


def shown_pictures(folder: Path) -> list[str]:
    """The files of a run's folder that its card shows: the first grid and the last; empty where there are not two."""
    names = sample_names(folder)
    return [f"{name}.png" for name in (names[0], names[-1])] if len(names) > 1 else []


def _loading(record: RunRecord, repo: str) -> str:
    own = f'"{repo or "."}"', "" if repo else "  # the folder of this card"
    lines = _loading_lora(record, *own) if _is_lora(record) else _loading_full(record, *own)
    steps = record.setting("eval_steps") or record.setting("sampler.steps")
    arguments = {"prompt": _prompt(record), "num_inference_steps": steps, **record.pipeline["call"]}
    written = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    frames = "num_frames" in arguments
    call = f"video = pipe({written}).frames[0]" if frames else f"image = pipe({written}).images[0]"
    return "\n".join(["## Use", "", "```python", *lines, call, "```", *_comfyui(record)])


def _comfyui(record: RunRecord) -> list[str]:
    if not _is_lora(record) or _base(record) == EMBEDDED:
        return []
    return ["", "For ComfyUI: `aegpo export FOLDER --comfyui lora.safetensors`, with the folder of this card."]


def _prompt(record: RunRecord) -> str:
    """One that the run was trained on, for its pictures to be like those of the card."""
    prompts = [prompt for row in record.training for prompt in row.get("prompts", ())]
    return prompts[0] if prompts else "a red circle above a blue square"


def _loading_lora(record: RunRecord, own: str, own_note: str) -> list[str]:
    base = _base(record)
    scheduler = record.pipeline["scheduler"]
    named = ", ".join(sorted({"DiffusionPipeline", *re.findall(r"^\w+", scheduler)}))
    imports = ["import torch", f"from diffusers import {named}", ""]
    where, note = repr(base), ""
    if base == EMBEDDED:
        imports.insert(0, "import aegpo.world")
        where = "aegpo.world.path()"
    elif not _is_on_hub(base):
        where, note = repr(_last_part(base)), "  # wherever you keep it"
    load = f"pipe = DiffusionPipeline.from_pretrained({where}, {_how(record)}){note}"
    steps = [f"pipe.scheduler = {scheduler}"] if scheduler else []
    return [*imports, load, *steps, f"pipe.load_lora_weights({own}){own_note}"]


def _loading_full(record: RunRecord, own: str, own_note: str) -> list[str]:
    load = f"pipe = DiffusionPipeline.from_pretrained({own}, {_how(record)}){own_note}"
    return ["import torch", "from diffusers import DiffusionPipeline", "", load]


def _how(record: RunRecord) -> str:
    """The arguments that the run itself loaded the pipeline with."""
    absent = [f"{part}=None" for part in record.pipeline["absent"]]
    return ", ".join([*absent, f"dtype=torch.{record.pipeline['dtype']}"])


def _licence(record: RunRecord) -> str:
    base = _base(record)
    if base == EMBEDDED:
        return "## Licence\n\nApache-2.0, as that of the embedded model."
    return f"## Licence\n\nA derivative of {_base_in_words(base)}: the licence of that model holds for this one."


def _versions(record: RunRecord) -> str:
    if not record.env:
        return ""
    versions = {"python": record.env["python"]} | record.env["versions"]
    rows = [f"- {_plain(name)} {_plain(version)}" for name, version in versions.items()]
    return "\n".join(["## Versions", "", *rows])


def _citation(record: RunRecord) -> str:
    entries = (
        CITATION.format(key=paper.replace(".", ""), title=PAPERS[paper], year=paper[:2], paper=paper)
        for paper in record.papers
    )
    return f"## Citation\n\n```bibtex\n{''.join(entries)}```"


def _is_video(record: RunRecord) -> bool:
    return "num_frames" in record.pipeline["call"]


def _is_lora(record: RunRecord) -> bool:
    return record.setting("model.train") != "full"


def _base(record: RunRecord) -> str:
    return str(record.setting("model.path"))


def _base_in_words(base: str) -> str:
    if base == EMBEDDED:
        return "the small text-to-image model embedded in aegpo"
    if _is_on_hub(base):
        return f"[{base}](https://huggingface.co/{base})"
    return f"the local pipeline {_plain(_last_part(base))}"


def _is_on_hub(base: str) -> bool:
    """Whether diffusers would look for the model on the Hub: it does where no folder of that name stands."""
    return HUB_ID.fullmatch(base) is not None and not Path(base).is_dir()


def _last_part(base: str) -> str:
    """A local model's own name, without the folders above it: a card is published, and they are nobody's business."""
    return PurePath(base).name


def _plain(text: str) -> str:
    """The text on one line, with nothing in it that Markdown or HTML would act on."""
    return re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", escape(" ".join(text.split()), quote=False))
