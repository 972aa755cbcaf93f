"""`README.md` of a run's folder: the model card, ready for the Hub."""

import re
from collections.abc import Callable
from html import escape
from pathlib import Path, PurePath
from typing import Any

import yaml

from aegpo.algorithms import PAPERS
from aegpo.report.html import count, duration, percent, reward
from aegpo.report.images import sample_names
from aegpo.report.records import Change, RunRecord, pass_rate_changes, read_run, reward_changes, write_whole

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
    """Writes `README.md` into a run's folder, from what the folder holds, and returns its path.

    Raises:
        ValueError: `run` is no run's folder, one of its files leads outside of it, or its metrics are damaged.
    """
    record = read_run(run)
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(record), sort_keys=False)}---",
        f"# {_plain(record.folder.name)}\n\n{_summary(record)}",
        _results(record),
        _pictures(record),
        _loading(record),
        _versions(record),
        _citation(record),
    ]
    write_whole(record.folder / "README.md", ("\n\n".join(part for part in parts if part) + "\n").encode())
    return run / "README.md"


def _front_matter(record: RunRecord) -> dict[str, Any]:
    base = _base(record)
    known = {"license": "apache-2.0"} if base == EMBEDDED else {"base_model": base} if _is_on_hub(base) else {}
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
    names = sample_names(record.folder)
    if len(names) < 2:
        return ""
    before, after = f"![before training]({names[0]}.png)", f"![after training]({names[-1]}.png)"
    return "\n\n".join(["## Pictures", "Before:", before, "After:", after])


def _loading(record: RunRecord) -> str:
    lines = _loading_lora(record) if _is_lora(record) else _loading_full(record)
    steps = record.setting("eval_steps") or record.setting("sampler.steps")
    arguments = {"prompt": _prompt(record), "num_inference_steps": steps, **record.pipeline["call"]}
    written = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    frames = "num_frames" in arguments
    call = f"video = pipe({written}).frames[0]" if frames else f"image = pipe({written}).images[0]"
    return "\n".join(["## Use", "", "```python", *lines, call, "```"])


def _prompt(record: RunRecord) -> str:
    """One that the run was trained on, for its pictures to be like those of the card."""
    prompts = [prompt for row in record.training for prompt in row.get("prompts", ())]
    return prompts[0] if prompts else "a red circle above a blue square"


def _loading_lora(record: RunRecord) -> list[str]:
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
    own = [f"pipe.scheduler = {scheduler}"] if scheduler else []
    return [*imports, load, *own, 'pipe.load_lora_weights(".")  # the folder of this card']


def _loading_full(record: RunRecord) -> list[str]:
    load = f'pipe = DiffusionPipeline.from_pretrained(".", {_how(record)})  # the folder of this card'
    return ["import torch", "from diffusers import DiffusionPipeline", "", load]


def _how(record: RunRecord) -> str:
    """The arguments that the run itself loaded the pipeline with."""
    absent = [f"{part}=None" for part in record.pipeline["absent"]]
    return ", ".join([*absent, f"dtype=torch.{record.pipeline['dtype']}"])


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
