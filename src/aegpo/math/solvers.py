"""Noiseless steps of a rectified flow: Euler's, and one of second order for when there are few of them.

The path is `x_s = (1 - s) x0 + s e` and the network predicts the velocity `v = e - x0`, as in `transitions`.
"""

import torch
from torch import Tensor

from aegpo.math.transitions import at_least_fp32, per_row


def euler(x: Tensor, v: Tensor, sigma: float | Tensor, sigma_next: float | Tensor) -> Tensor:
    """Euler's step `x - (sigma - sigma_next) v`, exact where the velocity is constant along the path.

    Args:
        x: latents, (B, ...). Half precision is widened to fp32 before the arithmetic, fp64 stays fp64.
        v: velocities after guidance, the shape of `x`.
        sigma: noise level of `x` in (0, 1], one number or one per row, (B,).
        sigma_next: noise level after the step in [0, sigma), one number or (B,).

    Returns:
        The latents at `sigma_next`, (B, ...), fp32 or fp64.
    """
    assert x.shape == v.shape
    x, v = at_least_fp32(x, v)
    return x - (per_row(sigma, x) - per_row(sigma_next, x)) * v


def dpmpp_2m(
    x: Tensor,
    v: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    x0_prev: Tensor | None = None,
    sigma_prev: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of DPM-Solver++ 2M (arXiv 2211.01095), which follows how the predicted image moves from step to step.

    With `s = sigma`, `s' = sigma_next` and `H` the rise of `ln((1 - s) / s)` over the step,

        x' = (s' / s) x - (1 - s') (e^(-H) - 1) (x0_hat + D / 2),    x0_hat = x - s v
        D = (x0_hat - x0_prev) H / H_prev

    which, as `(1 - s') (1 - e^(-H)) = (s - s') / s`, is Euler's step and a correction: `x - (s - s') (v - D / (2 s))`.
    There is none (order 1: Euler) where there is nothing to extrapolate from: without `x0_prev`, for a row whose
    `sigma_prev` is not above its `sigma` (so a caller marks single rows), after a step from pure noise, which is
    infinitely long in `H`, and on the step onto 0, which is so too.

    Args:
        x: latents, (B, ...). Half precision is widened to fp32 before the arithmetic, fp64 stays fp64.
        v: velocities after guidance, the shape of `x`.
        sigma: noise level of `x` in (0, 1], one number or one per row, (B,): the rows may stand at different steps.
        sigma_next: noise level after the step in [0, sigma), one number or (B,).
        x0_prev: the `x0_hat` that the step before returned, the shape of `x`; anything in rows of order 1.
        sigma_prev: noise level that it was predicted at, one number or (B,); needed with `x0_prev`.

    Returns:
        x_next: the latents at `sigma_next`, (B, ...), fp32 or fp64.
        x0_hat: the predicted images at `sigma`, to be given to the next step, (B, ...).
    """
    assert x.shape == v.shape and (x0_prev is None) == (sigma_prev is None)
    x, v = at_least_fp32(x, v)
    s, s_next = per_row(sigma, x), per_row(sigma_next, x)
    x0_hat = x - s * v
    x_next = euler(x, v, sigma, sigma_next)
    if x0_prev is None or sigma_prev is None:
        return x_next, x0_hat
    assert x0_prev.shape == x.shape
    s_prev = per_row(sigma_prev, x)
    second = (s_prev > s) & (s_prev < 1) & (s_next > 0)
    before, now, after = s_prev.where(second, 0.75), s.where(second, 0.5), s_next.where(second, 0.25)
    extent = _rise(now, after) / _rise(before, now)
    moved = torch.where(second, x0_hat - x0_prev.to(x.dtype), 0.0)
    return x_next + (s - s_next) / (2 * s) * extent * moved, x0_hat


def _rise(s: Tensor, s_next: Tensor) -> Tensor:
    """`ln((1 - s') / s') - ln((1 - s) / s)` for 0 < s' < s < 1, without cancellation where the two are close."""
    return -torch.log1p(-(s - s_next) / (s * (1 - s_next)))
