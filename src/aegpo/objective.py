"""What is minimised: the loss of some rows, by the names in `loss.kind`, and the pull to the base policy."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from aegpo.adapt.plan import policy_noise
from aegpo.config import Config, needs_reference
from aegpo.math.losses import (
    clipped_surrogate,
    dgpo,
    dpo,
    guard_log_ratio,
    masked_surrogate,
    matching_error,
    matching_log_prob,
    nft,
    ram,
    velocity_kl,
)
from aegpo.math.transitions import gaussian_kl, log_prob, transition
from aegpo.models.base import Denoiser
from aegpo.types import Conditions, LossOutput, Transitions


def objective(
    config: Config,
    model: Denoiser,
    rows: Transitions,
    conditions: Conditions,
    v: Tensor | None = None,
    on_policy: bool = False,
) -> LossOutput:
    """Each row's loss and its share in the pull to the base policy, times the row's weight.

    One forward serves rows of any prompts and denoising steps; a second, without gradient, the base policy's. The first
    is not needed where `v`, float32 (m, ...), is what the policy predicts at the rows. Where the policy is known to be
    still the one that drew them (`on_policy`), what it predicts now stands for what it predicted then.
    """
    sampler, how = config.sampler, config.loss
    sigmas = model.sigmas(sampler.steps, sampler.shift)
    sigma, sigma_next = sigmas[rows.step].to(rows.x), sigmas[rows.until].to(rows.x)

    def predict(guidance: float = sampler.guidance) -> Tensor:
        return model.predict(rows.x, sigma, conditions, rows.prompt, guidance)

    def noisy_step(velocity: Tensor) -> tuple[Tensor, Tensor]:
        return transition(rows.x, velocity, sigma, sigma_next, sampler.kind, sampler.eta, sigmas[1].item())

    v = predict() if v is None else v
    v_old = v.detach() if on_policy else rows.velocity
    v_ref = v.detach()
    if needs_reference(config):
        with torch.no_grad(), model.reference():
            v_ref = predict(how.reference_guidance or sampler.guidance)

    metrics: dict[str, Tensor] = {}
    match how.kind:
        case "clip" | "guard" | "dppo" if sampler.kind != "ode":
            (mean, std), (mean_old, _) = noisy_step(v), noisy_step(v_old)
            deviation = torch.full_like(std, math.sqrt(0.5)) if how.score == "squared" else std
            current = log_prob(rows.x_next, mean, deviation)
            old = log_prob(rows.x_next, mean_old, deviation)
            log_ratio = guard_log_ratio(current, old, mean, mean_old, std) if how.kind == "guard" else current - old
            if how.kind == "dppo":
                moved = gaussian_kl(mean, mean_old, std).detach()
                loss = masked_surrogate(current, old, rows.advantage, moved, how.max_kl)
            else:
                loss, metrics = _clipped(config, log_ratio, rows.advantage)
            loss = loss * _step_weight(config, sigmas, sigma - sigma_next, std)
            metrics |= _ratios(log_ratio)
        case "clip":
            current, old = (
                matching_log_prob(matching_error(u, rows.x, rows.x_next, sigma), sigma, how.matching)
                for u in (v, v_old)
            )
            loss, metrics = _clipped(config, current - old, rows.advantage)
            metrics |= _ratios(current - old)
        case "nft":
            most = config.advantage.clip
            loss = nft(v, rows.velocity, None, rows.x, rows.x_next, sigma, rows.advantage, how.beta, most, kl=0.0).rows
        case "ram":
            loss = ram(v, v_ref, rows.x, rows.x_next, sigma, rows.advantage, how.beta)
        case _:
            error, error_ref = (matching_error(u, rows.x, rows.x_next, sigma) for u in (v, v_ref))
            if how.kind == "dgpo":
                loss = dgpo(error, error_ref, rows.advantage, rows.unit.to(error.device), how.beta)
            else:
                loss = _pairwise(error, error_ref, rows, how.beta)

    if how.kl:
        if sampler.kind == "ode" or how.kl_of == "velocity":
            divergence = velocity_kl(v, v_ref)
        else:
            (mean, std), (mean_ref, _) = noisy_step(v), noisy_step(v_ref)
            # Flow-GRPO divides by 2 g^2, not by an SDE's variance g^2 h: its weight belongs to h times the divergence.
            factor = sigma - sigma_next if sampler.kind in ("flow_sde", "dance_sde") else 1.0
            divergence = gaussian_kl(mean, mean_ref, std) * factor
        loss = loss + how.kl * divergence
        metrics["kl"] = divergence.detach()
    loss = rows.weight * loss
    return LossOutput(loss, metrics | {"loss": loss.detach()})


@torch.no_grad()
def predict_again(
    config: Config, model: Denoiser, rows: Transitions, conditions: Conditions, micros: Sequence[Tensor]
) -> int:
    """Put in place of rows' velocities what the policy, still as it drew them, predicts in the batches of training.

    Half precision may round otherwise in a batch of another shape, by more than a clip of 1e-4 can bear.

    Returns:
        How many rows that were.
    """
    sigmas = model.sigmas(config.sampler.steps, config.sampler.shift)
    for micro in model.even(micros):
        part = rows[micro]
        sigma = sigmas[part.step].to(part.x)
        rows.velocity[micro] = model.predict(part.x, sigma, conditions, part.prompt, config.sampler.guidance)
    return sum(map(len, micros))


def _step_weight(config: Config, sigmas: Tensor, length: Tensor, std: Tensor) -> Tensor | float:
    """What a noisy step counts for by its length in sigma, (n,), or its noise, (n, 1, ...); see `loss.weight`."""
    match config.loss.weight:
        case "none":
            return 1.0
        case "noise":
            return std.flatten() / policy_noise(config, sigmas)[:-1].mean().item()
        case "step":
            return 1 / length


def _clipped(config: Config, log_ratio: Tensor, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate of log-ratios (n,), and which of them stand beyond the clip."""
    low, high = config.loss.clip_low, config.loss.clip_high
    ratio = log_ratio.detach().exp()
    loss = clipped_surrogate(log_ratio, torch.zeros_like(log_ratio), advantage, low, high)
    return loss, {"clip_fraction": ((ratio < 1 - low) | (ratio > 1 + high)).float()}


def _ratios(log_ratio: Tensor) -> dict[str, Tensor]:
    """What is logged of log-ratios, (n,)."""
    log_ratio = log_ratio.detach()
    return {"ratio/mean": log_ratio.exp(), "approx_kl": log_ratio.square() / 2}


def _pairwise(error: Tensor, error_ref: Tensor, rows: Transitions, beta: float) -> Tensor:
    """DPO's loss, (n,): each of a pair's two rows, the best and the worst at one noise level, has that of the pair."""
    best, worst = ((sign * rows.advantage > 0).nonzero().flatten() for sign in (1, -1))
    best, worst = (part[rows.unit.to(part.device)[part].argsort()] for part in (best, worst))
    assert torch.equal(rows.unit[best.cpu()], rows.unit[worst.cpu()]), "the rows of a pair are of one unit"
    loss = dpo(error[best], error_ref[best], error[worst], error_ref[worst], beta)
    return torch.zeros_like(error).index_put((torch.cat([best, worst]),), torch.cat([loss, loss]))
