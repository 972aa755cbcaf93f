"""The plain data that flows through a step: prompts -> signals -> plan -> rollouts -> transitions -> loss.

Shape letters: P prompts of a step, N denoising steps, n rollouts of all prompts together, m rows: explored transitions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # a reward that needs no torch is served without it
    from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """One prompt; `id` is its place in the file it came from, so two equal texts stay two prompts."""

    id: int
    text: str
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Conditions:
    """Encoded prompts of a step, and the empty prompt that classifier-free guidance needs.

    Attributes:
        rows: what the network wants to know of each prompt, by name, (P, ...) each: `embeds` is (P, tokens, width), and
            what else there is, a pooled embedding or a mask, depends on the family.
        null: the same of the empty prompt, (1, ...) each.
    """

    rows: dict[str, Tensor]
    null: dict[str, Tensor]

    def __getitem__(self, index: Tensor) -> Conditions:
        return replace(self, rows={name: rows[index] for name, rows in self.rows.items()})


ROUNDING = 1e-6  # of an entropy, in float32


@dataclass(frozen=True)
class Signals:
    """What the probe measured, mean over probed layers, heads and query rows, in nats.

    Attributes:
        entropy: float64 (P, N), attention entropy under the current policy.
        base_entropy: float64 (P, N), the same under the base policy.
    """

    entropy: Tensor
    base_entropy: Tensor

    @property
    def change(self) -> Tensor:
        """H_theta - H_base, float64 (P, N); 0 where it is no more than the rounding of two batches of other shapes."""
        change = self.entropy - self.base_entropy
        return change.where(change.abs() > ROUNDING * self.base_entropy, 0.0)

    @property
    def delta_entropy(self) -> Tensor:
        """|mean_t H_theta - mean_t H_base|, float64 (P,)."""
        return self.change.mean(1).abs()

    @property
    def relative_delta_entropy(self) -> Tensor:
        """The same as a share of mean_t H_base, float64 (P,)."""
        return self.delta_entropy / self.base_entropy.mean(1)


@dataclass(frozen=True)
class Trunk:
    """The noiseless trajectories of some prompts: what their rollouts have in common before they explore.

    Attributes:
        latents: float32 (P, N + 1, ...), from the first latent on.
        velocities: float32 (P, N, ...), after guidance, at each latent but the last; 0 where the trunk has ended.
        prompt: int64 (P,), which of the step's prompts they are of: of all processes, one has each prompt's.
    """

    latents: Tensor
    velocities: Tensor
    prompt: Tensor


@dataclass(frozen=True)
class Plan:
    """Where the step's budget goes.

    Attributes:
        rollouts: int64 (P,), how many images each prompt gets.
        explored: bool (P, N), at which denoising steps they explore; every other step is ODE.
        weight: float64 (P, N), what a row of that prompt and step counts for in the loss.
    """

    rollouts: Tensor
    explored: Tensor
    weight: Tensor

    @property
    def group(self) -> Tensor:
        """The prompt of every rollout, int64 (n,): prompt 0's rollouts first, then prompt 1's."""
        return self.rollouts.new_tensor(range(len(self.rollouts))).repeat_interleave(self.rollouts)


@dataclass(frozen=True)
class Courses:
    """The way of each of n rollouts through the noise schedule's N + 1 points: the plan, worked out.

    Rollouts of one prompt may share their way for a while, as the leaves of a tree do: they are one node then, which
    is computed once and named after the first of them.

    Attributes:
        lands: int64 (n, N), the point at which the step from each point lands; 0 where the rollout does not pass.
        noisy: bool (n, N), where it takes fresh noise; every other step is ODE.
        node: int64 (n, N + 1), the first of the rollouts that are one with it at each point; alone, itself.
        explored: bool (n, N), the steps whose choice is judged by the reward: the noisy ones, or, where none is, the
            noise levels to which the finished image is brought back.
        trained: bool (n, N), those of them that become rows.
    """

    lands: Tensor
    noisy: Tensor
    node: Tensor
    explored: Tensor
    trained: Tensor

    def __getitem__(self, own: slice) -> Courses:
        """Those of rollouts that stand together, whose nodes are named after one of them."""
        assert (self.node[own] >= own.start).all(), "no node is shared with a rollout outside"
        parts = {field.name: getattr(self, field.name)[own] for field in fields(self)}
        return Courses(**parts | {"node": parts["node"] - own.start})

    @property
    def leaves(self) -> Tensor:
        """Each rollout's first noisy step, int64 (n,), N without any: from one first noise, all are one until there."""
        steps = self.noisy.shape[1]
        return self.noisy.int().argmax(1).where(self.noisy.any(1), steps)

    @property
    def children(self) -> Tensor:
        """The node at which each rollout's explored steps land, int64 (n, N); -1 at steps that it does not explore.

        This is what is judged: rollouts of one prompt that explored the same step are compared, those of one node as
        one. Where no step is noisy, every rollout stands for itself.
        """
        landed = self.node.gather(1, self.lands)
        alone = landed.new_tensor(range(len(landed))).unsqueeze(1).expand_as(landed)
        return landed.where(self.noisy, alone).where(self.explored, -1)


