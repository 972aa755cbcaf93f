"""Flow-GRPO's loop as it is published, written from the formulas (arXiv 2505.05470): what `throughput.py` is beside.

Every rollout's prompt is encoded by itself, rollouts are drawn in micro-batches, and the update goes over micro-batches
of rollouts and, inside, over denoising steps one by one: a forward and a backward for each, and, where there is a pull
to the base, a forward of that. It uses nothing of `aegpo`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """What a micro-batch of B rollouts of N steps leaves for the update."""

    latents: Tensor  # (B, N + 1, ...)
    log_probs: Tensor  # (B, N)
    embeds: Tensor  # (B, tokens, width), or twice B under guidance, those of the empty prompt first
    pooled: Tensor  # (B, width), or twice B
    images: np.ndarray  # uint8 (B, H, W, 3)


def velocity(
    pipe: Any, x: Tensor, sigma: Tensor, embeds: Tensor, pooled: Tensor, guidance: float = 1.0, half: bool = False
) -> Tensor:
    both = torch.cat([x, x]) if guidance != 1 else x
    with torch.autocast(x.device.type, torch.bfloat16) if half else nullcontext():
        v = pipe.transformer(
            hidden_states=both,
            timestep=1000 * sigma.to(x).expand(len(both)),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
        ).sample.float()
    if guidance == 1:
        return v
    unconditional, conditional = v.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def sde_step(
    x: Tensor, v: Tensor, sigmas: Tensor, i: int, eta: float, z: Tensor | None, x_next: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Flow-SDE's step i from x, to mean + std z or to a given `x_next`, and its log-probability, (B,)."""
    s, s_next = sigmas[i].item(), sigmas[i + 1].item()
    g = eta * math.sqrt(s / (1 - (sigmas[1].item() if i == 0 else s)))
    h = s - s_next
    mean = x * (1 - g**2 / (2 * s) * h) - v * (1 + g**2 * (1 - s) / (2 * s)) * h
    std = g * math.sqrt(h)
    if x_next is None:
        assert z is not None
        x_next = mean + std * z
    log_prob = -((x_next.detach() - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(2 * math.pi) / 2
    return x_next, log_prob.flatten(1).mean(1)


@torch.no_grad()
def sample(
    pipe: Any,
    encode: Callable[[list[str]], tuple[Tensor, Tensor]],
    prompts: list[str],
    first: Tensor,
    noise: Callable[[int], Tensor],
    sigmas: Tensor,
    eta: float,
    micro_batch: int,
    guidance: float = 1.0,
    half: bool = False,
) -> list[Samples]:
    """Draw one rollout for each of the prompts, which repeat as often as a group is large."""
    drawn = []
    for at in range(0, len(prompts), micro_batch):
        part = slice(at, at + micro_batch)
        asked = prompts[part]
        embeds, pooled = encode(asked if guidance == 1 else [""] * len(asked) + asked)
        x, log_probs = first[part], []
        latents = [x]
        for i in range(len(sigmas) - 1):
            v = velocity(pipe, x, sigmas[i], embeds, pooled, guidance, half)
            if i == len(sigmas) - 2:  # onto sigma 0: no noise, and never trained
                x = x - sigmas[i].item() * v
            else:
                x, log_prob = sde_step(x, v, sigmas, i, eta, noise(i)[part])
                log_probs.append(log_prob)
            latents.append(x)
        vae = pipe.vae
        pixels = vae.decode((x / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)).sample.float()
        pixels = (pixels / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        drawn.append(Samples(torch.stack(latents, 1), torch.stack(log_probs, 1), embeds, pooled, pixels))
    return drawn


def advantages(rewards: Tensor, group_size: int) -> Tensor:
    """Reward beside the group's mean, over the standard deviation of all."""
    grouped = rewards.reshape(-1, group_size)
    return ((grouped - grouped.mean(1, keepdim=True)) / (rewards.std(correction=0) + 1e-4)).flatten()


def update(
    pipe: Any,
    drawn: Sequence[Samples],
    advantage: Tensor,
    sigmas: Tensor,
    eta: float,
    clip: float,
    kl: float = 0.0,
    guidance: float = 1.0,
    half: bool = False,
) -> Iterator[Tensor]:
    """Accumulate the gradient of the clipped surrogate, step by step; yields the ratios of each forward."""
    at, steps = 0, len(sigmas) - 2
    for samples in drawn:
        own = advantage[at : at + len(samples.images)]
        at += len(own)
        for i in range(steps):
            x, x_next = samples.latents[:, i], samples.latents[:, i + 1]
            given = (x, sigmas[i], samples.embeds, samples.pooled, guidance, half)
            v = velocity(pipe, *given)
            _, log_prob = sde_step(x, v, sigmas, i, eta, None, x_next)
            ratio = torch.exp(log_prob - samples.log_probs[:, i])
            loss = torch.maximum(-own * ratio, -own * ratio.clamp(1 - clip, 1 + clip)).sum()
            if kl:
                pipe.transformer.disable_adapters()
                with torch.no_grad():
                    v_ref = velocity(pipe, *given)
                pipe.transformer.enable_adapters()
                s = sigmas[i].item()
                g_squared = eta**2 * s / (1 - (sigmas[1].item() if i == 0 else s))
                slope = (s - sigmas[i + 1].item()) * (1 + g_squared * (1 - s) / (2 * s))  # of the mean in the velocity
                loss = loss + kl * ((slope * (v - v_ref)) ** 2 / (2 * g_squared)).flatten(1).mean(1).sum()
            (loss / (len(advantage) * steps)).backward()
            yield ratio.detach()
