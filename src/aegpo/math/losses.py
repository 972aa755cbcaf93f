"""Policy losses, one value a row: the caller weighs and averages them.

The first ones take log-probabilities of a sampler's steps. The others train on the forward process: an image `x0` is
noised to `x_t = (1 - t) x0 + t e`, the network's velocity `v` is compared with the truth `e - x0 = (x_t - x0) / t`, and
an advantage says how to move. The gradient flows through the policy being trained only, whatever else requires one.
Half precision is widened to fp32.
"""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from aegpo.math.transitions import at_least_fp32, per_row
from aegpo.types import LossOutput

Weighting = Literal["uniform", "t", "t2", "huber", "ghuber"]


def clipped_surrogate(
    log_prob: Tensor, log_prob_old: Tensor, advantage: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """PPO's clipped surrogate `max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))` (arXiv 1707.06347).

    Here `A` is the advantage and `r = exp(l - l_old)` the ratio of the two policies' densities. The gradient flows
    through `log_prob` only. At the first update of a rollout r is exactly 1 and the gradient is that of REINFORCE,
    `-A grad l`; once r has passed the clip in the direction that A asked for, it is 0.

    Args:
        log_prob: (n,), nats, under the weights being trained.
        log_prob_old: (n,), nats, under the weights that drew the rollout, reduced the same way.
        advantage: (n,).
        clip_low: how far below 1 the ratio still counts; 1e-4 is usual for log-probs averaged over the latent.
        clip_high: how far above 1.

    Returns:
        The loss of each row, (n,), to be minimised.
    """
    assert log_prob.shape == log_prob_old.shape == advantage.shape
    advantage = advantage.detach()
    ratio = (log_prob - log_prob_old.detach()).exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_low, 1 + clip_high))


def guard_log_ratio(log_prob: Tensor, log_prob_old: Tensor, mean: Tensor, mean_old: Tensor, std: Tensor) -> Tensor:
    """GRPO-Guard's log-ratio `std (l - l_old) + mean((mean - mean_old)^2) / (2 std)` (arXiv 2510.22319).

    The plain log-ratio of log-probabilities averaged over the latent has expectation `-mean(d^2) / (2 std^2)` under
    the policy that drew the step, with `d = mean - mean_old`, and a spread that goes with 1 / std: a clip catches it
    on one side, and at some steps only. This one is `mean(z d)` for the step's noise z: its expectation is 0, and it
    is alike at all steps. Clip its exponential as any ratio; that paper then divides the step's loss by
    `sigma - sigma_next`.

    Args:
        log_prob: (n,), nats, averaged over the latent, under the weights being trained.
        log_prob_old: (n,), nats, under the weights that drew the step, reduced the same way.
        mean: (n, ...), of the step under the weights being trained.
        mean_old: (n, ...), of the same step under the weights that drew it.
        std: that of the step, positive: (n, 1, ...), (1, 1, ...) or one number.

    Returns:
        (n,).
    """
    assert log_prob.shape == log_prob_old.shape == (len(mean),) and mean.shape == mean_old.shape
    assert std.numel() == 1 or std.shape == (len(mean), *[1] * (mean.ndim - 1))
    std = std.detach().reshape(-1)
    return std * (log_prob - log_prob_old.detach()) + _mean_square(mean, mean_old.detach()) / (2 * std)


def masked_surrogate(
    log_prob: Tensor, log_prob_old: Tensor, advantage: Tensor, divergence: Tensor, limit: float
) -> Tensor:
    """The surrogate `-A r`, kept within a trust region by a mask instead of a clip (Flow-DPPO).

    A row counts for nothing, in value and in gradient, where its divergence from the policy that drew it has reached
    the limit and its ratio has already moved the way the advantage asks, `A (r - 1) > 0`. The way back is never shut.

    Args:
        log_prob: (n,), nats, under the weights being trained.
        log_prob_old: (n,), nats, under the weights that drew the rollout, reduced the same way.
        advantage: (n,).
        divergence: (n,), of the two policies at this step, such as `gaussian_kl` in nats a dimension.
        limit: the largest divergence at which a row still moves freely; 1e-5 a dimension is usual.

    Returns:
        The loss of each row, (n,), to be minimised.
    """
    assert log_prob.shape == log_prob_old.shape == advantage.shape == divergence.shape
    advantage = advantage.detach()
    log_ratio = log_prob - log_prob_old.detach()
    shut = (divergence.detach() >= limit) & (advantage * log_ratio.detach() > 0)
    return torch.where(shut, 0.0, -advantage * log_ratio.masked_fill(shut, 0.0).exp())