@dataclass(frozen=True)
class Transitions:
    """What was explored, one choice a row; rows of all prompts and denoising steps stand together.

    Attributes:
        x, x_next: float32 (m, ...), the latent before and after.
        step, until: int64 (m,), the points of the noise schedule at which those stand. A finished image that was
            brought back to a noise level goes from there to N, the end.
        prompt: int64 (m,), the row of the step's `Conditions`.
        rollout: int64 (m,), the rollout it belongs to, the first one of a node.
        velocity: float32 (m, ...), what the policy that drew it predicted at `x`, after guidance.
        weight: float32 (m,), what it counts for in the loss.
        advantage: float32 (m,).
        unit: int64 (m,), rows that a loss must see together: one number for each such set.
        graph: int64 (m,), the place of its prediction among those whose graphs were kept (`Rollouts.kept`), or -1.
    """

    x: Tensor
    x_next: Tensor
    step: Tensor
    until: Tensor
    prompt: Tensor
    rollout: Tensor
    velocity: Tensor
    weight: Tensor
    advantage: Tensor
    unit: Tensor
    graph: Tensor

    def __len__(self) -> int:
        return len(self.step)

    @property
    def number(self) -> Tensor:
        """int64 (m,), by which each is known among those of all processes."""
        return self.rollout.cpu() * 2**20 + self.step.cpu()

    def __getitem__(self, index: Tensor) -> Transitions:
        return Transitions(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def judged(self, advantage: Tensor, taught: Tensor) -> Transitions:
        """The rows that are to be learned from, with their advantages; both are (n, N): of each rollout's steps."""
        rollout, step = self.rollout.cpu(), self.step.cpu()
        rows = replace(self, advantage=advantage[rollout, step].to(self.x.device))
        return rows[taught[rollout, step].nonzero().flatten()]


@dataclass(frozen=True)
class Rollouts:
    """The rollouts of a step: of all their plan, of this process's part the rest.

    Attributes:
        images: uint8 (k, height, width, 3), of this process's rollouts.
        group: int64 (n,), the prompt of each rollout.
        courses: the way each takes.
        transitions: what this process explored while drawing its own; advantages still zero.
        kept: velocities (b, ...) that still know how they came about, one tensor a forward, if graphs are to be kept.
    """

    images: np.ndarray
    group: Tensor
    courses: Courses
    transitions: Transitions
    kept: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Judgement:
    """What a reward said of n images.

    Attributes:
        score: float32 (n,).
        passed: bool (n,), the strict verdict, for rewards that have one.
    """

    score: np.ndarray
    passed: np.ndarray | None = None


@dataclass(frozen=True)
class Verdict:
    """What all rewards together said of n images.

    Attributes:
        score: float32 (n,), the sum of the rewards by their weights; not a number where it is not `kept`.
        passed: bool (n,), whether it passes by all that have a strict verdict and a weight; None if none has.
        parts: what each reward said, by name.
        rewards: float32 (n, k), of each reward that has a weight; not a number where it is not `kept`.
        weights: k, of those.
        kept: bool (n,), whether it may be learned from and counted; a group is kept whole or not at all.
    """

    score: np.ndarray
    passed: np.ndarray | None
    parts: dict[str, Judgement]
    rewards: np.ndarray
    weights: tuple[float, ...]
    kept: np.ndarray

    @staticmethod
    def joined(verdicts: Sequence[Verdict]) -> Verdict:
        """Verdicts on other images by the same rewards, one after another."""
        parts = {name: _joined([verdict.parts[name] for verdict in verdicts]) for name in verdicts[0].parts}
        whole = _joined([Judgement(verdict.score, verdict.passed) for verdict in verdicts])
        rewards = np.concatenate([verdict.rewards for verdict in verdicts])
        kept = np.concatenate([verdict.kept for verdict in verdicts])
        return Verdict(whole.score, whole.passed, parts, rewards, verdicts[0].weights, kept)

    def plain(self) -> dict[str, Any]:
        """All of it, as JSON has it: numbers are exact."""
        parts = {name: _plain(said) for name, said in self.parts.items()}
        whole = _plain(Judgement(self.score, self.passed))
        rest = {"rewards": self.rewards.tolist(), "weights": list(self.weights), "kept": self.kept.tolist()}
        return {"whole": whole, "parts": parts} | rest

    @staticmethod
    def of(plain: dict[str, Any]) -> Verdict:
        """The verdict that this is `plain` of."""
        whole, parts = _judgement(plain["whole"]), {name: _judgement(one) for name, one in plain["parts"].items()}
        rewards, kept = np.array(plain["rewards"], np.float32), np.array(plain["kept"], bool)
        return Verdict(whole.score, whole.passed, parts, rewards, tuple(plain["weights"]), kept)


def _plain(said: Judgement) -> list[Any]:
    return [said.score.tolist(), None if said.passed is None else said.passed.tolist()]


def _judgement(plain: list[Any]) -> Judgement:
    score, passed = plain
    return Judgement(np.array(score, np.float32), None if passed is None else np.array(passed, bool))


def _joined(said: Sequence[Judgement]) -> Judgement:
    passed = [one.passed for one in said if one.passed is not None]  # fewer where one call of several failed
    score = np.concatenate([one.score for one in said])
    return Judgement(score, np.concatenate(passed) if len(passed) == len(said) else None)


@dataclass(frozen=True)
class Trouble:
    """A reward that cannot be right.

    Attributes:
        reward: its name.
        kind: `failed`, `not_finite`, `out_of_range` or `constant`.
        images: of how many.
        what: the first of them, in one line.
    """

    reward: str
    kind: str
    images: int
    what: str


@dataclass(frozen=True)
class LossOutput:
    """The loss of some rows, and what is logged of it.

    Attributes:
        rows: (n,), each row's loss, to be minimised.
        metrics: (n,) each, without gradient.
    """

    rows: Tensor
    metrics: dict[str, Tensor]

    @property
    def value(self) -> Tensor:
        """The mean over the rows, a scalar."""
        return self.rows.mean()
