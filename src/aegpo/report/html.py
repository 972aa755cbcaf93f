"""`report.html`: one page that says what a run did, in one file that needs no network."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

from aegpo import disk
from aegpo.algorithms import PAPERS
from aegpo.config import reward_label
from aegpo.report.images import Sample, read_samples, sample_names
from aegpo.report.records import (
    Change,
    RunRecord,
    pass_rate_changes,
    read_run,
    reward_changes,
    task_names,
)

FACTS = {
    "Model": "model.path",
    "Trained": "model.train",
    "Algorithm": "algorithm",
    "Reward": "reward",
    "Rollouts": "allocation.rule",
    "Exploration": "exploration.rule",
    "Sampler": "sampler.kind",
    "Denoising steps": "sampler.steps",
    "Seed": "seed",
}
HEALTH = {
    "Spread of rewards (std)": "reward/std",
    "Groups without signal": "zero_advantage_groups",
    "Policy ratio": "ratio/mean",
    "Clipped transitions": "clip_fraction",
    "Approximate KL": "approx_kl",
    "Gradient norm": "grad_norm",
    "Change of entropy": "delta_entropy/mean",
    "Learning rate": "lr",
}
KINDS = {"reward_mean": "held-out", "pass_rate_of": "pass rate"}
TOP_PROMPTS = 8
PARTS_OF_TRAINING = 4


def write_report(run: Path) -> Path:
    """Writes `report.html` into a run's folder, from what the folder holds, and returns its path.

    A run that was stopped early, or that evaluated or probed nothing, gets a page without the parts it has no numbers
    for. The same folder gives the same bytes.

    Raises:
        ValueError: `run` is no run's folder, one of its files leads outside of it, or its metrics are damaged.
    """
    record = read_run(run)
    disk.write(record.folder / "report.html", _render(record).encode())
    return run / "report.html"


def rendered(template: str, **values: Any) -> str:
    """A page of this room, `template`.html.jinja, with these values in it."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(lambda name: files("aegpo.report").joinpath(name).read_text("utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"reward": reward, "percent": percent, "count": count, "duration": duration}
    environment.filters |= {"correlation": correlation}
    return environment.get_template(f"{template}.html.jinja").render(values)


def _render(record: RunRecord) -> str:
    return rendered(
        "report",
        name=record.folder.name,
        facts=_facts(record),
        matching=record.is_matching,
        papers={paper: PAPERS[paper].replace("{", "").replace("}", "") for paper in record.papers},
        progress=_progress(record),
        tables=_headline(record),
        reward_curve=_reward_curve(record),
        pass_curve=_pass_curve(record),
        task_curves=_task_curves(record),
        entropy=_entropy(record),
        explored=_explored(record),
        rollouts=_rollouts(record),
        pictures=_pictures(record),
        speed=_speed(record),
        health=_small_curves(record, HEALTH, "health"),
        rewards=_small_curves(record, _reward_keys(record), "reward"),
        troubles=_troubles(record),
        config_text=record.config_text,
        env=_flat(record.env),
    )


def reward(value: float | None, signed: bool = False) -> str:
    """A reward with three decimals, or a dash where there is none."""
    return "–" if value is None else _with_minus(f"{value:{'+' if signed else ''}.3f}")


def percent(value: float | None, signed: bool = False) -> str:
    """A share of one in per cent (or, signed, in points), or a dash where there is none."""
    if value is None:
        return "–"
    return _with_minus(f"{100 * value:+.1f}") if signed else f"{100 * value:.1f} %"


def correlation(value: float | None) -> str:
    """A correlation with two decimals, or a dash where there is none: one side of it is the same everywhere."""
    return "–" if value is None else _with_minus(f"{value:+.2f}")


