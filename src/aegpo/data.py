"""Prompts from a file, a data set or the embedded world, and their deterministic draw."""

import json
import os
import re
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aegpo.config import Config
from aegpo.types import Prompt

DRAW = 5  # what a random choice is for: the first number of its key
TEXT = ("prompt", "caption", "text")  # columns of a data set that may hold the prompt; the first there is does
SPACE = "\t\n\v\f\r\x85"  # control characters that a text may hold
SPLITS = {"train": ("train",), "eval": ("test", "validation")}  # of a data set, by the setting; the first there is
PLAIN = re.compile("(large_)?string|bool|null|u?int[0-9]+|float[0-9]+")  # types that JSON has too


def named(source: str, split: str, option: str | None = None) -> str:
    """How errors name prompts: by the setting, or by the option that gave them, and their source."""
    return f"{option or f'prompts.{split}'}: {source}"


def load_prompts(source: str, split: str, option: str | None = None) -> list[Prompt]:
    """Read prompts.

    Args:
        source: `world` for the embedded prompts, a .txt with one prompt a line (empty lines are skipped), or a .jsonl
            whose objects hold `prompt` and any metadata the reward may want; or a data set, a folder or `user/name` of
            the Hub, and after it maybe `:split`. Its prompts stand under the first of TEXT that holds text, and all
            columns that JSON could hold are metadata; others, images say, are left out unread.
        split: `train` or `eval`: which of the world's sets, and by default of a data set's splits (SPLITS).
        option: of the command line that gave the source, for errors; by default they name the setting.

    Raises:
        ValueError: the file is missing, empty, not UTF-8, or a line of it is not a prompt; or the data set cannot be
            read, or holds no such split, no text or an empty one.
    """
    where = named(source, split, option)
    if source == "world":
        from aegpo import world

        rows: list[dict[str, Any]] = world.training() if split == "train" else world.held_out()
        return _prompts(rows, where)
    path = Path(source)
    if _is_data_set(source):
        return _data_set(source, split, where)
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(
            f"{where} must be a .txt (one prompt a line), a .jsonl (with a 'prompt' key), 'world', "
            f"or a data set (a folder, or user/name of the Hub)"
        )
    if path.exists() and not path.is_file():  # a device might never end
        raise ValueError(f"{where} is not a file")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror}") from None
    read = _text_row if path.suffix == ".txt" else _json_row
    return _prompts([read(line, f"{where}, line {i}") for i, line in enumerate(lines, 1) if line.strip()], where)


def prompts_of(config: Config, split: str, option: str | None = None) -> list[Prompt]:
    """The prompts that a config names as `train` or `eval`, as `load_prompts` reads them; its model has to know their
    words, or ValueError is raised.
    """
    source = getattr(config.prompts, split)
    prompts = load_prompts(source, split, option)
    refuse_unknown_words(config, [prompt.text for prompt in prompts], named(source, split, option))
    return prompts


def refuse_unknown_words(config: Config, prompts: Sequence[str], where: str) -> None:
    """The embedded tokenizer spells unknown words out in letters the model never saw; raise ValueError instead."""
    if config.model.path != "world":
        return
    from aegpo import world

    for prompt in prompts:
        if len(prompt.split()) > world.MAX_WORDS:
            raise ValueError(f"{where}: {prompt!r} is longer than the {world.MAX_WORDS} words the embedded model reads")
        if unknown := world.unknown_words(prompt):
            raise ValueError(
                f"{where}: the embedded model does not know {unknown[0]!r} in {prompt!r}; "
                f"it knows {', '.join(sorted(world.words()))}"
            )


def _text_row(line: str, where: str) -> dict[str, Any]:
    return {"prompt": _readable(line.strip(), where)}


def _json_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line, parse_constant=_no_number, object_pairs_hook=_each_once)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg}") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{where} is not JSON that can be read: it is nested too deep") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise ValueError(f"{where} must be an object with a non-empty text under 'prompt'")
    if not isinstance(row.get("task"), str | int | None):
        raise ValueError(f"{where} has a 'task' that is not text, by which evaluations are summed up")
    try:
        if "\\u" in line:
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} holds half of a pair of surrogates, which is no letter") from None
    _readable(row["prompt"], where)
    return row


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice")
    return row


