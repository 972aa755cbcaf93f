"""Qwen-Image (arXiv 2508.02324)."""

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


class QwenImage:
    """The adapter of a `QwenImagePipeline`; see `Family` for what each part promises. Latents are packed.

    Prompts keep their own length, and a mask hides what pads the shorter ones of a batch.
    """

    part = "transformer"
    targets = tuple(
        f"attn.{name}"
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    )
    is_distilled = False

    def __init__(self, pipe: Any, settings: Model) -> None:
        self.pipe = pipe
        self.scheduler = flow_scheduler(pipe)
        self.text_tokens = text_length(settings, 512, 1024)
        self.size, self.grid, self.latent_shape = packed(pipe, settings)
        self.text_shapes = {"embeds": (self.text_tokens, pipe.transformer.config.joint_attention_dim)}

    def encode(self, prompt: str) -> dict[str, Tensor]:
        """The last layer of a vision-language model that was asked to describe the image."""
        embeds, mask = self.pipe.encode_prompt(
            prompt, max_sequence_length=self.text_tokens, device=self.pipe.text_encoder.device
        )
        seen = embeds.new_ones(embeds.shape[1], dtype=torch.bool) if mask is None else mask[0].bool()
        return {"embeds": embeds[0], "seen": seen}

    def sigmas(self, steps: int) -> Tensor:
        """Shifted the further, the larger the image, and stretched to end at the scheduler's own last noise."""
        shift = calculate_shift(self.pipe.scheduler, self.latent_shape[0])
        return flow_sigmas(self.pipe.scheduler, steps, shift, uniform=True)

    def velocity(self, network: Any, x: Tensor, sigma: Tensor, given: Mapping[str, Tensor], guidance: float) -> Tensor:
        """What the transformer predicts is the velocity."""
        return network(
            hidden_states=x.to(given["embeds"]),
            timestep=sigma,
            encoder_hidden_states=given["embeds"],
            encoder_hidden_states_mask=given.get("seen"),
            img_shapes=[[(1, *self.grid)]] * len(x),
            return_dict=False,
        )[0]

    def guided(self, unconditional: Tensor, conditional: Tensor, guidance: float) -> Tensor:
        """Classifier-free guidance whose every token is as long as without it."""
        both = classifier_free(unconditional, conditional, guidance)
        return both * (conditional.norm(dim=-1, keepdim=True) / both.norm(dim=-1, keepdim=True))

    def decode(self, x: Tensor) -> Tensor:
        """Unpacked, each channel with its own mean and deviation, and decoded as a video of one frame."""
        vae = self.pipe.vae
        x = self.pipe._unpack_latents(x, *self.size, self.pipe.vae_scale_factor)
        mean, std = (x.new_tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
        return vae.decode((x * std + mean).to(vae.dtype), return_dict=False)[0][:, :, 0]

    def call(self, guidance: float) -> dict[str, Any]:
        """Guidance by a second evaluation, of an empty prompt."""
        height, width = self.size
        unguided = {"negative_prompt": ""} if guidance != 1 else {}
        return {
            "true_cfg_scale": guidance,
            **unguided,
            "height": height,
            "width": width,
            "max_sequence_length": self.text_tokens,
        }