def velocity_kl(v: Tensor, v_ref: Tensor) -> Tensor:
    """Distance from the reference in velocity, `mean((v - v_ref)^2)`; the gradient flows through `v` only.

    It is `gaussian_kl` of two jumps from a noised image to the image, `N(x_t - t v, t^2 / 2)`.

    Args:
        v: (n, ...), velocities of the weights being trained.
        v_ref: (n, ...), of the reference, at the same latents and noise levels.

    Returns:
        (n,), never negative.
    """
    v, v_ref = at_least_fp32(v, v_ref)
    return _mean_square(v, v_ref.detach())


def matching_error(v: Tensor, x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """The loss of pretraining, `mean((v - (e - x0))^2)` (flow matching, arXiv 2210.02747), through `v` only.

    Args:
        v: (n, ...), velocities at `x_t`.
        x_t: (n, ...), the noised images.
        x0: (n, ...), the images.
        t: (n,), their noise levels, in (0, 1].

    Returns:
        (n,), never negative.
    """
    v, target = _with_target(v, x_t, x0, t)
    return _mean_square(v, target)


def matching_log_prob(error: Tensor, t: Tensor, weighting: Weighting = "uniform") -> Tensor:
    """What advantage-weighted matching (arXiv 2509.25050) takes for a log-probability, up to a constant.

    With `d` the matching error: `-d` (`uniform`: the loss of pretraining with its sign turned), `-t d` (`t`), `-t^2 d`
    (`t2`), and the generalised Huber `-t ((d + 1e-10)^p - 1e-10^p) / p`, which makes little of large errors, with p of
    1/2 (`huber`, here without the factor 1 / p) or 1/4 (`ghuber`).

    Args:
        error: (n,), from `matching_error`; the gradient flows through it.
        t: (n,), noise levels in (0, 1].
        weighting: one of these.

    Returns:
        (n,).

    Raises:
        ValueError: for an unknown `weighting`.
    """
    assert error.shape == t.shape == (len(t),), f"one error a row, not {tuple(error.shape)}"
    match weighting:
        case "uniform":
            return -error
        case "t":
            return -t * error
        case "t2":
            return -(t**2) * error
        case "huber":
            return -t * ((error + 1e-10).sqrt() - 1e-5)
        case "ghuber":
            return -t * ((error + 1e-10) ** 0.25 - 1e-10**0.25) / 0.25
        case _:
            raise ValueError(f"weighting must be one of {', '.join(get_args(Weighting))}, not {weighting!r}")


def nft(
    v: Tensor,
    v_old: Tensor,
    v_ref: Tensor | None,
    x_t: Tensor,
    x0: Tensor,
    t: Tensor,
    advantage: Tensor,
    beta: float,
    adv_clip: float = 5.0,
    kl: float = 1e-4,
) -> LossOutput:
    """DiffusionNFT (arXiv 2509.16117): match good images with a policy ahead of the old one, bad ones with its mirror.

    With `r = clip(A / adv_clip, -1, 1) / 2 + 1 / 2`, the share of an image that counts as good,

        v+ = beta v + (1 - beta) v_old,      x0_hat+ = x_t - t v+,      L+ = mean((x0_hat+ - x0)^2) / w+
        v- = (1 + beta) v_old - beta v,      x0_hat- = x_t - t v-,      L- = mean((x0_hat- - x0)^2) / w-
        rows = adv_clip (r L+ + (1 - r) L-) / beta + kl mean((v - v_ref)^2)

    where `w+-` is `mean |x0_hat+- - x0|` of that row, at least 1e-5 and without gradient. At `v = v_old` the first
    term's gradient is that of the matching error times `adv_clip (2 r - 1) t^2 / w`, whatever beta is.

    Args:
        v: (n, ...), velocities at `x_t` under the weights being trained, without guidance.
        v_old: (n, ...), under the weights that drew the images.
        v_ref: (n, ...), under the reference; None if `kl` is 0.
        x_t: (n, ...), the noised images.
        x0: (n, ...), the images.
        t: (n,), their noise levels, in (0, 1].
        advantage: (n,).
        beta: how far ahead of the old policy, positive.
        adv_clip: the advantage that counts as entirely good.
        kl: weight of the distance from the reference.

    Returns:
        rows: (n,), and as metrics `r`, `positive` (L+), `negative` (L-) and `kl`, the distance without its weight.
    """
    assert v.shape == v_old.shape == x_t.shape == x0.shape and t.shape == advantage.shape == (len(v),)
    assert v_ref is not None or kl == 0, "a weight on the distance from the reference needs its velocities"
    v, v_old, x_t, x0 = at_least_fp32(v, v_old.detach(), x_t.detach(), x0.detach())
    r = (advantage.detach() / adv_clip).clamp(-1, 1) / 2 + 0.5
    noise = per_row(t.detach(), v)
    positive = _self_normalised(x_t - noise * (beta * v + (1 - beta) * v_old) - x0)
    negative = _self_normalised(x_t - noise * ((1 + beta) * v_old - beta * v) - x0)
    distance = torch.zeros_like(positive) if v_ref is None else velocity_kl(v, v_ref)
    rows = adv_clip * (r * positive + (1 - r) * negative) / beta + kl * distance
    metrics = {"r": r, "positive": positive.detach(), "negative": negative.detach(), "kl": distance.detach()}
    return LossOutput(rows, metrics)


def ram(v: Tensor, v_ref: Tensor, x_t: Tensor, x0: Tensor, t: Tensor, advantage: Tensor, weight: float) -> Tensor:
    """RAM (arXiv 2605.10759): `mean((v - target)^2)` with the fixed `target = v_ref + weight A ((e - x0) - v)`.

    Its gradient is that of `mean((v - v_ref)^2) + weight A mean((v - (e - x0))^2)`: matching weighted by the advantage,
    with the reference as an anchor.

    Args:
        v: (n, ...), velocities at `x_t` under the weights being trained.
        v_ref: (n, ...), under the reference.
        x_t: (n, ...), the noised images.
        x0: (n, ...), the images.
        t: (n,), their noise levels, in (0, 1].
        advantage: (n,).
        weight: of the advantage against the anchor.

    Returns:
        The loss of each row, (n,), to be minimised.
    """
    assert v.shape == v_ref.shape and advantage.shape == (len(v),)
    v, truth = _with_target(v, x_t, x0, t)
    pull = per_row(weight * advantage.detach(), v)
    return _mean_square(v, (v_ref.to(v.dtype) + pull * (truth - v)).detach())


def dgpo(error: Tensor, error_ref: Tensor, advantage: Tensor, unit: Tensor, beta: float) -> Tensor:
    """DGPO (arXiv 2510.08425): a preference of the good half of a group over the bad one, weighed by the advantages.

    A unit is the rows of one group that share noise level and noise. With its G rows' errors d,
    `S = sum(A beta (d - d_ref)) / G`, and a row's loss is `sigmoid(S) A d`, the sigmoid without gradient: the mean over
    the unit's rows has the gradient of `-logsigmoid(-S) / beta`.

    Args:
        error: (n,), `matching_error` under the weights being trained.
        error_ref: (n,), under the reference.
        advantage: (n,).
        unit: (n,), int64: arbitrary ids, units of any size.
        beta: how sharply a unit that already prefers right is left alone.

    Returns:
        The loss of each row, (n,), to be minimised.
    """
    assert error.shape == error_ref.shape == advantage.shape == unit.shape and error.ndim == 1
    assert unit.dtype == torch.int64, f"unit ids must be int64, not {unit.dtype}"
    advantage = advantage.detach()
    terms = advantage * beta * (error - error_ref).detach()
    _, segment, size = unit.unique(return_inverse=True, return_counts=True)
    preference = terms.new_zeros(size.shape).index_add(0, segment, terms) / size
    return preference.sigmoid()[segment] * advantage * error


def dpo(error_w: Tensor, error_w_ref: Tensor, error_l: Tensor, error_l_ref: Tensor, beta: float) -> Tensor:
    """Diffusion-DPO (arXiv 2311.12908): `-logsigmoid(-beta / 2 ((d_w - d_w_ref) - (d_l - d_l_ref)))`.

    Online, the winner w and the loser l are the best and the worst of a group.

    Args:
        error_w: (n,), the winners' `matching_error` under the weights being trained.
        error_w_ref: (n,), under the reference.
        error_l: (n,), the losers', at the same noise level and noise.
        error_l_ref: (n,), under the reference.
        beta: how sharply a pair that is already told apart is left alone.

    Returns:
        The loss of each pair, (n,), to be minimised; ln 2 at the reference.
    """
    assert error_w.shape == error_w_ref.shape == error_l.shape == error_l_ref.shape and error_w.ndim == 1
    margin = (error_w - error_w_ref.detach()) - (error_l - error_l_ref.detach())
    return -F.logsigmoid(-beta / 2 * margin)


def _mean_square(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference over all dimensions but the first, (n,)."""
    assert a.shape == b.shape
    return (a - b).square().reshape(len(a), math.prod(a.shape[1:])).mean(1)  # also of no rows


def _with_target(v: Tensor, x_t: Tensor, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The velocities, and the true ones `e - x0 = (x_t - x0) / t`, without gradient."""
    assert v.shape == x_t.shape == x0.shape and t.shape == (len(v),)
    v, x_t, x0 = at_least_fp32(v, x_t.detach(), x0.detach())
    return v, (x_t - x0) / per_row(t.detach(), v)


def _self_normalised(error: Tensor) -> Tensor:
    """Mean square of each row over its own mean size, (n,); the size is a constant, and at least 1e-5."""
    error = error.reshape(len(error), math.prod(error.shape[1:]))
    return error.square().mean(1) / error.detach().abs().mean(1).clamp(min=1e-5)
