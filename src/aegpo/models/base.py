"""What the loop asks of a model. One small adapter a family answers it; nothing outside this room knows diffusers."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from aegpo.types import Conditions


class Denoiser(Protocol):
    """A text-to-image flow model whose policy is being trained.

    Attributes:
        trainable: the parameters that are trained, by name.
        latent_shape: of one image, such as (channels, height, width).
        forwards: network evaluations x samples so far, a backward counted as two.
    """

    trainable: dict[str, nn.Parameter]
    latent_shape: tuple[int, ...]
    forwards: int

    @property
    def network(self) -> nn.Module:
        """The transformer or the U-Net, whose attention a probe reads; within `reference`, the base policy's."""
        ...

    @property
    def device(self) -> torch.device:
        """Where latents belong."""
        ...

    def encode(self, prompts: Sequence[str]) -> Conditions:
        """Encode prompts, one row each."""
        ...

    def sigmas(self, steps: int) -> Tensor:
        """The noise schedule, float64 (steps + 1,), from 1 down to 0."""
        ...

    def predict(self, x: Tensor, sigma: Tensor, conditions: Conditions, prompt: Tensor, guidance: float) -> Tensor:
        """The velocity after guidance.

        Args:
            x: latents, float32 (B, ...).
            sigma: (B,), or a scalar for all.
            conditions: the encoded prompts of the step.
            prompt: int64 (B,), the row of the conditions that each latent belongs to.
            guidance: weight w of v_u + w (v_c - v_u); at 1 the empty prompt is not evaluated at all.

        Returns:
            float32 (B, ...).
        """
        ...

    def decode(self, x: Tensor) -> np.ndarray:
        """Images of clean latents (B, ...), uint8 (B, height, width, 3)."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Within it, `predict` is the base policy's."""
        ...

    def save(self, folder: Path) -> None:
        """Write the trained weights in diffusers' own layout."""
        ...


@contextmanager
def acting(model: Denoiser, weights: Sequence[Tensor] | None) -> Iterator[None]:
    """Within it, the policy has other weights, in the order of `model.trainable`, unless there are none."""
    if weights is None:
        yield
        return
    own = [parameter.detach().clone() for parameter in model.trainable.values()]
    _put(model, weights)
    try:
        yield
    finally:
        _put(model, own)


def _put(model: Denoiser, weights: Sequence[Tensor]) -> None:
    for parameter, weight in zip(model.trainable.values(), weights, strict=True):
        parameter.data.copy_(weight)
