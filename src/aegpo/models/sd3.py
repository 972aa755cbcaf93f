"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206)."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aegpo.config import Model
from aegpo.math import schedules
from aegpo.models.lora import add_lora, lora_weights
from aegpo.types import Conditions

LORA_TARGETS = tuple(
    f"attn.{name}"
    for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
)


SCHEDULE = {
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "invert_sigmas": False,
    "num_train_timesteps": schedules.TRAIN_STEPS,
}
"""What must stand in a scheduler's config for `schedules.sd3` to be its schedule."""


class SD3:
    """The adapter between the loop and a `StableDiffusion3Pipeline`; see `Denoiser` for what each part promises."""

    transformer: Any

    def __init__(self, pipe: Any, settings: Model, text_tokens: int, seed: int) -> None:
        self.pipe = pipe
        self.transformer = pipe.transformer.eval()
        self.text_tokens = text_tokens
        self.is_lora = settings.train == "lora"
        self.base: Any = None
        self.forwards = 0
        self.is_half = pipe.vae.dtype == torch.bfloat16

        for module in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
            if module is not None:
                module.requires_grad_(False)
        if self.is_lora:
            add_lora(self.transformer, settings.lora, LORA_TARGETS, seed)
        else:
            self.base = copy.deepcopy(self.transformer)
            self.transformer.requires_grad_(True)
        self.trainable: dict[str, nn.Parameter] = {
            name: p for name, p in self.transformer.named_parameters() if p.requires_grad
        }

        _check_schedule(pipe.scheduler)
        config = self.transformer.config
        side = settings.resolution // pipe.vae_scale_factor or config.sample_size
        patch = pipe.vae_scale_factor * config.patch_size
        if settings.resolution % patch:
            raise ValueError(f"model.resolution: {settings.resolution} is not a multiple of {patch} pixels")
        if side > config.pos_embed_max_size * config.patch_size:
            largest = config.pos_embed_max_size * patch
            raise ValueError(
                f"model.resolution: {settings.resolution} is above {largest} pixels, the largest this model knows"
            )
        self.latent_shape = (config.in_channels, side, side)

    @property
    def network(self) -> nn.Module:
        """The transformer."""
        return self.transformer

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return self.transformer.device

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditions:
        """Both CLIP encoders, and T5 where the pipeline has one."""
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            [*prompts, ""],
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_tokens,
            device=self.device,
        )
        return Conditions(embeds[:-1], pooled[:-1], embeds[-1:], pooled[-1:])

    def sigmas(self, steps: int) -> Tensor:
        """The schedule that diffusers gives this pipeline."""
        return schedules.sd3(steps, self.pipe.scheduler.config.shift)

    def predict(self, x: Tensor, sigma: Tensor, conditions: Conditions, prompt: Tensor, guidance: float) -> Tensor:
        """One forward for a batch at any mixture of noise levels; guidance doubles it."""
        embeds, pooled = conditions.embeds[prompt], conditions.pooled[prompt]
        sigma = sigma.to(x).expand(len(x))
        if guidance == 1:
            return self._velocity(x, sigma, embeds, pooled)
        embeds = torch.cat([conditions.null_embeds.expand_as(embeds), embeds])
        pooled = torch.cat([conditions.null_pooled.expand_as(pooled), pooled])
        unconditional, conditional = self._velocity(x.repeat(2, 1, 1, 1), sigma.repeat(2), embeds, pooled).chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    def _velocity(self, x: Tensor, sigma: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
        self.forwards += len(x)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.is_half):
            velocity = self.transformer(
                hidden_states=x, timestep=1000 * sigma, encoder_hidden_states=embeds, pooled_projections=pooled
            ).sample
        velocity = velocity.float()
        if velocity.requires_grad:
            velocity.register_hook(partial(self._count_backward, len(x)))
        return velocity

    def _count_backward(self, rows: int, _slope: Tensor) -> None:
        self.forwards += 2 * rows

    @torch.no_grad()
    def decode(self, x: Tensor) -> np.ndarray:
        """Through the VAE, as the pipeline's own call does it."""
        vae = self.pipe.vae
        pixels = vae.decode((x / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)).sample
        pixels = (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).cpu().numpy()

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Adapter off, or the frozen copy when all weights are trained."""
        policy = self.transformer
        try:
            if self.base is None:
                policy.disable_adapters()
            else:
                self.transformer = self.base
            yield
        finally:
            if self.base is None:
                policy.enable_adapters()
            else:
                self.transformer = policy

    def save(self, folder: Path) -> None:
        """`pytorch_lora_weights.safetensors`, or the whole pipeline when all weights are trained."""
        if self.is_lora:
            weights, settings = lora_weights(self.transformer)
            self.pipe.save_lora_weights(
                folder, transformer_lora_layers=weights, transformer_lora_adapter_metadata=settings
            )
        else:
            self.pipe.save_pretrained(folder)


def _check_schedule(scheduler: Any) -> None:
    """Raise ValueError where `aegpo` and the pipeline's own call would step through different noise levels."""
    name = type(scheduler).__name__
    if name != "FlowMatchEulerDiscreteScheduler":
        raise ValueError(f"model.path: its scheduler is a {name}; a FlowMatchEulerDiscreteScheduler is needed")
    for key, known in SCHEDULE.items():
        if (value := scheduler.config.get(key, known)) != known:
            raise ValueError(f"model.path: its scheduler has {key}: {value}; only {known} is supported")
