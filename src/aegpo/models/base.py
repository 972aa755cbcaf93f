"""The policy as the loop sees it, whatever family its network is of.

What every family does alike stands here, in `Denoiser`; what each does its own way is one small adapter, a `Family`.
Nothing outside this room knows diffusers.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from aegpo.config import Model
from aegpo.distributed import whole
from aegpo.math import schedules
from aegpo.models import lora, quantized
from aegpo.models.blocks import repeated
from aegpo.types import Conditions

PIXELS = 2**22  # decoded at once, or one image


class Family(Protocol):
    """One family of diffusers pipelines: what an adapter answers. docs/add-a-model.md walks through one.

    Attributes:
        part: the component of the pipeline that is trained, `transformer` or `unet`.
        targets: the linear layers that a low-rank adapter is put on unless settings say otherwise, by the end of their
            names.
        is_distilled: whether the network takes guidance as an input, or none at all: no second evaluation makes it.
        latent_shape: of one image, such as (channels, height, width); for a video, with frames.
        text_shapes: what `encode` gives of the longest prompt, by name, masks left out: its shapes.
        scheduler: what the pipeline's own scheduler had to be replaced by for its call to draw as we do, as a line of
            Python; empty where its own serves.
    """

    part: str
    targets: tuple[str, ...]
    is_distilled: bool
    latent_shape: tuple[int, ...]
    text_shapes: dict[str, tuple[int, ...]]
    scheduler: str

    def encode(self, prompt: str) -> dict[str, Tensor]:
        """What the network wants to know of a prompt, by name: without a batch dimension; `embeds` is one of them."""
        ...

    def sigmas(self, steps: int) -> Tensor:
        """The noise schedule of the pipeline's own call, float64 (steps + 1,), falling to 0."""
        ...

    def velocity(self, network: Any, x: Tensor, sigma: Tensor, given: Mapping[str, Tensor], guidance: float) -> Tensor:
        """The velocity e - x0 that the network predicts, (B, ...), in any dtype.

        Args:
            network: the part to call, the policy's or the base's.
            x: latents (1 - sigma) x0 + sigma e, float32 (B, ...).
            sigma: float32 (B,).
            given: what `encode` gave, (B, ...) each, in the dtype to compute in.
            guidance: for a network that takes it as an input.
        """
        ...

    def guided(self, unconditional: Tensor, conditional: Tensor, guidance: float) -> Tensor:
        """The two velocities as one, for a network that does not take guidance as an input."""
        ...

    def decode(self, x: Tensor) -> Tensor:
        """Clean latents (B, ...) as pixels from -1 to 1, (B, 3, height, width) or (B, 3, frames, height, width)."""
        ...

    def call(self, guidance: float) -> dict[str, Any]:
        """The arguments with which the pipeline's own call draws as we do, but for prompt, steps and noise."""
        ...


