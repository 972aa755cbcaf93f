"""Rewards as Ray actors, which judge for all workers of a run, as many as are wanted, on whatever machines have room.

Images and scores go by Ray's own transport, which pickles and is between the machines of one user; files that users
exchange never are. An actor that is lost is started again by Ray, and what it was asked is asked again.
"""

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import ray
import ray.exceptions

from aegpo.config import Config
from aegpo.rewards import Metadata, Reward
from aegpo.rewards.panel import Panel, load_panel
from aegpo.types import Judgement

RETRIES = 3  # of a call that lost its actor


def start(config: Config, count: int, gpus: float = 0) -> list[Any]:
    """Handles of so many actors, each of which reserves a CPU and this part of a GPU.

    Args:
        config: a resolved config; where it names files, they are meant from the folder that we are in.
        count: actors.
        gpus: of each.
    """
    kind = ray.remote(Judges).options(num_cpus=1, num_gpus=gpus, max_restarts=-1, max_task_retries=RETRIES)
    return [kind.remote(config, os.getcwd()) for _ in range(count)]


def about(actors: Sequence[Any]) -> list["About"]:
    """What the actors say of their rewards; raises ValueError where one cannot be had."""
    return _said(actors[0].about.remote())


@dataclass(frozen=True)
class About:
    """What is to be known of a reward that is elsewhere; `reads` is whether it looks at prompts before a run."""

    name: str
    weight: float
    range: tuple[float, float]
    groupwise: bool
    reads: bool


class Judges:
    """An actor with its own copy of a config's rewards, which it loads when first asked.

    Args:
        config: a resolved config.
        where: the folder that relative paths are meant from.
    """

    def __init__(self, config: Config, where: str) -> None:
        self.config, self.where = config, where
        self.loaded: Panel | None = None

    def about(self) -> list[About]:
        """What they are; raises ValueError where one cannot be had."""
        default = Reward.__dataclass_fields__["read"].default
        return [
            About(name, weight, reward.range, reward.groupwise, reward.read is not default)
            for name, (reward, weight) in self._panel().terms.items()
        ]

    def read(self, name: str, prompt: str, metadata: Metadata) -> None:
        """See `Reward.read`."""
        self._panel().terms[name][0].read(prompt, metadata)

    def judge(self, name: str, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Judgement:
        """See `Reward.judge`."""
        return self._panel().terms[name][0].judge(images, prompts, metadata)

    def process(self) -> int:
        """The id of its process."""
        return os.getpid()

    def _panel(self) -> Panel:
        if self.loaded is None:
            if os.path.isdir(self.where):
                os.chdir(self.where)
            self.loaded = load_panel(self.config)
        return self.loaded


class Pool:
    """The actors, as one worker asks them, from any number of threads.

    Args:
        actors: handles of `Judges`.
        first: the place of the one to begin with.
    """

    def __init__(self, actors: Sequence[Any], first: int = 0) -> None:
        self.actors = [*actors[first % len(actors) :], *actors[: first % len(actors)]]
        self.asked = [0] * len(actors)
        self.lock = threading.Lock()

    def judge(
        self, about: About, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Judgement:
        """What they say of the images, which are dealt among them, unless the reward compares."""
        parts = 1 if about.groupwise else min(len(self.actors), len(images))
        edges = np.linspace(0, len(images), max(parts, 1) + 1).astype(int)
        taken: list[int] = []
        pending: list[Any] = []
        try:
            for begin, end in pairwise(edges.tolist()):
                taken.append(self._take())
                judge, part = self.actors[taken[-1]].judge, slice(begin, end)
                pending.append(judge.remote(about.name, images[part], list(prompts[part]), list(metadata[part])))
            said = [_said(one) for one in pending]
        finally:
            with self.lock:
                for place in taken:
                    self.asked[place] -= 1
        verdicts = [one.passed for one in said if one.passed is not None]
        passed = np.concatenate(verdicts) if len(verdicts) == len(said) else None
        return Judgement(np.concatenate([one.score for one in said]), passed)

    def read(self, about: About, prompt: str, metadata: Metadata) -> None:
        """Let one of them read a prompt; raises ValueError as the reward does."""
        _said(self.actors[0].read.remote(about.name, prompt, metadata))

    def _take(self) -> int:
        """The place of the one that is asked least."""
        with self.lock:
            place = int(np.argmin(self.asked))
            self.asked[place] += 1
        return place


def ask(config: Config, actors: Sequence[Any], about: Sequence[About], first: int = 0) -> Panel:
    """A config's panel whose rewards are judged by actors.

    Args:
        config: a resolved config.
        actors: handles of `Judges` of that config.
        about: what they say of their rewards.
        first: the place of the actor to begin with.
    """
    pool = Pool(actors, first)
    terms = {}
    for one in about:
        judge = partial(pool.judge, one)
        reward = Reward(one.name, judge, one.range, one.groupwise, elsewhere=True)
        terms[one.name] = (replace(reward, read=partial(pool.read, one)) if one.reads else reward), one.weight
    return Panel(terms, config.reward_checks)


def _said(asked: Any) -> Any:
    """What an actor says; what its reward raised is raised as it was there."""
    try:
        return ray.get(asked)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayActorError:
        raise ValueError(f"a reward actor was lost, {1 + RETRIES} times over the same images") from None
