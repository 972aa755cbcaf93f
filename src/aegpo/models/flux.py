"""FLUX.1: dev, which takes guidance as an input, and schnell, which does not."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aegpo.config import Model
from aegpo.models.base import (
    calculate_shift,
    classifier_free,
    flow_scheduler,
    flow_sigmas,
    packed,
    text_length,
)


class Flux:
    """The adapter of a `FluxPipeline`; see `Family` for what each part promises. Latents are packed, 2 x 2 a token."""

    part = "transformer"
    targets = tuple(
        [f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
        + [f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")]
        + ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]
    )
    guided = staticmethod(classifier_free)

    def __init__(self, pipe: Any, settings: Model) -> None:
        self.pipe = pipe
        self.scheduler = flow_scheduler(pipe)
        self.text_tokens = text_length(settings, 512, 512)
        self.is_distilled = pipe.transformer.config.guidance_embeds
        self.size, self.grid, self.latent_shape = packed(pipe, settings)
        known = pipe.transformer.config
        self.text_shapes = {
            "embeds": (self.text_tokens, known.joint_attention_dim),
            "pooled": (known.pooled_projection_dim,),
        }

    def encode(self, prompt: str) -> dict[str, Tensor]:
        """CLIP's pooled output and T5's tokens."""
        embeds, pooled, _ = self.pipe.encode_prompt(
            prompt, max_sequence_length=self.text_tokens, device=self.pipe.text_encoder.device
        )
        return {"embeds": embeds[0], "pooled": pooled[0]}

    def sigmas(self, steps: int) -> Tensor:
        """Shifted the further, the larger the image."""
        shift = calculate_shift(self.pipe.scheduler, self.latent_shape[0])
        return flow_sigmas(self.pipe.scheduler, steps, shift, uniform=True)

    def velocity(self, network: Any, x: Tensor, sigma: Tensor, given: Mapping[str, Tensor], guidance: float) -> Tensor:
        """What the transformer predicts is the velocity."""
        embeds = given["embeds"]
        places = self.pipe._prepare_latent_image_ids(len(x), *self.grid, embeds.device, embeds.dtype)
        return network(
            hidden_states=x.to(embeds),
            timestep=sigma,
            guidance=torch.full_like(sigma, guidance) if self.is_distilled else None,
            pooled_projections=given["pooled"],
            encoder_hidden_states=embeds,
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
            img_ids=places,
            return_dict=False,
        )[0]

    def decode(self, x: Tensor) -> Tensor:
        """Unpacked, shifted and scaled."""
        vae = self.pipe.vae
        x = self.pipe._unpack_latents(x, *self.size, self.pipe.vae_scale_factor)
        x = x / vae.config.scaling_factor + vae.config.shift_factor
        return vae.decode(x.to(vae.dtype), return_dict=False)[0]

    def call(self, guidance: float) -> dict[str, Any]:
        """Guidance by the name it has where the network takes it, and where a second evaluation makes it."""
        height, width = self.size
        size = {"height": height, "width": width, "max_sequence_length": self.text_tokens}
        if self.is_distilled:
            return {"guidance_scale": guidance, **size}
        unguided = {"negative_prompt": ""} if guidance != 1 else {}
        return {"true_cfg_scale": guidance, **unguided, **size}
