"""What a run remembers of its prompts from one visit to the next: part of its checkpoints."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

REMEMBERED = 100_000  # curves of the base policy; at 10 denoising steps, 8 MB


@dataclass
class Memory:
    """The base policy's entropies, and the signal that allocation follows.

    Attributes:
        base_entropy: by prompt id and the number of its noise: float64 (N,), entropy under the base policy, which never
            changes. The oldest make room beyond `REMEMBERED`.
        signal: by prompt id: the exponential average, over its visits, of what allocation goes by.
        reward_spread: float64 (N,), how far exploring each step alone spread the rewards when last measured, or none.
    """

    base_entropy: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    signal: dict[int, float] = field(default_factory=dict)
    reward_spread: Tensor | None = None

    def add_base_entropy(self, curves: Mapping[tuple[int, int], Tensor]) -> None:
        """Keep more of the base's curves."""
        self.base_entropy.update(curves)
        for key in list(self.base_entropy)[: max(0, len(self.base_entropy) - REMEMBERED)]:
            del self.base_entropy[key]

    def visit(self, prompts: Sequence[int], values: Tensor, smoothing: float) -> Tensor:
        """Fold a visit's values, (P,), into the prompts' averages and return those; `smoothing` weighs the old."""
        for prompt, value in zip(prompts, values.tolist(), strict=True):
            self.signal[prompt] = smoothing * self.signal.get(prompt, float(value)) + (1 - smoothing) * value
        return self.recall(prompts)

    def recall(self, prompts: Sequence[int]) -> Tensor:
        """The prompts' averages, float64 (P,); for one never visited, the mean of these others' (0 without any)."""
        known = [self.signal[prompt] for prompt in prompts if prompt in self.signal]
        unknown = sum(known) / len(known) if known else 0.0
        return torch.tensor([self.signal.get(prompt, unknown) for prompt in prompts], dtype=torch.float64)

    def tensors(self) -> dict[str, Tensor]:
        """All of it, for a checkpoint."""
        saved = {
            "signal/prompts": torch.tensor(list(self.signal), dtype=torch.int64),
            "signal/values": torch.tensor(list(self.signal.values()), dtype=torch.float64),
        }
        if self.base_entropy:
            saved["base_entropy/keys"] = torch.tensor(list(self.base_entropy))
            saved["base_entropy/curves"] = torch.stack(list(self.base_entropy.values()))
        if self.reward_spread is not None:
            saved["reward_spread"] = self.reward_spread
        return saved

    @classmethod
    def of(cls, saved: Mapping[str, Tensor]) -> "Memory":
        """The memory whose `tensors` these are; raises ValueError where they are none's."""
        keys = saved.get("base_entropy/keys", torch.zeros(0, 2))
        curves = saved.get("base_entropy/curves", torch.zeros(0, 0))
        prompts, values = saved.get("signal/prompts"), saved.get("signal/values")
        spread = saved.get("reward_spread")
        if prompts is None or values is None or prompts.ndim != 1 or prompts.shape != values.shape:
            raise ValueError("it holds no signals by prompt")
        if curves.ndim != 2 or keys.shape != (len(curves), 2) or (spread is not None and spread.ndim != 1):
            raise ValueError("it holds curves that are none")
        if not all(tensor.isfinite().all() for tensor in (values, curves, *([] if spread is None else [spread]))):
            raise ValueError("it holds what is not finite")
        return cls(
            base_entropy={(a, b): curve for (a, b), curve in zip(keys.tolist(), curves, strict=True)},
            signal=dict(zip(prompts.tolist(), values.tolist(), strict=True)),
            reward_spread=spread,
        )
