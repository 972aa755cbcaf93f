"""All rewards of a run together: asked at once, checked, and summed by their weights."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from threading import Thread

import numpy as np
from torch import Tensor

from aegpo.config import Checks, Config, reward_terms
from aegpo.distributed import ALONE, Team
from aegpo.rewards import Reward, load
from aegpo.types import Judgement, Prompt, Trouble, Verdict

CONSTANT = 20  # groups in a row in which a reward says the same number of every image


@dataclass(frozen=True)
class _Answer:
    """What a reward said of n images; where it `failed`, bool (n,), the score is not a number and `error` says why."""

    said: Judgement
    failed: np.ndarray
    error: Exception | None


class Panel:
    """The rewards of a run.

    Args:
        terms: each reward, by name, and its weight; one of weight 0 is asked in evaluations alone.
        checks: what happens where one of them cannot be right.
    """

    def __init__(self, terms: Mapping[str, tuple[Reward, float]], checks: Checks) -> None:
        self.terms, self.checks = terms, checks
        self.elsewhere = any(reward.elsewhere for reward, weight in terms.values() if weight)
        self.groupwise = any(reward.groupwise for reward, weight in terms.values() if weight)
        self._met: list[Trouble] = []
        self._alike: dict[str, tuple[float, int]] = {}  # what a reward said of all images in so many groups in a row

    def judge(
        self, images: np.ndarray, asked: Sequence[Prompt], group: Sequence[int] | None = None, training: bool = False
    ) -> Verdict:
        """Ask, and wait for the answer; see `ask`."""
        return self.ask(images, asked, group, training)()

    def ask(
        self, images: np.ndarray, asked: Sequence[Prompt], group: Sequence[int] | None = None, training: bool = False
    ) -> Callable[[], Verdict]:
        """Ask all rewards; those elsewhere work on their answers from now on, the others have answered on return.

        Args:
            images: uint8 (n, H, W, 3), or videos (n, frames, H, W, 3).
            asked: n, the prompt of each.
            group: n, the group of each, all of which are here; by default, the prompt's id.
            training: whether to leave out rewards of weight 0.

        Returns:
            A function that waits for the answers and checks them; it raises ValueError where a check says `stop`.
        """
        group = [prompt.id for prompt in asked] if group is None else list(group)
        pending: dict[str, Callable[[], _Answer]] = {}
        for name, (reward, weight) in self.terms.items():
            if not weight and training:
                continue
            apart = self.checks.failed == "drop" and not reward.elsewhere
            ask = partial(_answer, reward, images, asked, group, apart)
            pending[name] = (_in_background if reward.elsewhere else _at_once)(ask).result
        return partial(self._verdict, pending, asked, group)

    def try_out(self, prompts: Sequence[Prompt], where: str, training: bool = False) -> None:
        """Let them read all prompts, and judge a black and a white picture for the first; `training` as in `ask`.

        Raises:
            ValueError: one fails, whatever the checks say of failures; it says `where` the prompts are from.
        """
        black_and_white = np.zeros((2, 32, 32, 3), np.uint8)
        black_and_white[1] = 255
        for reward, weight in self.terms.values():
            if not weight and training:
                continue
            try:
                for prompt in prompts:
                    reward.read(prompt.text, prompt.metadata)
                answer = _answer(reward, black_and_white, [prompts[0]] * 2, [0, 0])
                if answer.error:
                    raise _in_a_line(reward, answer.error)
            except ValueError as error:
                raise ValueError(f"{error} (tried on a prompt of {where})") from error

    def troubles(self) -> list[Trouble]:
        """What was met since this was last asked for."""
        met, self._met = self._met, []
        return met

    def state(self) -> dict[str, tuple[float, int]]:
        """What is remembered from step to step, for a checkpoint: how long each reward has said which number."""
        return {name: (float(value), groups) for name, (value, groups) in self._alike.items() if groups}

    def restore(self, state: Mapping[str, Sequence[float]]) -> None:
        """Go on from what `state` gave."""
        self._alike = {name: (value, int(groups)) for name, (value, groups) in state.items()}

    def watch(self, verdict: Verdict, group: Sequence[int]) -> None:
        """Look for a reward that says the same of every image, step after step.

        Args:
            verdict: on all images of a training step.
            group: n, the group of each.
        """
        for name, said in verdict.parts.items():
            for members in _members(group):
                value, groups = self._alike.get(name, (np.nan, 0))
                scores = said.score[members]
                alike = (scores == scores[0]).all()
                groups = groups + 1 if alike and scores[0] == value else int(alike)
                if groups == CONSTANT:
                    what = f"reward {name} said {scores[0]:g} of every image in {CONSTANT} groups in a row"
                    self._meet(name, "constant", len(scores), what)
                    groups = 0
                self._alike[name] = scores[0], groups

    def _verdict(
        self, pending: Mapping[str, Callable[[], _Answer]], asked: Sequence[Prompt], group: Sequence[int]
    ) -> Verdict:
        parts: dict[str, Judgement] = {}
        kept, counted, weights = np.ones(len(asked), bool), [], []
        for name, wait in pending.items():
            answer, weight = wait(), self.terms[name][1]
            parts[name] = answer.said
            sound = self._checked(name, answer, asked)
            if weight:
                kept &= sound
                counted.append(answer.said)
                weights.append(weight)
        rewards = np.stack([said.score for said in counted], 1)
        score = sum(weight * one.astype(float) for weight, one in zip(weights, rewards.T, strict=True))
        verdicts = [said.passed for said in counted if said.passed is not None]
        passed = np.logical_and.reduce(verdicts) if verdicts else None
        verdict = Verdict(np.asarray(score, np.float32), passed, parts, rewards, tuple(weights), kept)
        return _whole_groups(verdict, group)

    def _checked(self, name: str, answer: _Answer, asked: Sequence[Prompt]) -> np.ndarray:
        """Which of the images may be learned from, bool (n,), as far as this reward goes."""
        score, (low, high) = answer.said.score, self.terms[name][0].range
        not_finite = ~np.isfinite(score) & ~answer.failed
        outside = np.isfinite(score) & ((score < low) | (score > high))
        for kind, which, rule in (
            ("failed", answer.failed, ""),
            ("not_finite", not_finite, "numbers must be finite"),
            ("out_of_range", outside, f"its range is {low:g} to {high:g}"),
        ):
            if count := int(which.sum()):
                first = int(which.argmax())
                said = f"reward {name} said {score[first]:g} of an image for {asked[first].text!r:.200}; {rule}"
                if kind == "failed":
                    assert answer.error
                    self._meet(name, kind, count, str(_in_a_line(self.terms[name][0], answer.error)), answer.error)
                else:
                    self._meet(name, kind, count, said)
        return ~answer.failed & ~not_finite & ~(outside & (self.checks.out_of_range == "drop"))

    def _meet(self, name: str, kind: str, images: int, what: str, cause: Exception | None = None) -> None:
        if getattr(self.checks, kind) == "stop":
            others = "warn" if kind == "constant" else "drop"
            raise ValueError(f"{what}; reward_checks.{kind} {others} would go on") from cause
        self._met.append(Trouble(name, kind, images, what))


class Inquiry:
    """What a panel is asked about pictures, some after others, by the processes that drew them.

    Args:
        panel: of rewards.
        asked: n, the prompt of each picture.
        group: n, the group of each.
        team: the processes, each of which asks about some that stand together, the first about the first.
        training: whether the pictures are rollouts, of which rewards of weight 0 are not asked.
    """

    def __init__(
        self, panel: Panel, asked: Sequence[Prompt], group: Sequence[int], team: Team = ALONE, training: bool = True
    ) -> None:
        self.panel, self.asked, self.group, self.team, self.training = panel, asked, group, team, training
        self._answers: list[Callable[[], Verdict]] = []
        self._places: list[int] = []

    def ask(self, images: np.ndarray, places: Tensor) -> None:
        """Ask about some of them, uint8 (k, H, W, 3), the next k in order; `places` is int64 (k,)."""
        own = places.tolist()
        self._places += own
        assert self._places == list(range(self._places[0], own[-1] + 1)), "the next in order"
        asked, group = [self.asked[i] for i in own], [self.group[i] for i in own]
        self._answers.append(self.panel.ask(images, asked, group, self.training))

    def verdict(self, progress: Callable[[int], None] = lambda _: None) -> Verdict:
        """Wait for the answers, of which `progress` is told, put all processes' together, and watch the panel."""
        verdicts = []
        with self.team.agreed():
            for answer in self._answers:
                verdicts.append(answer())
                progress(len(verdicts[-1].score))
        if self.team.size > 1:
            own = Verdict.joined(verdicts).plain() if verdicts else None
            verdicts = [Verdict.of(one) for one in self.team.tell(own) if one]
        verdict = _whole_groups(Verdict.joined(verdicts), self.group)
        with self.team.agreed():
            if self.training and self.team.is_first:
                self.panel.watch(verdict, self.group)
        return verdict


