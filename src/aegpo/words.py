"""What the words of a command line set: `--a.b VALUE` over a recipe, or over the run that is resumed.

Only the standard library is imported up here, as in `aegpo.cli`.
"""

import difflib
import functools
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aegpo.config import Config

RECIPES = Path(__file__).with_name("recipes")


def split(words: list[str], options: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Part a command's words into those for its own options and arguments, and the settings, nested."""
    from aegpo.config import merge

    left, own, overrides = deque(words), [], {}
    while left:
        word = left.popleft()
        option, equals, text = word.partition("=")
        if not option.startswith("--") or option in (*options, "--"):
            own.append(word)
            continue
        if not equals and left and not left[0].startswith("--"):
            text = left.popleft()
        overrides = merge(overrides, _override(option, text, options))
    return own, overrides


def _override(option: str, text: str, options: Sequence[str]) -> dict[str, Any]:
    """The setting `--a.b-c` as {"a": {"b_c": value}}, even an unknown one: `resolve` says what it should have been."""
    from aegpo.config import settings
    from aegpo.plain import DEPTH

    name = setting_of(option)
    if name.count(".") > DEPTH:
        raise ValueError(f"command line: {name} is not a setting")
    if name not in settings() and difflib.get_close_matches(option, options, cutoff=0.75):
        raise ValueError(f"command line: {option} is not an option{did_you_mean(option, options)}")
    if name in settings() and not text:
        raise ValueError(f"command line: {name} needs a value")
    keys = name.split(".")
    return functools.reduce(lambda inner, key: {key: inner}, reversed(keys), value_of(keys, text))


def setting_of(word: str) -> str:
    """The name of the setting that a word, `--a.b-c` or `--a.b-c=VALUE`, is about: `a.b_c`."""
    return word.partition("=")[0].removeprefix("--").replace("-", "_")


def value_of(keys: list[str], text: str) -> Any:
    """What YAML reads; but if the setting is text then what was typed, so that a folder may be called 2026-01-31."""
    from aegpo.config import Config
    from aegpo.plain import parse_yaml

    named = keys == ["reward"] and not text.lstrip().startswith("{")
    if named and (": " in text or text.startswith("[")):
        raise ValueError(
            f"reward: should be a name, or weights by name, as in '{{pickscore: 1, ocr: 0.5}}', got {text!r}"
        )
    is_text = isinstance(functools.reduce(lambda group, key: getattr(group, key, None), keys, Config()), str)
    if named or (is_text and keys != ["reward"]):
        return text
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"command line: {'.'.join(keys)}: {text!r} is not a YAML value ({error})") from None


def config_of(recipe: str | None, resume: str | None, overrides: dict[str, Any]) -> "Config":
    """The command line over the recipe, or over the config of the run that is resumed; an error names the wrong one."""
    from aegpo.config import load_yaml, merge, resolve

    if resume and recipe is None:
        folder = _resumed_run(resume, overrides)
        path = folder / "config.yaml"
        layer = load_yaml(path)
        if "output_dir" not in layer:  # the last that a run writes there
            raise ValueError(f"{path} is cut off: it should end in output_dir; without the rest there is no going on")
        layer = merge(layer, {"output_dir": str(folder)})  # it stays in its folder, even if that was moved
    else:
        path = recipe_file("world" if recipe is None else recipe)
        model = overrides.get("model")
        foreign = isinstance(model, dict) and model.get("path", "world") != "world"
        layer = {} if foreign and recipe is None else load_yaml(path)  # the world's recipe is for the world's model
    try:
        return resolve(layer, overrides)
    except ValueError as error:
        source = f"recipe {path}" if _complaint(layer) == str(error) else "command line"
        raise ValueError(f"{source}: {error}") from None


def _complaint(layer: dict[str, Any]) -> str:
    """What `resolve` has against a layer alone."""
    from aegpo.config import resolve

    try:
        resolve(layer)
    except ValueError as error:
        return str(error)
    return ""


def _resumed_run(resume: str, overrides: dict[str, Any]) -> Path:
    """The folder of the run that `--resume` means."""
    from aegpo.config import Config

    if (Path(resume) / "config.yaml").is_file():
        raise ValueError(f"--resume {resume}: a run, not one of its checkpoints; --resume latest --output-dir {resume}")
    latest = Path(str(overrides.get("output_dir", Config.output_dir)))
    folder = latest if resume == "latest" else Path(resume).parent
    if not (folder / "config.yaml").is_file():
        hint = "; give its --output-dir" if resume == "latest" and "output_dir" not in overrides else ""
        raise ValueError(f"--resume {resume}: {folder} is not the folder of a run: it holds no config.yaml{hint}")
    return folder


def recipe_file(name: str) -> Path:
    """The file of a recipe, by its path or by the name of one that is packaged; raises ValueError if it is neither."""
    files = sorted(RECIPES.rglob("*.yaml"))
    packaged = {file.relative_to(RECIPES).with_suffix("").as_posix(): file for file in files}
    path = Path(name)
    if not name:
        raise ValueError("recipe: its name is empty; leave it out for the embedded world")
    if path.is_file() or (path.exists() and name not in packaged):
        return path
    if name in packaged:
        return packaged[name]
    beside = [str(file) for file in path.parent.glob("*.y*ml")]
    hint = did_you_mean(name, [*packaged, *beside])
    raise ValueError(f"recipe {name} does not exist; the packaged recipes are {', '.join(packaged)}{hint}")


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """A hint at the known word that is closest, if one is close."""
    from aegpo import config

    return config.did_you_mean(word, known)