class Denoiser:
    """A text-to-image or text-to-video model whose policy is being trained.

    Attributes:
        trainable: the parameters that are trained, by name; float32.
        forwards: network evaluations x samples so far, a backward counted as two.
        device: where latents belong.
        is_compiled: whether its code is, but for what runs within a probe: the two round otherwise.
        is_sharded: whether each process holds but a part of the weights.

    Args:
        pipe: a diffusers pipeline, which this takes over.
        family: its adapter.
        settings: the `model` part of a config.
        dtype: what the network computes in, float32 or bfloat16.
        seed: of a fresh adapter's weights.
    """

    def __init__(self, pipe: Any, family: Family, settings: Model, dtype: torch.dtype, seed: int) -> None:
        self.pipe = pipe
        self.family = family
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.forwards = 0
        self._policy: Any = getattr(pipe, family.part).eval()
        self._base: Any = None
        self._known: dict[str, dict[str, Tensor]] = {}
        self._sigmas: dict[tuple[int, float | None], Tensor] = {}
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False)

        self.is_lora = settings.train == "lora"
        if settings.quantize != "none":
            quantized.quantize(self._policy, settings.quantize, dtype)
        self._policy.to(self.device)
        pipe.vae.to(self.device)
        if self.is_lora:
            lora.add_lora(self._policy, settings.lora, family.targets, seed)
        else:
            self._policy.float()  # trained in full precision, computed under autocast
            self._base = copy.deepcopy(self._policy)
            self._policy.requires_grad_(True)
        self.trainable = _trained(self._policy)
        self._dtype = dtype if self.is_lora else torch.float32
        self._autocasts = dtype != self._dtype
        self.is_compiled, self.is_sharded = settings.compile, False
        if settings.gradient_checkpointing:
            self._policy.enable_gradient_checkpointing()
        for network in (self._policy, self._base):
            if self.is_compiled and network is not None:
                compile_blocks(network)
        self._acting = self._policy

    def shard(self) -> None:
        """Let each process keep but its part of the weights; a block's are gathered while it is evaluated (FSDP2).

        Gradients are summed over the processes on the way back, and each keeps its part of those too.
        """
        mesh = init_device_mesh(self.device.type, (dist.get_world_size(),))
        for network in (self._policy, self._base):
            for part in (*repeated(network).values(), network) if network is not None else ():
                sharded = fully_shard(part, mesh=mesh, reshard_after_forward=True)  # or other weights were not seen
                sharded.set_gradient_divide_factor(1.0)  # a sum, no mean: how many rows each has differs
                sharded.set_force_sum_reduction_for_comms(True)
        self.trainable = _trained(self._policy)
        self.is_sharded = True

    @property
    def network(self) -> nn.Module:
        """The transformer or the U-Net, whose attention a probe reads; within `reference`, the base policy's."""
        return self._acting

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one image, such as (channels, height, width)."""
        return self.family.latent_shape

    # ---------------------------------------------------------------- prompts

    @torch.no_grad()
    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode those prompts that were not encoded before, each by itself, so that none depends on its neighbours.

        The text encoders are on the device for so long only. What they gave stays in the host's memory, by the text.
        """
        new = [text for text in dict.fromkeys(["", *prompts]) if text not in self._known]
        if not new:
            return
        encoders = [part for name, part in self.pipe.components.items() if name.startswith("text_encoder") and part]
        for encoder in encoders:
            encoder.to(self.device)
        for text in new:
            self._known[text] = {name: tensor.cpu() for name, tensor in self.family.encode(text).items()}
        for encoder in encoders if self.device.type != "cpu" else ():
            encoder.to("cpu")
        if self.device.type != "cpu":
            torch.cuda.empty_cache()

    def encode(self, prompts: Sequence[str]) -> Conditions:
        """The prompts as the network wants them, one row each, and the empty prompt that guidance needs."""
        self.prepare(prompts)
        rows = _stacked([self._known[text] for text in ["", *prompts]], self.device, self._dtype)
        return Conditions({k: v[1:] for k, v in rows.items()}, {k: v[:1] for k, v in rows.items()})

    # ---------------------------------------------------------------- predicting

    def even(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """The batches, and as many empty ones as other processes have more, if the network is sharded.

        A sharded network's evaluations are of all processes together, so each takes as many.
        """
        most = torch.tensor(len(batches), device=self.device)
        if self.is_sharded:
            dist.all_reduce(most, dist.ReduceOp.MAX)
        yield from batches
        for _ in range(int(most) - len(batches)):
            yield torch.zeros(0, *(batches[0].shape[1:] if batches else ()), dtype=torch.int64)

    def sigmas(self, steps: int, shift: float | None = None) -> Tensor:
        """A noise schedule, float64 (steps + 1,), falling to 0: the pipeline's own, or that of a shift.

        Raises:
            ValueError: a shift, for a model that does not begin with pure noise.
        """
        if (steps, shift) not in self._sigmas:
            own = self.family.sigmas(steps)
            if shift is not None and own[0] < 1:
                raise ValueError(
                    f"sampler.shift: a shifted grid begins with pure noise, but this model knows no more than "
                    f"{own[0]:.3f} of it; leave it null"
                )
            self._sigmas[steps, shift] = own if shift is None else schedules.shifted_linear(steps, shift)
        return self._sigmas[steps, shift]

    def doubles(self, guidance: float) -> bool:
        """Whether guidance costs a second evaluation: the batch is doubled then, the empty prompt's half first."""
        return guidance != 1 and not self.family.is_distilled

    def predict(self, x: Tensor, sigma: Tensor, conditions: Conditions, prompt: Tensor, guidance: float) -> Tensor:
        """The velocity after guidance: one forward for a batch at any mixture of noise levels.

        Args:
            x: latents, float32 (B, ...).
            sigma: (B,), or a scalar for all.
            conditions: the encoded prompts of the step.
            prompt: int64 (B,), the row of the conditions that each latent belongs to.
            guidance: weight w of v_u + w (v_c - v_u), or the input of a network that was distilled under guidance. At 1
                the empty prompt is not evaluated at all.

        Returns:
            float32 (B, ...).
        """
        if not len(x) and not self.is_sharded:
            return torch.zeros_like(x)
        wanted = len(x)
        if not wanted:  # what the other processes predict takes this one's part of the weights too: any row does
            x, sigma, prompt = x.new_zeros(1, *x.shape[1:]), sigma.new_ones(1), prompt.new_zeros(1)
            conditions = replace(conditions, rows=conditions.null)
        sigma = sigma.to(x).expand(len(x))
        given = {name: rows[prompt.to(rows.device)] for name, rows in conditions.rows.items()}
        if not self.doubles(guidance):
            return self._velocity(x, sigma, given, guidance, wanted)[:wanted]
        both = {name: torch.cat([conditions.null[name].expand_as(rows), rows]) for name, rows in given.items()}
        velocities = self._velocity(torch.cat([x, x]), sigma.repeat(2), both, guidance, 2 * wanted)
        unconditional, conditional = velocities.chunk(2)
        return self.family.guided(unconditional, conditional, guidance)[:wanted]

    def _velocity(self, x: Tensor, sigma: Tensor, given: Mapping[str, Tensor], guidance: float, counted: int) -> Tensor:
        """One evaluation a row. Code compiled for a way back rounds otherwise than other code, so it always serves."""
        self.forwards += counted
        wanted = torch.is_grad_enabled()
        with (
            torch.set_grad_enabled(wanted or self.is_compiled),
            torch.autocast(x.device.type, torch.bfloat16, enabled=self._autocasts),
        ):
            velocity = self.family.velocity(self._acting, x, sigma, given, guidance).float()
        if not wanted:
            return velocity.detach()
        if velocity.requires_grad:
            velocity.register_hook(partial(self._count_backward, counted))
        return velocity

    def _count_backward(self, samples: int, _: Tensor) -> None:
        self.forwards += 2 * samples

    @torch.no_grad()
    def decode(self, x: Tensor) -> np.ndarray:
        """Images of clean latents (B, ...), uint8 (B, height, width, 3), or videos (B, frames, height, width, 3)."""
        first = self.family.decode(x[:1])
        most = max(1, PIXELS // math.prod(first.shape[2:]))
        pixels = torch.cat([first, *(self.family.decode(part) for part in x[1:].split(most) if len(part))])
        pixels = (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
        return pixels.movedim(1, -1).cpu().numpy()

    # ---------------------------------------------------------------- weights

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within it, `predict` is the base policy's."""
        try:
            if self._base is None:
                self._policy.disable_adapters()
            else:
                self._acting = self._base
            yield
        finally:
            if self._base is None:
                self._policy.enable_adapters()
            else:
                self._acting = self._policy

    def weights(self) -> dict[str, Tensor]:
        """The network's weights by name, or its adapter's if that is trained, put together from all processes."""
        names = self.trainable if self.is_lora else None
        state = self._policy.state_dict()
        return {name: whole(tensor) for name, tensor in state.items() if names is None or name in names}

    def save(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """`pytorch_lora_weights.safetensors` in diffusers' layout, or the whole pipeline if all weights are trained.

        Args:
            folder: to write to.
            weights: what `weights` gave, where all processes had to be asked for it; by default, it is asked here.
        """
        given = self.weights() if weights is None else weights
        if not self.is_lora:
            self._policy.state_dict = lambda: given  # which diffusers asks for, and a sharded one knows in part
            self.pipe.save_pretrained(folder)
            del self._policy.state_dict
            return
        weights, settings = lora.lora_weights(self._policy, given)
        part = self.family.part
        self.pipe.save_lora_weights(
            folder, **{f"{part}_lora_layers": weights, f"{part}_lora_adapter_metadata": settings}
        )


def _trained(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def compile_blocks(network: Any) -> None:
    """Compile the blocks that a network repeats, each kind once, for batches of any size."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for block in repeated(network).values():
        block.compile()


@contextmanager
def acting(model: Denoiser, weights: Sequence[Tensor] | None) -> Iterator[None]:
    """Within it, the policy has other weights, in the order of `model.trainable`, unless there are none."""
    if weights is None:
        yield
        return
    own = [parameter.detach().clone() for parameter in model.trainable.values()]
    _put(model, weights)
    try:
        yield
    finally:
        _put(model, own)


def _put(model: Denoiser, weights: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, weight in zip(model.trainable.values(), weights, strict=True):
            parameter.copy_(weight)


def _stacked(rows: Sequence[Mapping[str, Tensor]], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Rows as one batch: shorter ones are padded with zeros behind, and a mask that hides nothing is left out."""
    stacked = {}
    for name in rows[0]:
        batch = nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True)
        if batch.dtype == torch.bool:
            if not batch.all():
                stacked[name] = batch.to(device)
        else:
            stacked[name] = batch.to(device, dtype)
    return stacked


# ---------------------------------------------------------------- what adapters share


def classifier_free(unconditional: Tensor, conditional: Tensor, guidance: float) -> Tensor:
    """v_u + w (v_c - v_u) (arXiv 2207.12598)."""
    return unconditional + guidance * (conditional - unconditional)


def height_and_width(settings: Model, own: tuple[int, int], multiple: int) -> tuple[int, int]:
    """The size of an image in pixels: as the settings say, or the pipeline's own.

    Raises:
        ValueError: it is no multiple of what the network and its decoder need.
    """
    asked = settings.resolution
    size = (asked or own[0], asked or own[1]) if isinstance(asked, int) else asked
    for side in size:
        if side % multiple:
            near = max(multiple, round(side / multiple) * multiple)
            raise ValueError(f"model.resolution: {side} is not a multiple of {multiple} pixels; {near} is near it")
    return size


def packed(pipe: Any, settings: Model) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Where a token is 2 x 2 latents: the size in pixels, the tokens in height and width, the shape of the latents."""
    side, token = pipe.default_sample_size * pipe.vae_scale_factor, 2 * pipe.vae_scale_factor
    height, width = height_and_width(settings, (side, side), token)
    grid = (height // token, width // token)
    return (height, width), grid, (grid[0] * grid[1], pipe.transformer.config.in_channels)


def text_length(settings: Model, own: int, most: int) -> int:
    """Tokens of a prompt, where the pipeline leaves the choice: as the settings say, or the call's own default.

    Raises:
        ValueError: more than the pipeline takes.
    """
    asked = own if settings.text_tokens is None else settings.text_tokens
    if asked > most:
        raise ValueError(f"model.text_tokens: {asked} is above {most}, the most that this pipeline takes")
    return asked


def flow_scheduler(pipe: Any) -> str:
    """See to it that the pipeline's own call takes Euler's steps; returns the line of Python that did, if any.

    Raises:
        ValueError: its scheduler is of no flow.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    own = pipe.scheduler
    if isinstance(own, FlowMatchEulerDiscreteScheduler):
        return ""
    if not own.config.get("use_flow_sigmas", False):
        raise ValueError(
            f"model.path: its scheduler is a {type(own).__name__}; a FlowMatchEulerDiscreteScheduler is needed"
        )
    shift = float(own.config["flow_shift"])
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    return f"FlowMatchEulerDiscreteScheduler(shift={shift})"


def flow_sigmas(scheduler: Any, steps: int, mu: float | None = None, uniform: bool = False) -> Tensor:
    """The schedule that a flow's scheduler gives the pipeline's call, float64 (steps + 1,).

    Args:
        scheduler: of the pipeline.
        steps: denoising steps.
        mu: how far it is shifted, if that depends on the image's size.
        uniform: whether the call hands it a uniform grid from 1 to 1 / steps, as most do.

    Raises:
        ValueError: it does not fall from 1 to 0.
    """
    own = copy.copy(scheduler)
    grid = {"sigmas": np.linspace(1.0, 1 / steps, steps)} if uniform else {"num_inference_steps": steps}
    own.set_timesteps(**grid, **({"mu": mu} if own.config.use_dynamic_shifting else {}))
    sigmas = own.sigmas.double()
    if sigmas[0] != 1 or sigmas[-1] != 0 or (sigmas.diff() >= 0).any():
        raise ValueError(
            f"model.path: its scheduler's noise does not fall from 1 to 0 in {steps} steps, but is {sigmas.tolist()}"
        )
    return sigmas


def calculate_shift(scheduler: Any, tokens: int) -> float:
    """How far FLUX's kin shift the schedule of an image of so many latent tokens."""
    known = scheduler.config
    few, many = known.get("base_image_seq_len", 256), known.get("max_image_seq_len", 4096)
    low, high = known.get("base_shift", 0.5), known.get("max_shift", 1.15)
    return low + (tokens - few) * (high - low) / (many - few)
