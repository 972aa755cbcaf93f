"""Rewards: what judges images; the names of those that are shipped, and a user's own."""

import importlib
import inspect
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from aegpo.config import did_you_mean, reward_terms
from aegpo.types import Judgement

__all__ = ["Reward", "load", "load_one"]

Metadata = Mapping[str, Any]
Judge = Callable[[np.ndarray, Sequence[str], Sequence[Metadata]], Judgement]

SCORERS = (  # each a module here; its `load` takes the settings of that reward
    *("aesthetic", "clipscore", "hpsv21", "imagereward", "jpeg_size", "object_checks", "ocr", "pickscore", "remote"),
    *("vlm", "world"),
)
FRAMES = 8  # of a video that are judged, at most


@dataclass(frozen=True)
class Reward:
    """Judges images; higher is better.

    Attributes:
        name: what it is called in a config, in metrics and in errors.
        judge: uint8 images (n, H, W, 3), n prompts and n metadata mappings -> n scores, and verdicts if it has any.
        range: the lowest and the highest score that it can give.
        groupwise: whether it compares, so that it is to see one prompt's images a call, all of them.
        elsewhere: whether others do the work, so that images are best drawn on while it is asked.
        read: raises ValueError for a prompt and its metadata that it could judge no image for.
    """

    name: str
    judge: Judge
    range: tuple[float, float] = (-math.inf, math.inf)
    groupwise: bool = False
    elsewhere: bool = False
    read: Callable[[str, Metadata], object] = lambda prompt, metadata: None

    def __call__(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> np.ndarray:
        """The scores alone, float32 (n,)."""
        return self.judge(images, prompts, metadata).score


def load(name: str, /, **settings: Any) -> Reward:
    """The reward of that name.

    Args:
        name: one of SCORERS, where `NAME=VALUE` gives its first setting a value, as in `pickscore=FOLDER`; or a
            function or class of the user's own, `file.py:function` or `package.module:function`.
        settings: of that reward, and `range`, which any takes: [lowest, highest] instead of what it says of itself.

    Raises:
        ValueError: no such reward, file or function, no such setting of it, or a scorer's files cannot be had.
    """
    return checked(name, **settings)()


def checked(name: str, /, **settings: Any) -> Callable[[], Reward]:
    """The function that makes a reward of that name, as `load` does; a wrong name or setting is said by now."""
    scorer, has_value, value = name.partition("=")
    limits = settings.pop("range", None)
    if limits is not None:
        limits = _valid(name, "range", limits, tuple[float, float])
        if not limits[0] < limits[1]:
            raise ValueError(f"reward: {name}: range: should be [lowest, highest], got {list(limits)}")
    if scorer in SCORERS:
        if has_value and not value:
            raise ValueError(f"reward: {name!r} has nothing after the =")
        scorer_load = importlib.import_module(f"aegpo.rewards.{scorer}").load
        make = _with_settings(scorer_load, name, [value] if has_value else [], settings)
    elif ":" in name:
        from aegpo.rewards.own import load_own

        make = partial(load_own, name, settings)
    else:
        raise ValueError(
            f"reward: {name!r} is unknown; known are {', '.join(SCORERS)}, and your own as 'my_reward.py:score'"
            f"{did_you_mean(scorer, SCORERS)}"
        )

    def named() -> Reward:
        reward = make()
        judge = on_frames(reward.judge, reward.groupwise)
        return replace(reward, name=name, judge=judge, range=reward.range if limits is None else limits)

    return named


def load_one(reward: str | dict[str, Any]) -> Reward:
    """A reward by name, or by name and settings as in `{vlm: {url: U, model: M}}`; raises ValueError as `load` does."""
    terms = reward_terms(reward)
    if len(terms) != 1:
        raise ValueError(f"reward: one is asked for, and {len(terms)} are named: {', '.join(terms)}")
    [(name, (_, settings))] = terms.items()
    return load(name, **settings)


def on_frames(judge: Judge, groupwise: bool = False) -> Judge:
    """The judge, as one of videos too, uint8 (n, frames, H, W, 3): the mean over a few of the frames, evenly spaced.

    A video passes where all of them do. One that compares sees one frame of each video a call, never two of one.
    """

    def of_videos(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Judgement:
        if images.ndim == 4:
            return judge(images, prompts, metadata)
        chosen = np.linspace(0, images.shape[1] - 1, min(FRAMES, images.shape[1])).round().astype(int)
        if groupwise:
            each = [judge(images[:, at], prompts, metadata) for at in chosen]
            verdicts = [said.passed for said in each if said.passed is not None]
            score = np.stack([said.score for said in each]).mean(0)
            return Judgement(score, np.all(verdicts, axis=0) if verdicts else None)
        count = len(chosen)
        frames = images[:, chosen].reshape(-1, *images.shape[2:])
        said = judge(frames, np.repeat(prompts, count).tolist(), [about for about in metadata for _ in range(count)])
        passed = None if said.passed is None else np.all(said.passed.reshape(-1, count), axis=1)
        return Judgement(said.score.reshape(-1, count).mean(1), passed)

    return of_videos


def _with_settings(
    make: Callable[..., Reward], name: str, first: list[Any], settings: dict[str, Any]
) -> Callable[[], Reward]:
    """`make` with settings; its parameters are the settings there are, and their annotations what these may be."""
    known = list(inspect.signature(make).parameters)
    for setting in settings:
        if setting not in known:
            raise ValueError(
                f"reward: {name} has no setting {setting!r}; it has {', '.join([*known, 'range'])}"
                f"{did_you_mean(setting, known)}"
            )
    if first and not known:
        raise ValueError(f"reward: {name} takes nothing after the =")
    if first and known[0] in settings:
        raise ValueError(f"reward: {name} gives {known[0]} already; it is given again as a setting")
    given = dict(zip(known, first, strict=False)) | settings
    for setting, parameter in inspect.signature(make).parameters.items():
        if setting not in given and parameter.default is inspect.Parameter.empty:
            raise ValueError(f"reward: {name} needs the setting {setting}")
    hints = typing.get_type_hints(make)
    return partial(make, **{setting: _valid(name, setting, value, hints[setting]) for setting, value in given.items()})


def _valid(name: str, setting: str, value: Any, kind: Any) -> Any:
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        wrong = error.errors()[0]
        what = wrong["msg"][0].lower() + wrong["msg"][1:]
        raise ValueError(f"reward: {name}: {setting}: {what}, got {wrong['input']!r}") from None
