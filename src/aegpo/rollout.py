"""Drawing images: the probe's noiseless ones, the rollouts that explore, and those of an evaluation.

Noise is keyed by what it is for, never by where it stands in a batch: a rollout gets the same noise in any batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from aegpo.config import Config, Sampler
from aegpo.math.transitions import log_prob, transition
from aegpo.models.base import Denoiser
from aegpo.models.probe import AttentionProbe
from aegpo.types import Conditions, Plan, Prompt, Rollouts, Signals, Transitions

ROLLOUT, PROBE, EVALUATION = 0, 1, 2  # what noise is for: the first number of its key


def noise(shape: tuple[int, ...], *key: int) -> Tensor:
    """Standard normal noise that depends on the key alone; float32, on the CPU."""
    return torch.from_numpy(np.random.default_rng(key).standard_normal(shape, dtype=np.float32))


def _noise_of_step(shape: tuple[int, ...], keys: Sequence[tuple[int, ...]], i: int, step: int) -> Tensor:
    """The noise of a rollout's denoising step; number 0 is that of its first latent."""
    return noise(shape, *keys[i], step + 1)


def _first_latents(model: Denoiser, keys: Sequence[tuple[int, ...]]) -> Tensor:
    return torch.stack([noise(model.latent_shape, *key) for key in keys]).to(model.device)


def probe(
    model: Denoiser,
    prompts: Sequence[Prompt],
    conditions: Conditions,
    config: Config,
    base_entropy: dict[int, Tensor],
) -> Signals:
    """Denoise each prompt once by ODE, under the policy and under the base, and read the attention (arXiv 2602.06825).

    A prompt's first latent is its own, always the same, so the base's entropy is computed at its first visit only:
    `base_entropy`, by prompt id, float64 (N,), is read and filled.
    """

    def curves(which: list[int]) -> Tensor:
        parts = []
        for part in torch.tensor(which).split(config.optimizer.micro_batch):
            x = _first_latents(model, [(PROBE, config.seed, prompts[i].id) for i in part.tolist()])
            with AttentionProbe(model.image_tokens) as attention:
                denoise(model, x, conditions, part, config.sampler)
            layers = attention.entropy()[:, -len(part) :]  # under guidance the empty prompt's rows come first
            parts.append(layers.unflatten(0, (config.sampler.steps, -1)).double().mean(1).T.cpu())
        return torch.cat(parts)

    new = [i for i, prompt in enumerate(prompts) if prompt.id not in base_entropy]
    if new:
        with model.reference():
            base_entropy.update(zip((prompts[i].id for i in new), curves(new), strict=True))
    return Signals(curves(list(range(len(prompts)))), torch.stack([base_entropy[prompt.id] for prompt in prompts]))


def collect(
    model: Denoiser,
    prompts: Sequence[Prompt],
    conditions: Conditions,
    plan: Plan,
    config: Config,
    step: int,
    progress: Callable[[int], None] = lambda _: None,
) -> Rollouts:
    """Draw the rollouts that the plan asks for, a micro-batch at a time, and keep what they explored.

    `progress` is told how many more rollouts are done.
    """
    images, rows = [], []
    names = [
        (prompt.id, i) for prompt, count in zip(prompts, plan.rollouts.tolist(), strict=True) for i in range(count)
    ]
    for part in torch.arange(len(names)).split(config.optimizer.micro_batch):
        keys = [(ROLLOUT, config.seed, step, *names[i]) for i in part.tolist()]
        x, prompt = _first_latents(model, [(*key, 0) for key in keys]), plan.group[part]
        explored, fresh = plan.explored[prompt], partial(_noise_of_step, model.latent_shape, keys)
        if config.sampler.kind == "awm":
            x, _ = denoise(model, x, conditions, prompt, config.sampler)
            found = revisit(model, x, conditions, prompt, config.sampler, explored, fresh)
        else:
            x, found = denoise(model, x, conditions, prompt, config.sampler, explored, fresh)
        images.append(model.decode(x))
        rows += [replace(row, rollout=part[row.rollout]) for row in found]
        progress(len(part))
    transitions = Transitions(**{name: torch.cat([getattr(row, name) for row in rows]) for name in vars(rows[0])})
    return Rollouts(np.concatenate(images), plan.group, transitions)


