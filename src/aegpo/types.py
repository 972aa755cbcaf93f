"""The plain data that flows through a step: prompts -> signals -> plan -> rollouts -> transitions -> loss.

Shape letters: P prompts of a step, N denoising steps, n rollouts of all prompts together, m explored transitions.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
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
        embeds: (P, tokens, width) the transformer's text tokens.
        pooled: (P, width).
        null_embeds: (1, tokens, width).
        null_pooled: (1, width).
    """

    embeds: Tensor
    pooled: Tensor
    null_embeds: Tensor
    null_pooled: Tensor

    def __getitem__(self, index: Tensor) -> "Conditions":
        return replace(self, embeds=self.embeds[index], pooled=self.pooled[index])


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
    """The noiseless trajectory of each prompt: what its rollouts have in common before they explore.

    Attributes:
        latents: float32 (P, N + 1, ...), from the first latent on.
        velocities: float32 (P, N, ...), after guidance, at each latent but the last; 0 where the trunk has ended.
    """

    latents: Tensor
    velocities: Tensor

    def __getitem__(self, index: Tensor) -> "Trunk":
        return Trunk(self.latents[index], self.velocities[index])


@dataclass(frozen=True)
class Plan:
    """Where the step's budget goes.

    Attributes:
        rollouts: int64 (P,), how many images each prompt gets.
        explored: bool (P, N), at which denoising steps they explore; every other step is ODE.
    """

    rollouts: Tensor
    explored: Tensor

    @property
    def group(self) -> Tensor:
        """The prompt of every rollout, int64 (n,): prompt 0's rollouts first, then prompt 1's."""
        return self.rollouts.new_tensor(range(len(self.rollouts))).repeat_interleave(self.rollouts)

    @property
    def leaves(self) -> Tensor:
        """Each prompt's first explored step, int64 (P,): until there, rollouts from one noise are one trajectory."""
        return self.explored.int().argmax(1)


@dataclass(frozen=True)
class Transitions:
    """Explored transitions, one a row; rows of all prompts and denoising steps stand together.

    Attributes:
        x, x_next: float32 (m, ...), the latent before and after; after `awm`'s jump it is the clean one.
        step: int64 (m,), the denoising step at whose noise level `x` stands.
        prompt: int64 (m,), the row of the step's `Conditions`.
        rollout: int64 (m,), the rollout it belongs to.
        log_prob: float32 (m,), under the policy that drew it.
        advantage: float32 (m,).
    """

    x: Tensor
    x_next: Tensor
    step: Tensor
    prompt: Tensor
    rollout: Tensor
    log_prob: Tensor
    advantage: Tensor

    def __len__(self) -> int:
        return len(self.step)

    def __getitem__(self, index: Tensor) -> "Transitions":
        return Transitions(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def with_advantages(self, advantage: Tensor) -> "Transitions":
        """The rows with their rollout's advantage; `advantage` is float32 (n,)."""
        return replace(self, advantage=advantage[self.rollout])


@dataclass(frozen=True)
class Rollouts:
    """The images of a step.

    Attributes:
        images: uint8 (n, height, width, 3).
        group: int64 (n,), the prompt of each.
        transitions: what was explored while drawing them; advantages still zero.
    """

    images: np.ndarray
    group: Tensor
    transitions: Transitions


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
class LossOutput:
    """The loss of a micro-batch (summed over its rows) and what is logged of it, each summed over rows."""

    value: Tensor
    metrics: dict[str, Tensor]
