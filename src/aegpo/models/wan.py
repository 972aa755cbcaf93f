"""Wan 2.1, text to video (arXiv 2503.20314)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from aegpo.config import Model
from aegpo.models.base import classifier_free, flow_scheduler, flow_sigmas, height_and_width, text_length


class Wan:
    """The adapter of a `WanPipeline`; see `Family` for what each part promises."""

    part = "transformer"
    targets = tuple(f"{attn}.{name}" for attn in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0"))
    is_distilled = False
    guided = staticmethod(classifier_free)

    def __init__(self, pipe: Any, settings: Model) -> None:
        if pipe.config.boundary_ratio is not None or pipe.config.expand_timesteps:
            raise ValueError(
                "model.path: this is a Wan 2.2 pipeline, with two networks or a timestep a token; use a Wan 2.1"
            )
        self.pipe = pipe
        self.scheduler = flow_scheduler(pipe)
        self.text_tokens = text_length(settings, 512, 512)
        config, scale, every = pipe.transformer.config, pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal
        self.size = height_and_width(settings, (480, 832), scale * config.patch_size[1])
        self.frames = settings.frames or 81
        if self.frames % every != 1 % every:
            near = max(0, round((self.frames - 1) / every)) * every + 1
            raise ValueError(
                f"model.frames: {self.frames} is not one more than a multiple of {every}; {near} is near it"
            )
        latent_frames = (self.frames - 1) // every + 1
        self.latent_shape = (config.in_channels, latent_frames, self.size[0] // scale, self.size[1] // scale)
        self.text_shapes = {"embeds": (self.text_tokens, config.text_dim)}

    def encode(self, prompt: str) -> dict[str, Tensor]:
        """UMT5's tokens, zeros after the last one."""
        embeds, _ = self.pipe.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_tokens,
            device=self.pipe.text_encoder.device,
        )
        return {"embeds": embeds[0]}

    def sigmas(self, steps: int) -> Tensor:
        """Shifted alike for every size."""
        return flow_sigmas(self.pipe.scheduler, steps)

    def velocity(self, network: Any, x: Tensor, sigma: Tensor, given: Mapping[str, Tensor], guidance: float) -> Tensor:
        """What the transformer predicts is the velocity."""
        return network(
            hidden_states=x.to(given["embeds"]),
            timestep=1000 * sigma,
            encoder_hidden_states=given["embeds"],
            return_dict=False,
        )[0]

    def decode(self, x: Tensor) -> Tensor:
        """Each channel has its own mean and deviation."""
        vae = self.pipe.vae
        mean, std = (x.new_tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
        return vae.decode((x * std + mean).to(vae.dtype), return_dict=False)[0]

    def call(self, guidance: float) -> dict[str, Any]:
        """Guidance, size and frames."""
        height, width = self.size
        return {
            "guidance_scale": guidance,
            "height": height,
            "width": width,
            "num_frames": self.frames,
            "max_sequence_length": self.text_tokens,
        }
