"""Rewards: callables on images, prompts and metadata."""

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from aegpo.config import did_you_mean
from aegpo.types import Judgement

__all__ = ["Reward", "load"]

SCORERS = "clipscore", "hpsv21", "imagereward", "pickscore"  # each a module here, with `load`
FRAMES = 8  # of a video that are judged, at most


class Reward(Protocol):
    """Judges n images; higher is better."""

    def __call__(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Judgement:
        """Judge uint8 images (n, H, W, 3)."""
        ...


def load(name: str) -> Reward:
    """The reward of that name.

    Args:
        name: `world`; one of SCORERS, whose files come from the Hub, or from a folder, as in `pickscore=FOLDER`; or a
            function of the user's own, `file.py:function` or `package.module:function`. It is called with the images,
            uint8 (n, H, W, 3), and the n prompts, and with the n metadata mappings if it takes a third argument; it
            returns n numbers. Of a video it judges frames.

    Raises:
        ValueError: no such reward, file or function, or a scorer's files cannot be had.
    """
    if name == "world":
        from aegpo import world

        return on_frames(lambda images, prompts, metadata: Judgement(*world.verify(images, prompts, metadata)))
    scorer, has_folder, folder = name.partition("=")
    if scorer in SCORERS:
        if has_folder and not folder:
            raise ValueError(f"reward: {name!r} names no folder after the =")
        return on_frames(importlib.import_module(f"aegpo.rewards.{scorer}").load(folder or None))
    if ":" not in name:
        known = ("world", *SCORERS)
        raise ValueError(
            f"reward: {name!r} is unknown; known are {', '.join(known)}, and your own as 'my_reward.py:score'"
            f"{did_you_mean(scorer, known)}"
        )
    return on_frames(_checked(_import(name), name))


def on_frames(reward: Reward) -> Reward:
    """The reward, as one of videos too, uint8 (n, frames, H, W, 3): the mean over a few of the frames, evenly spaced.

    A video passes where all of them do.
    """

    def judge(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Judgement:
        if images.ndim == 4:
            return reward(images, prompts, metadata)
        chosen = np.linspace(0, images.shape[1] - 1, min(FRAMES, images.shape[1])).round().astype(int)
        count = len(chosen)
        frames = images[:, chosen].reshape(-1, *images.shape[2:])
        said = reward(frames, np.repeat(prompts, count).tolist(), [about for about in metadata for _ in range(count)])
        passed = None if said.passed is None else np.all(said.passed.reshape(-1, count), axis=1)
        return Judgement(said.score.reshape(-1, count).mean(1), passed)

    return judge


def _import(name: str) -> Callable[..., Any]:
    where, _, attribute = name.rpartition(":")
    if not where:
        raise ValueError(f"reward: {name!r} names no file or module before the colon")
    if where.endswith(".py") and not Path(where).is_file():
        raise ValueError(f"reward: file {where} does not exist")
    try:
        if where.endswith(".py"):
            sys.path.append(str(Path(where).resolve().parent))  # last: nothing there takes the place of a module
            spec = importlib.util.spec_from_file_location(f"aegpo_reward_{Path(where).stem}", where)
            assert spec and spec.loader
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        else:
            sys.path.insert(0, str(Path.cwd()))
            module = importlib.import_module(where)
    except ImportError as error:
        raise ValueError(f"reward: {where} cannot be imported: {error}") from None
    except SyntaxError as error:
        raise ValueError(f"reward: {where} is not valid Python: line {error.lineno}: {error.msg}") from None
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"reward: {where} has no function {attribute!r}")
    return function


def _checked(function: Callable[..., Any], name: str) -> Reward:
    """The user's function with its answer checked: n finite numbers."""
    takes_metadata = _takes_metadata(function)

    def reward(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Judgement:
        try:
            answer = function(images, prompts, metadata) if takes_metadata else function(images, prompts)
        except (Exception, SystemExit) as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{frame.filename}, line {frame.lineno}"
            raise ValueError(f"reward {name} failed at {where}: {type(error).__name__}: {error}") from error
        try:
            score = np.asarray(answer, dtype=np.float32)
        except (TypeError, ValueError):
            raise ValueError(f"reward {name} returned something that is not numbers: {answer!r:.80}") from None
        if score.shape != (len(images),):
            raise ValueError(
                f"reward {name} returned shape {score.shape} for {len(images)} images; one number each is due"
            )
        if not np.isfinite(score).all():
            raise ValueError(
                f"reward {name} returned {score[~np.isfinite(score)][0]} for an image; numbers must be finite"
            )
        return Judgement(score)

    return reward


def _takes_metadata(function: Callable[..., Any]) -> bool:
    """Whether it has a third positional argument without a default."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind in positional]
    return len(parameters) > 2 and parameters[2].default is inspect.Parameter.empty
