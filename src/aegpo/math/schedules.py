"""Sigma schedules: the noise levels a rectified flow is denoised through, from 1 (noise) down to 0 (image).

All are a uniform grid `u` bent by the shift `S_k(u) = k u / (1 + (k - 1) u)` (arXiv 2403.03206): a larger `k`
spends more of the steps at high noise. They are returned in fp64 with `sigma[0]` exactly 1 and `sigma[-1]` exactly
0. Remember a step by its index into the schedule, never by its sigma.
"""

import math

import torch
from torch import Tensor

TRAIN_STEPS = 1000  # the grid that Stable Diffusion 3 was trained on


def shifted_linear(steps: int, shift: float) -> Tensor:
    """`S_shift` of a uniform grid from 1 to 0: with shift 3 that of DanceGRPO (arXiv 2505.07818) and its kin.

    Args:
        steps: number of denoising steps, at least 1.
        shift: k, positive; 1 leaves the grid uniform.

    Returns:
        (steps + 1,), float64.

    Raises:
        ValueError: if `steps` is below 1.
    """
    return _shift(torch.linspace(1, 0, _at_least_one(steps) + 1, dtype=torch.float64), shift)


def sd3(steps: int, shift: float = 3.0) -> Tensor:
    """The schedule of Stable Diffusion 3 (arXiv 2403.03206) as diffusers computes it, which applies the shift twice.

    The training grid is shifted when the scheduler is built, and a uniform grid between its ends, 1 and
    `S_shift(1/1000)`, is shifted once more for sampling; then comes 0. The step onto 0 is therefore very short.

    Args:
        steps: number of denoising steps, at least 1.
        shift: k, positive.

    Returns:
        (steps + 1,), float64.

    Raises:
        ValueError: if `steps` is below 1.
    """
    smallest = shift / (TRAIN_STEPS + shift - 1)
    u = torch.linspace(1, smallest, _at_least_one(steps), dtype=torch.float64)
    return torch.cat([_shift(u, shift), torch.zeros(1, dtype=torch.float64)])


def flux(steps: int, tokens: int) -> Tensor:
    """The schedule of FLUX.1, whose shift `exp(mu)` grows with the image: mu is .5 at 256 tokens and 1.15 at 4096.

    Args:
        steps: number of denoising steps, at least 1.
        tokens: packed latent tokens of one image, (height / 16) (width / 16) in pixels.

    Returns:
        (steps + 1,), float64.

    Raises:
        ValueError: if `steps` is below 1.
    """
    mu = 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)
    return shifted_linear(steps, math.exp(mu))


def _at_least_one(steps: int) -> int:
    if steps < 1:
        raise ValueError(f"a schedule needs at least 1 step, not {steps}")
    return steps


def _shift(u: Tensor, k: float) -> Tensor:
    """`S_k(u)`, written so that 0 and 1 stay exactly what they are."""
    return k * u / (k * u + (1 - u))