def draw(model: Denoiser, prompts: Sequence[Prompt], config: Config) -> np.ndarray:
    """`eval_images` pictures of each prompt by ODE, always from the same noise; uint8 (prompts x images, H, W, 3)."""
    pictures = []
    wanted = [(prompt, i) for prompt in prompts for i in range(config.eval_images)]
    for at in range(0, len(wanted), config.optimizer.micro_batch):
        part = wanted[at : at + config.optimizer.micro_batch]
        x = _first_latents(model, [(EVALUATION, config.seed, prompt.id, i) for prompt, i in part])
        conditions = model.encode([prompt.text for prompt, _ in part])
        x, _ = denoise(model, x, conditions, torch.arange(len(part)), config.sampler)
        pictures.append(model.decode(x))
    return np.concatenate(pictures)


@torch.no_grad()
def denoise(
    model: Denoiser,
    x: Tensor,
    conditions: Conditions,
    prompt: Tensor,
    sampler: Sampler,
    explored: Tensor | None = None,
    fresh: Callable[[int, int], Tensor] | None = None,
) -> tuple[Tensor, list[Transitions]]:
    """One batch from noise to clean latents: noise is injected at the explored steps, every other step is ODE.

    Args:
        model: the policy.
        x: first latents, float32 (B, ...).
        conditions: the encoded prompts.
        prompt: int64 (B,), the row of the conditions that each latent belongs to.
        sampler: the settings of the steps; with `awm`, whose jumps are no steps, none may be explored.
        explored: bool (B, N); none: no step is.
        fresh: noise for (latent, denoising step); needed where steps are explored.

    Returns:
        Clean latents (B, ...), and the explored transitions of each step, `rollout` counting the latents of this batch.
    """
    assert explored is None or sampler.kind != "awm", "matching explores by `revisit`"
    sigmas = model.sigmas(sampler.steps)
    rows = []
    for step in range(sampler.steps):
        sigma, sigma_next = sigmas[step].item(), sigmas[step + 1].item()
        velocity = model.predict(x, sigmas[step], conditions, prompt, sampler.guidance)
        x_next, _ = transition(x, velocity, sigma, sigma_next, "ode", eta=0.0)
        if explored is not None and fresh is not None and explored[:, step].any():
            which = explored[:, step].nonzero().flatten()
            here = which.to(x.device)
            mean, std = transition(
                x[here], velocity[here], sigma, sigma_next, sampler.kind, sampler.eta, sigmas[1].item()
            )
            x_next[here] = mean + std * torch.stack([fresh(i, step) for i in which.tolist()]).to(x.device)
            rows.append(_rows(x[here], x_next[here], mean, std, torch.full_like(which, step), which, prompt))
        x = x_next
    return x, rows


@torch.no_grad()
def revisit(
    model: Denoiser,
    x0: Tensor,
    conditions: Conditions,
    prompt: Tensor,
    sampler: Sampler,
    explored: Tensor,
    fresh: Callable[[int, int], Tensor],
) -> list[Transitions]:
    """Clean latents brought back to their explored steps, as transitions from there to what they were.

    This is how advantage-weighted matching (arXiv 2509.25050) explores: rollouts differ by their first noise alone, and
    what is trained is the prediction of a good image, and against that of a bad one, from any noise level.

    Args:
        model: the policy that drew the latents.
        x0: clean latents, float32 (B, ...).
        conditions: the encoded prompts.
        prompt: int64 (B,), the row of the conditions that each latent belongs to.
        sampler: the settings of the steps.
        explored: bool (B, N).
        fresh: noise for (latent, denoising step).

    Returns:
        The transitions, `rollout` counting the latents of this batch.
    """
    sigmas = model.sigmas(sampler.steps)
    rows = []
    for part in explored.nonzero().split(len(x0)):  # as many in a forward as there are latents
        which, step = part.unbind(1)
        clean, sigma = x0[which.to(x0.device)], sigmas[step].to(x0)
        e = torch.stack([fresh(i, t) for i, t in part.tolist()]).to(x0.device)
        x = torch.lerp(clean, e, sigma.reshape(-1, *[1] * (x0.ndim - 1)))
        velocity = model.predict(x, sigma, conditions, prompt[which], sampler.guidance)
        mean, std = transition(x, velocity, sigma, 0.0, sampler.kind, sampler.eta)
        rows.append(_rows(x, clean, mean, std, step, which, prompt))
    return rows


def _rows(
    x: Tensor, x_next: Tensor, mean: Tensor, std: Tensor, step: Tensor, rollout: Tensor, prompt: Tensor
) -> Transitions:
    """What was explored, with its log-probability under the policy that explored; the advantage is not known yet."""
    return Transitions(
        x=x,
        x_next=x_next,
        step=step,
        prompt=prompt[rollout],
        rollout=rollout,
        log_prob=log_prob(x_next, mean, std),
        advantage=torch.zeros(len(rollout), device=x.device),
    )