def _whole_groups(verdict: Verdict, group: Sequence[int]) -> Verdict:
    """A verdict that keeps a group whole or not at all."""
    dropped = {one for one, is_kept in zip(group, verdict.kept, strict=True) if not is_kept}
    kept = np.array([one not in dropped for one in group], bool)
    score = np.where(kept, verdict.score, np.float32(np.nan))
    rewards = np.where(kept[:, None], verdict.rewards, np.float32(np.nan))
    return replace(verdict, score=score, rewards=rewards, kept=kept)


def alone(reward: Reward) -> Panel:
    """A panel of one reward, with the checks that are the default."""
    return Panel({reward.name: (reward, 1.0)}, Checks())


def load_panel(config: Config) -> Panel:
    """The rewards of a config; raises ValueError where one cannot be had."""
    terms = reward_terms(config.reward)
    return Panel({name: (load(name, **own), weight) for name, (weight, own) in terms.items()}, config.reward_checks)


def _answer(
    reward: Reward, images: np.ndarray, asked: Sequence[Prompt], group: Sequence[int], apart: bool = False
) -> _Answer:
    """One reward's answer, in one call, or in one a group if it is groupwise, or if that fails and `apart` says so."""
    calls = list(_members(group)) if reward.groupwise else [np.arange(len(images))]
    score, failed = np.full(len(images), np.nan, np.float32), np.zeros(len(images), bool)
    passed: np.ndarray | None = None
    error: Exception | None = None
    while calls:
        places = calls.pop(0)
        prompts = [asked[i] for i in places.tolist()]
        try:
            said = reward.judge(images[places], [one.text for one in prompts], [one.metadata for one in prompts])
            for part in (said.score, said.passed):
                if part is not None and part.shape != (len(places),):
                    raise ValueError(f"reward {reward.name} returned shape {part.shape} for {len(places)} images")
        except Exception as wrong:  # whatever a reward may raise
            groups = list(_members([group[i] for i in places.tolist()]))
            if apart and len(groups) > 1:
                calls += [places[members] for members in groups]
            else:
                failed[places], error = True, error or wrong
            continue
        score[places] = said.score
        if said.passed is not None:
            passed = np.zeros(len(images), bool) if passed is None else passed
            passed[places] = said.passed
    return _Answer(Judgement(score, passed), failed, error)


def _in_a_line(reward: Reward, error: Exception) -> ValueError:
    """The error as users are told of it: a reward's own line as it is, anything else with its kind."""
    if isinstance(error, ValueError):
        return error
    line = ValueError(f"reward {reward.name} failed: {type(error).__name__}: {error}")
    line.__cause__ = error
    return line


def _at_once(ask: Callable[[], _Answer]) -> Future[_Answer]:
    answer: Future[_Answer] = Future()
    answer.set_result(ask())
    return answer


def _in_background(ask: Callable[[], _Answer]) -> Future[_Answer]:
    """Let a thread ask, for which a program that is stopped does not wait."""
    answer: Future[_Answer] = Future()

    def work() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:  # or whoever waits would wait for ever
            answer.set_exception(error)

    Thread(target=work, name="reward", daemon=True).start()
    return answer


def _members(group: Sequence[int]) -> Iterable[np.ndarray]:
    """The places of each group, in the order in which groups begin."""
    ids = np.asarray(group)
    return (np.flatnonzero(ids == one) for one in dict.fromkeys(group))