def count(value: float) -> str:
    """A large number with commas."""
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """A time span as a person says it: `48 s`, `5 min 12 s`, `3 h 04 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _with_minus(number: str) -> str:
    return number.replace("-", "\N{MINUS SIGN}")


@dataclass(frozen=True)
class _Table:
    """One measure before and after training; `form` is the filter that writes its numbers."""

    title: str
    form: str
    before_step: int
    after_step: int | None
    changes: list[Change]


def _facts(record: RunRecord) -> dict[str, str]:
    values = {label: record.setting(key) for label, key in FACTS.items()}
    if isinstance(values["Reward"], dict):
        values["Reward"] = reward_label(values["Reward"])
    return {label: str(value) for label, value in values.items() if isinstance(value, str | int | float)}


def _progress(record: RunRecord) -> dict[str, Any]:
    done, planned = (record.training[-1]["step"] if record.training else 0), record.setting("steps")
    return {"done": done, "planned": planned, "stopped_early": isinstance(planned, int) and done < planned}


def _headline(record: RunRecord) -> list[_Table]:
    steps = [row["step"] for row in record.evaluations]
    measures = [
        ("Graded reward", "reward", reward_changes(record.evaluations)),
        ("Pass rate", "percent", pass_rate_changes(record.evaluations)),
    ]
    return [
        _Table(title, form, steps[0], steps[-1] if len(steps) > 1 else None, changes)
        for title, form, changes in measures
        if changes
    ]


def _reward_curve(record: RunRecord) -> str | None:
    from aegpo.report import plots

    training, held_out = _series(record, "reward/mean"), _series(record, "eval/reward_mean")
    return plots.reward_curve(training, held_out) if training[0] or held_out[0] else None


def _pass_curve(record: RunRecord) -> str | None:
    from aegpo.report import plots

    steps, shares = _series(record, "eval/pass_rate")
    return plots.pass_rate_curve(steps, shares) if steps else None


def _task_curves(record: RunRecord) -> list[dict[str, Any]]:
    from aegpo.report import plots

    tasks = task_names(record.evaluations, "eval/pass_rate/")
    return [
        {
            "task": task,
            "svg": plots.small_curve(f"pass-{number}", *_series(record, f"eval/pass_rate/{task}"), share=True),
        }
        for number, task in enumerate(tasks)
    ]


def _entropy(record: RunRecord) -> dict[str, Any] | None:
    from aegpo.report import plots

    steps, entropy = _series(record, "entropy")
    if not steps:
        return None
    values = [value for row in entropy for value in row]
    return {
        "first": steps[0],
        "last": steps[-1],
        "curves": plots.entropy_curves(entropy[0], entropy[-1]),
        "map": plots.entropy_heat_map(steps, entropy),
        "colours": plots.HEAT,
        "low": min(values),
        "high": max(values),
    }


def _explored(record: RunRecord) -> dict[str, Any] | None:
    from aegpo.report import plots

    steps, histograms = _series(record, "explored_steps")
    if not steps:
        return None
    parts = plots.chunked(histograms, PARTS_OF_TRAINING)
    spans = [(part[0], part[-1]) for part in plots.chunked(steps, PARTS_OF_TRAINING)]
    return {
        "svg": plots.explored_histogram([[sum(column) for column in zip(*part, strict=True)] for part in parts]),
        "spans": spans,
    }


def _rollouts(record: RunRecord) -> dict[str, Any] | None:
    from aegpo.report import plots

    given: dict[str, list[int]] = defaultdict(list)
    for row in record.training:
        for prompt, rollouts in zip(row.get("prompts", []), row.get("allocation", []), strict=True):
            given[prompt].append(rollouts)
    if not given:
        return None
    prompts_with = Counter(rollouts for allocation in given.values() for rollouts in allocation)
    most = sorted(given.items(), key=lambda item: (-sum(item[1]), item[0]))[:TOP_PROMPTS]
    return {
        "svg": plots.rollouts_histogram(dict(sorted(prompts_with.items()))),
        "most": [{"prompt": prompt, "total": sum(n), "draws": len(n), "mean": sum(n) / len(n)} for prompt, n in most],
        "distinct": len(given),
    }


def _pictures(record: RunRecord) -> dict[str, Any] | None:
    names = sample_names(record.folder)
    if not names:
        return None
    before = read_samples(record.folder, names[0])
    after = read_samples(record.folder, names[-1]) if len(names) > 1 else None
    steps = [int(name.rpartition("-")[2]) for name in (names[0], names[-1])]
    return {"before_step": steps[0], "after_step": steps[-1], "pairs": _pairs(before, after)}


def _pairs(before: list[Sample], after: list[Sample] | None) -> list[tuple[Sample, Sample | None]]:
    if after is None:
        return [(sample, None) for sample in before]
    return [(b, a) for b, a in zip(before, after, strict=False) if b.prompt == a.prompt]


def _speed(record: RunRecord) -> dict[str, Any] | None:
    from aegpo.report import plots

    rows = [row for row in record.rows if "forwards" in row]
    if not record.training or not rows:
        return None
    last = rows[-1]
    spans = [(b["step"], b["forwards"] - a["forwards"], b["seconds"] - a["seconds"]) for a, b in pairwise(rows)]
    rates = [(step, forwards / seconds) for step, forwards, seconds in spans if seconds > 0]
    return {
        "seconds": last["seconds"],
        "forwards": last["forwards"],
        "rate": last["forwards"] / last["seconds"] if last["seconds"] > 0 else 0.0,
        "images": sum(row.get("rollouts", 0) for row in record.training),
        "svg": plots.small_curve("speed", [step for step, _ in rates], [rate for _, rate in rates]) if rates else None,
    }


def _reward_keys(record: RunRecord) -> dict[str, str]:
    """Of several rewards each one's mean, in training and on held-out prompts, by what the curve is called."""
    keys = dict.fromkeys(key for row in record.rows for key in row)
    ends = {key: key.removeprefix("reward/").removesuffix("/mean") for key in keys if key.startswith("reward/")}
    own = {name: key for key, name in ends.items() if key == f"reward/{name}/mean"}
    held_out = [key for key in keys if key.startswith(("eval/reward_mean/", "eval/pass_rate_of/"))]
    return own | {f"{key.split('/', 2)[2]}, {KINDS[key.split('/')[1]]}": key for key in held_out}


def _troubles(record: RunRecord) -> list[dict[str, Any]]:
    """What was met of rewards that cannot be right: each reward and kind once, with how often and the first of it."""
    met: dict[tuple[str, str], dict[str, Any]] = {}
    for row in record.rows:
        for one in row.get("reward_troubles", ()):
            first = {"reward": one["reward"], "kind": one["kind"], "what": one["what"], "step": row["step"]}
            entry = met.setdefault((one["reward"], one["kind"]), first | {"steps": 0, "images": 0})
            entry["steps"] += 1
            entry["images"] += one["images"]
    return [entry | {"kind": entry["kind"].replace("_", " ")} for entry in met.values()]


def _small_curves(record: RunRecord, keys: dict[str, str], name: str) -> list[dict[str, Any]]:
    from aegpo.report import plots

    drawn = []
    for number, (label, key) in enumerate(keys.items()):
        steps, values = _series(record, key)
        if steps:
            drawn.append(
                {
                    "label": label,
                    "last": f"{values[-1]:.3g}",
                    "svg": plots.small_curve(f"{name}-{number}", steps, values),
                }
            )
    return drawn


def _series(record: RunRecord, key: str) -> tuple[list[int], list[Any]]:
    """The steps that logged `key`, and what they logged."""
    pairs = [(row["step"], row[key]) for row in record.rows if row.get(key) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _flat(mapping: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as one level, with dotted names."""
    flat: dict[str, str] = {}
    for key, value in mapping.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return flat
