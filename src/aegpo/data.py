"""Prompts from a file or from the embedded world, and their deterministic draw."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aegpo.types import Prompt

DRAW = 5  # what a random choice is for: the first number of its key


def named(source: str, split: str, option: str | None = None) -> str:
    """How errors name prompts: by the setting, or by the option that gave them, and their source."""
    return f"{option or f'prompts.{split}'}: {source}"


def load_prompts(source: str, split: str, option: str | None = None) -> list[Prompt]:
    """Read prompts.

    Args:
        source: `world` for the embedded prompts, a .txt with one prompt a line (empty lines are skipped), or a .jsonl
            whose objects hold `prompt` and any metadata the reward may want.
        split: `train` or `eval`: which of the world's sets.
        option: of the command line that gave the source, for errors; by default they name the setting.

    Raises:
        ValueError: the file is missing, empty, not UTF-8, or a line of it is not a prompt.
    """
    where = named(source, split, option)
    if source == "world":
        from aegpo import world

        rows: list[dict[str, Any]] = world.training() if split == "train" else world.held_out()
        return _prompts(rows, where)
    path = Path(source)
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{where} must be a .txt (one prompt a line), a .jsonl (with a 'prompt' key), or 'world'")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror}") from None
    if path.suffix == ".txt":
        return _prompts([{"prompt": line.strip()} for line in lines if line.strip()], where)
    return _prompts([_row(line, f"{where}, line {i}") for i, line in enumerate(lines, 1) if line.strip()], where)


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg}") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise ValueError(f"{where} must be an object with a non-empty text under 'prompt'")
    return row


def _prompts(rows: list[dict[str, Any]], where: str) -> list[Prompt]:
    if not rows:
        raise ValueError(f"{where} holds no prompt; write one a line")
    return [Prompt(i, row["prompt"], {k: v for k, v in row.items() if k != "prompt"}) for i, row in enumerate(rows)]


def draw(prompts: Sequence[Prompt], count: int, seed: int, step: int) -> list[Prompt]:
    """The prompts of a training step: each epoch is a fresh permutation, and no prompt stands twice in one step.

    What an epoch has left over when it cannot fill a step is not drawn in that epoch.

    Raises:
        ValueError: fewer prompts than a step needs.
    """
    if len(prompts) < count:
        raise ValueError(f"prompts_per_step: a step takes {count} prompts, but prompts.train holds only {len(prompts)}")
    epoch, batch = divmod(step, len(prompts) // count)
    order = np.random.default_rng([DRAW, seed, epoch]).permutation(len(prompts))
    return [prompts[i] for i in order[batch * count : (batch + 1) * count]]