def _readable(prompt: str, where: str) -> str:
    """The prompt, unless it holds control characters, which are no text."""
    odd = next((letter for letter in prompt if unicodedata.category(letter) == "Cc" and letter not in SPACE), "")
    if odd:
        raise ValueError(f"{where} holds {odd!r}, which is no letter; is it a text file?")
    return prompt


def _prompts(rows: list[dict[str, Any]], where: str) -> list[Prompt]:
    if not rows:
        raise ValueError(f"{where} holds no prompt; write one a line")
    return [Prompt(i, row["prompt"], {k: v for k, v in row.items() if k != "prompt"}) for i, row in enumerate(rows)]


def _is_data_set(source: str) -> bool:
    """Whether it names a folder, or what may be one of the Hub's data sets."""
    name, _ = _name_and_split(source)
    on_the_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not name.endswith((".txt", ".jsonl"))
    return os.path.isdir(name) or (bool(on_the_hub) and not Path(source).exists())


def _name_and_split(source: str) -> tuple[str, str]:
    """The parts of `name:split`; the split is empty where none is asked for."""
    name, _, split = (source, "", "") if os.path.isdir(source) else source.partition(":")
    return name, split


def _data_set(source: str, split: str, where: str) -> list[Prompt]:
    name, asked = _name_and_split(source)
    wanted = (asked,) if asked else SPLITS[split]
    splits = _load_splits(name, where)
    chosen = next((split for split in wanted if split in splits), None)
    if chosen is None:
        raise ValueError(
            f"{where} has no split {' or '.join(map(repr, wanted))}, only {', '.join(splits)}; "
            f"say which, as in {name}:{next(iter(splits))}"
        )
    rows = splits[chosen]
    text = next((column for column in TEXT if _holds_text(rows.features.get(column))), None)
    if text is None:
        raise ValueError(
            f"{where} has no text under 'prompt', 'caption' or 'text'; its columns are {', '.join(rows.column_names)}"
        )
    rows = list(rows.select_columns([column for column, kind in rows.features.items() if _is_json(kind)]))
    for i, row in enumerate(rows):
        if not (row[text] or "").strip():
            raise ValueError(f"{where}, row {i} of {chosen}, has an empty {text!r}")
    return [Prompt(i, row[text], {k: v for k, v in row.items() if k != text}) for i, row in enumerate(rows)]


def _load_splits(name: str, where: str) -> Any:
    """The data set's splits by name, as `datasets` gives them."""
    try:
        import datasets

        if int(datasets.__version__.partition(".")[0]) < 4:  # it would run a data set's own code
            raise ImportError
    except ImportError:
        raise ValueError(
            f"{where} is a data set, which the library datasets reads, from 4.0 on: pip install 'aegpo[datasets]'"
        ) from None
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name)
    except Exception as error:  # of the Hub, the network or a file's format: each has its own kinds
        raise ValueError(f"{where} cannot be read as a data set: {' '.join(str(error).split())}") from error


def _holds_text(kind: Any) -> bool:
    return getattr(kind, "dtype", None) in ("string", "large_string")


def _is_json(kind: Any) -> bool:
    """Whether a column of that type of `datasets` holds what JSON can: texts, numbers, lists and objects of them."""
    if isinstance(kind, dict):
        return all(map(_is_json, kind.values()))
    if hasattr(kind, "feature"):  # of the items of a list
        return _is_json(kind.feature)
    return type(kind).__name__ == "Json" or bool(PLAIN.fullmatch(str(getattr(kind, "dtype", ""))))


def ahead(prompts: Sequence[Prompt], config: Config) -> list[Prompt]:
    """The prompts that a run draws in all its steps, each once, in the order of their file."""
    epoch = len(prompts) // config.prompts_per_step
    if config.steps >= epoch:
        return list(prompts)
    drawn = {p.id for step in range(config.steps) for p in draw(prompts, config.prompts_per_step, config.seed, step)}
    return [prompt for prompt in prompts if prompt.id in drawn]


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
