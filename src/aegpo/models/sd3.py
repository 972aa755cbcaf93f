"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from aegpo.config import Model
from aegpo.models.base import (
    calculate_shift,
    classifier_free,
    flow_scheduler,
    flow_sigmas,
    height_and_width,
    text_length,
)


class SD3:
    """The adapter of a `StableDiffusion3Pipeline`; see `Family` for what each part promises."""

    part = "transformer"
    targets = tuple(
        f"attn.{name}"
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    )
    is_distilled = False
    guided = staticmethod(classifier_free)

    def __init__(self, pipe: Any, settings: Model) -> None:
        self.pipe = pipe
        self.scheduler = flow_scheduler(pipe)
        self.text_tokens = text_length(settings, 0 if pipe.text_encoder_3 is None else 256, 512)
        config, scale = pipe.transformer.config, pipe.vae_scale_factor
        patch, side = scale * config.patch_size, config.sample_size * scale
        self.size = height_and_width(settings, (side, side), patch)
        if max(self.size) > config.pos_embed_max_size * patch:
            largest = config.pos_embed_max_size * patch
            raise ValueError(
                f"model.resolution: {max(self.size)} is above {largest} pixels, the largest this model knows"
            )
        self.latent_shape = (config.in_channels, self.size[0] // scale, self.size[1] // scale)
        words = pipe.text_encoder.config.max_position_embeddings + self.text_tokens
        self.text_shapes = {
            "embeds": (words, config.joint_attention_dim),
            "pooled": (config.pooled_projection_dim,),
        }
        self.tokens = self.size[0] * self.size[1] // patch**2

    def encode(self, prompt: str) -> dict[str, Tensor]:
        """Both CLIP encoders, and T5 where the pipeline has one."""
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompt,
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_tokens,
            device=self.pipe.text_encoder.device,
        )
        return {"embeds": embeds[0], "pooled": pooled[0]}

    def sigmas(self, steps: int) -> Tensor:
        """Shifted twice, as diffusers does it."""
        return flow_sigmas(self.pipe.scheduler, steps, calculate_shift(self.pipe.scheduler, self.tokens))

    def velocity(self, network: Any, x: Tensor, sigma: Tensor, given: Mapping[str, Tensor], guidance: float) -> Tensor:
        """What the transformer predicts is the velocity."""
        return network(
            hidden_states=x.to(given["embeds"]),
            timestep=1000 * sigma,
            encoder_hidden_states=given["embeds"],
            pooled_projections=given["pooled"],
            return_dict=False,
        )[0]

    def decode(self, x: Tensor) -> Tensor:
        """Latents are shifted and scaled."""
        vae = self.pipe.vae
        x = x / vae.config.scaling_factor + vae.config.shift_factor
        return vae.decode(x.to(vae.dtype), return_dict=False)[0]

    def call(self, guidance: float) -> dict[str, Any]:
        """Guidance, size, and the length of T5's part of the prompt."""
        height, width = self.size
        return {
            "guidance_scale": guidance,
            "height": height,
            "width": width,
            "max_sequence_length": self.text_tokens,
        }
