"""FLUX.2 klein: 4B and 9B, base or distilled to few steps."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from aegpo.config import Model
from aegpo.models.base import classifier_free, flow_scheduler, flow_sigmas, packed, text_length


class Flux2Klein:
    """The adapter of a `Flux2KleinPipeline`; see `Family` for what each part promises. Latents are packed."""

    part = "transformer"
    targets = tuple(
        [f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
        + [f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")]
        + ["attn.to_qkv_mlp_proj", "attn.to_out"]
    )
    guided = staticmethod(classifier_free)

    def __init__(self, pipe: Any, settings: Model) -> None:
        self.pipe = pipe
        self.scheduler = flow_scheduler(pipe)
        self.text_tokens = text_length(settings, 512, 512)
        self.is_distilled = pipe.config.is_distilled
        self.size, self.grid, self.latent_shape = packed(pipe, settings)
        self.text_shapes = {"embeds": (self.text_tokens, pipe.transformer.config.joint_attention_dim)}

    def encode(self, prompt: str) -> dict[str, Tensor]:
        """Three inner layers of a language model, side by side."""
        embeds, _ = self.pipe.encode_prompt(
            prompt, max_sequence_length=self.text_tokens, device=self.pipe.text_encoder.device
        )
        return {"embeds": embeds[0]}

    def sigmas(self, steps: int) -> Tensor:
        """Shifted by a rule that looks at the image's size and the number of steps."""
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        shift = compute_empirical_mu(self.latent_shape[0], steps)
        return flow_sigmas(self.pipe.scheduler, steps, shift, uniform=True)

    def velocity(self, network: Any, x: Tensor, sigma: Tensor, given: Mapping[str, Tensor], guidance: float) -> Tensor:
        """What the transformer predicts is the velocity."""
        embeds = given["embeds"]
        images = self.pipe._prepare_latent_ids(x.new_empty(len(x), 1, *self.grid))
        return network(
            hidden_states=x.to(embeds),
            timestep=sigma,
            guidance=None,
            encoder_hidden_states=embeds,
            txt_ids=self.pipe._prepare_text_ids(embeds).to(x.device),
            img_ids=images.to(x.device),
            return_dict=False,
        )[0]

    def decode(self, x: Tensor) -> Tensor:
        """Unpacked, each channel with its own mean and deviation."""
        vae = self.pipe.vae
        x = x.transpose(1, 2).unflatten(2, self.grid)
        mean, variance = (v.view(1, -1, 1, 1).to(x) for v in (vae.bn.running_mean, vae.bn.running_var))
        x = x * (variance + vae.config.batch_norm_eps).sqrt() + mean
        return vae.decode(self.pipe._unpatchify_latents(x).to(vae.dtype), return_dict=False)[0]

    def call(self, guidance: float) -> dict[str, Any]:
        """Guidance, size, and the length of the prompt.

        Raises:
            ValueError: guidance, for one that was distilled to do without.
        """
        if self.is_distilled and guidance != 1:
            raise ValueError(
                f"sampler.guidance: this FLUX.2 klein does without by distillation, and would ignore {guidance}; set 1"
            )
        height, width = self.size
        return {
            "guidance_scale": guidance,
            "height": height,
            "width": width,
            "max_sequence_length": self.text_tokens,
        }
