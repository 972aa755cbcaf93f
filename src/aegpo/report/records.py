"""Reading a run's folder: its settings, its environment and its metrics. Nothing outside the folder is ever read."""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from aegpo.algorithms import ALGORITHMS

TROUBLE = {"reward", "kind", "images", "what"}  # what is written of a `types.Trouble`


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder says.

    Attributes:
        folder: The folder, resolved.
        config_text: `config.yaml` as it stands.
        config: The same, parsed.
        env: `env.json`; empty where the run was stopped before it was written.
        rows: `metrics.jsonl`, one mapping a line, in the file's order.
    """

    folder: Path
    config_text: str
    config: dict[str, Any]
    env: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def training(self) -> list[dict[str, Any]]:
        """The rows of training steps: all but step 0, which only evaluates."""
        return [row for row in self.rows if "reward/mean" in row]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The rows that carry an evaluation on held-out prompts."""
        return [row for row in self.rows if "eval/reward_mean" in row]

    @property
    def is_matching(self) -> bool:
        """Whether it learned from finished images, for which rollouts are noiseless (arXiv 2509.25050 and its kin)."""
        return self.setting("sampler.kind") == "ode"

    @property
    def papers(self) -> list[str]:
        """The arXiv ids of what it stands on: AEGPO, its algorithm, its sampler's and its solver's."""
        ids = [ALGORITHMS["aegpo"].paper]
        if self.setting("algorithm") in ALGORITHMS:
            ids.append(ALGORITHMS[self.setting("algorithm")].paper)
        match self.setting("sampler.kind"):
            case "flow_sde":
                ids.append(ALGORITHMS["flow-grpo"].paper)
            case "dance_sde":
                ids.append(ALGORITHMS["dance-grpo"].paper)
            case "cps":
                ids.append("2509.05952")
            case "ode" if self.setting("loss.kind") == "clip":
                ids.append(ALGORITHMS["awm"].paper)
        if self.setting("sampler.solver") == "dpm2m":
            ids.append("2211.01095")
        return list(dict.fromkeys(ids))

    @property
    def pipeline(self) -> dict[str, Any]:
        """How the pipeline is loaded and called: `dtype`, its `absent` parts, its `scheduler`, and the `call`."""
        return {"dtype": "bfloat16", "absent": [], "scheduler": "", "call": {}} | self.env.get("pipeline", {})

    def setting(self, dotted: str) -> Any:
        """The value of a setting such as `model.path`; None where the run's config has no such key."""
        value: Any = self.config
        for key in dotted.split("."):
            if not isinstance(value, dict) or key not in value:
                return None
            value = value[key]
        return value


@dataclass(frozen=True)
class Change:
    """One measure at the first and at the last evaluation; `after` is None where there was only one evaluation."""

    name: str
    before: float | None
    after: float | None

    @property
    def difference(self) -> float | None:
        """After less before, where both are known."""
        return None if self.before is None or self.after is None else self.after - self.before


def read_run(run: Path) -> RunRecord:
    """Reads the folder of a run, finished or not.

    Raises:
        ValueError: The folder has no `config.yaml` or no metrics, a file leads outside of it, or a line of
            `metrics.jsonl` other than an unfinished last one is not what a run writes.
    """
    folder = run.resolve()
    if not inside(folder, "config.yaml").is_file():
        raise ValueError(f"{run} is not a run's folder: it has no config.yaml")
    config_text = _read(folder, "config.yaml").decode()
    return RunRecord(
        folder=folder,
        config_text=config_text,
        config=yaml.safe_load(config_text) or {},
        env=json.loads(_read(folder, "env.json") or b"{}"),
        rows=read_metrics(run),
    )


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, but for an unfinished last one; raises ValueError as `read_run` does."""
    *lines, unfinished = _read(run.resolve(), "metrics.jsonl").split(b"\n")  # a whole last line ends with a newline
    rows = [_parse_line(f"{run}/metrics.jsonl, line {number}", line) for number, line in enumerate(lines, start=1)]
    with suppress(ValueError):
        rows.append(_parse_line("", unfinished))
    if not rows:
        raise ValueError(f"{run} has no metrics yet: its first evaluation was not reached, or metrics.jsonl was lost")
    return rows


def inside(folder: Path, name: str) -> Path:
    """The path of a file of the run, once links are followed.

    Raises:
        ValueError: A link leads outside the folder, or nowhere.
    """
    try:
        path = (folder / name).resolve()
    except (OSError, RuntimeError):
        raise ValueError(f"{name} is a link that leads to itself") from None
    if not path.is_relative_to(folder):
        raise ValueError(f"{name} leads outside the run's folder {folder}")
    return path


def reward_changes(evaluations: list[dict[str, Any]]) -> list[Change]:
    """The graded reward on held-out prompts, over all and per task; empty where nothing was evaluated."""
    return _changes(evaluations, overall="eval/reward_mean", per_task="eval/reward/")


def pass_rate_changes(evaluations: list[dict[str, Any]]) -> list[Change]:
    """The share of held-out prompts passed, over all and per task; empty where no verifier says pass or fail."""
    return _changes(evaluations, overall="eval/pass_rate", per_task="eval/pass_rate/")


def task_names(rows: list[dict[str, Any]], prefix: str) -> list[str]:
    """The tasks for which some row has the key `prefix + task`, in order of first appearance."""
    return list(dict.fromkeys(key.removeprefix(prefix) for row in rows for key in row if key.startswith(prefix)))


def _changes(evaluations: list[dict[str, Any]], overall: str, per_task: str) -> list[Change]:
    keys = {"All prompts": overall} | {task: per_task + task for task in task_names(evaluations, per_task)}
    first, last = (evaluations[0], evaluations[-1] if len(evaluations) > 1 else {}) if evaluations else ({}, {})
    changes = [Change(name, first.get(key), last.get(key)) for name, key in keys.items()]
    return [change for change in changes if change.before is not None or change.after is not None]


def _read(folder: Path, name: str) -> bytes:
    """A file of the run; empty where a run stopped early has not written it."""
    path = inside(folder, name)
    return path.read_bytes() if path.is_file() else b""


def _parse_line(where: str, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise ValueError(f"{where}: not the metrics of a step, which are an object with its number as `step`")
    if wrong := next((name for name, value in row.items() if not _is_metric(name, value)), ""):
        raise ValueError(f"{where}: {wrong!r} is not what a run writes there")
    return row


def _is_metric(name: str, value: Any) -> bool:
    if name == "prompts":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if name == "reward_troubles":
        return isinstance(value, list) and all(isinstance(item, dict) and item.keys() >= TROUBLE for item in value)
    if name in ("allocation", "explored_steps", "entropy", "delta_entropy"):
        return isinstance(value, list) and all(type(item) in (int, float) for item in value)
    may_lack = not name.startswith("eval/") and name not in ("seconds", "forwards", "rollouts", "rows")
    return type(value) in (int, float) or (value is None and may_lack)
