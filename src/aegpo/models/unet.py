"""Stable Diffusion 1.5, 2.1 and XL (arXiv 2112.10752, 2307.01952): variance-preserving U-Nets, spoken to as flows.

Their latent `x_vp = sqrt(a) x0 + sqrt(1 - a) e` is a flow's, `x = (1 - s) x0 + s e`, over `sqrt(s^2 + (1 - s)^2)`, at
`s = sqrt(1 - a) / (sqrt(a) + sqrt(1 - a))`. In these coordinates DDIM (arXiv 2010.02502) is Euler's step, and `ddim` of
`aegpo.math.transitions` is DDIM at eta, which is what DDPO (arXiv 2305.13301) samples by.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from aegpo.config import Model
from aegpo.math.transitions import per_row
from aegpo.models.base import classifier_free, height_and_width


class UNet:
    """The adapter of a `StableDiffusionPipeline` or `StableDiffusionXLPipeline`; see `Family`.

    Its call takes DDIM's steps, whatever scheduler it came with, and the last of them lands on the clean latent.
    """

    part = "unet"
    targets = tuple(f"{attn}.{name}" for attn in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0"))
    is_distilled = False
    guided = staticmethod(classifier_free)

    def __init__(self, pipe: Any, settings: Model) -> None:
        self.pipe = pipe
        self.is_xl = hasattr(pipe, "text_encoder_2")
        own = pipe.scheduler.config
        spacing = "trailing" if own.get("timestep_spacing") == "trailing" else "leading"
        changes = {"timestep_spacing": spacing, "set_alpha_to_one": True, "clip_sample": False}
        scheduler: Any = DDIMScheduler.from_config(own, **changes)
        pipe.scheduler = scheduler
        written = ", ".join(f"{name}={value!r}" for name, value in changes.items())
        self.scheduler = f"DDIMScheduler.from_config(pipe.scheduler.config, {written})"
        self.predicts = scheduler.config.prediction_type
        if self.predicts not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"model.path: its network predicts {self.predicts}; only epsilon and v_prediction are known"
            )
        if pipe.unet.config.time_cond_proj_dim is not None:
            raise ValueError(
                "model.path: its U-Net is told the guidance, as a distilled one (LCM) is; such are not known"
            )
        alphas = scheduler.alphas_cumprod.double()
        if self.predicts == "epsilon" and alphas[-1] == 0:
            raise ValueError("model.path: its first latent is pure noise, of which an epsilon prediction tells nothing")
        self.levels = (1 - alphas).sqrt() / (alphas.sqrt() + (1 - alphas).sqrt())  # sigma of each timestep
        config, scale = pipe.unet.config, pipe.vae_scale_factor
        side = config.sample_size * scale
        self.size = height_and_width(settings, (side, side), scale * 2 ** (len(config.block_out_channels) - 1))
        self.latent_shape = (config.in_channels, self.size[0] // scale, self.size[1] // scale)
        self.text_shapes = {"embeds": (pipe.text_encoder.config.max_position_embeddings, config.cross_attention_dim)}
        self.text_shapes |= {"pooled": (pipe.text_encoder_2.config.projection_dim,)} if self.is_xl else {}

    def encode(self, prompt: str) -> dict[str, Tensor]:
        """CLIP's tokens; for XL those of two encoders, and the pooled output of one."""
        device = self.pipe.text_encoder.device
        if not self.is_xl:
            embeds, _ = self.pipe.encode_prompt(prompt, device, 1, do_classifier_free_guidance=False)
            return {"embeds": embeds[0]}
        embeds, _, pooled, _ = self.pipe.encode_prompt(prompt, device=device, do_classifier_free_guidance=False)
        seen = 0 if prompt == "" and self.pipe.config.force_zeros_for_empty_prompt else 1
        return {"embeds": embeds[0] * seen, "pooled": pooled[0] * seen}

    def sigmas(self, steps: int) -> Tensor:
        """DDIM's timesteps, as a flow's noise levels, and 0."""
        self.pipe.scheduler.set_timesteps(steps)
        return torch.cat([self.levels[self.pipe.scheduler.timesteps], self.levels.new_zeros(1)])

    def velocity(self, network: Any, x: Tensor, sigma: Tensor, given: Mapping[str, Tensor], guidance: float) -> Tensor:
        """What the U-Net predicts, the noise or the velocity of arXiv 2202.00512, turned into a flow's velocity."""
        levels = self.levels.to(sigma)
        timestep = (levels - sigma.unsqueeze(1)).abs().argmin(1)
        s = per_row(sigma, x)
        scale = 1 / torch.hypot(s, 1 - s)
        added = {}
        if self.is_xl:
            sizes = given["pooled"].new_tensor([*self.size, 0, 0, *self.size]).expand(len(x), -1)
            added = {"added_cond_kwargs": {"text_embeds": given["pooled"], "time_ids": sizes}}
        predicted = network(
            (x * scale).to(given["embeds"]), timestep, encoder_hidden_states=given["embeds"], return_dict=False, **added
        )[0].float()
        if self.predicts == "epsilon":
            return (predicted - x) / (1 - s)
        return scale * predicted + scale**2 * (2 * s - 1) * x

    def decode(self, x: Tensor) -> Tensor:
        """Latents are scaled."""
        vae = self.pipe.vae
        return vae.decode((x / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]

    def call(self, guidance: float) -> dict[str, Any]:
        """Guidance and size."""
        height, width = self.size
        return {"guidance_scale": guidance, "height": height, "width": width}
