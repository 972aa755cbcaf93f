"""A training step of Stable Diffusion 3.5 medium at its true size: seconds, peak memory, and share of the GPU's peak.

python benchmarks/gpu.py [--json FILE] [--size medium|toy] [--prompts N] [--pairs N] [--only NAME ...]

The network and the VAE have the real architecture and random weights, the text embeddings are random: what a step costs
does not depend on them. A step draws groups of 24 at 512 pixels under guidance and trains a LoRA in bf16: `flow-grpo`
at nine of ten steps with a pull to the base, `aegpo` at four. Beside it the rollouts and rows of `flow-grpo` go through
`reference_loop.py`, a plain diffusers loop over timesteps under autocast, with peft's own LoRA layers.

MFU is the operations that the training phase cannot do without (of each trained row a forward and the way back to the
adapter, and where there is a pull a forward of the base), as torch counts them in one such pass, over its seconds and
the GPU's dense bf16 peak. What is computed twice, such as ratios that are taken anew, does not count.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import reference_loop
import torch
from demo import git
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from overhead import Silent, synchronize
from peft.tuners.lora import LoraLayer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from aegpo.adapt.memory import Memory
from aegpo.adapt.plan import make_plan
from aegpo.config import Config, needs_probe, needs_reference, needs_spread, resolve
from aegpo.models import memory
from aegpo.models.base import Denoiser
from aegpo.models.sd3 import SD3
from aegpo.rewards import Reward
from aegpo.rewards.panel import alone
from aegpo.rollout import ROLLOUT, collect, noise
from aegpo.signals import probe, reward_spread
from aegpo.train import credit, update
from aegpo.types import Judgement, Prompt

PEAK = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}  # dense bf16 operations a second, by the maker
NETWORKS: dict[str, dict[str, Any]] = {
    "medium": {  # transformer/config.json of stabilityai/stable-diffusion-3.5-medium
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    },
    "toy": {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 8,
        "pos_embed_max_size": 8,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    },
}
SIZES: dict[str, dict[str, Any]] = {
    "medium": {"resolution": 512, "text_tokens": 256, "group": 24, "channels": (128, 256, 512, 512), "micro_batch": 8},
    "toy": {"resolution": 64, "text_tokens": 4, "group": 4, "channels": (8, 8, 8, 8), "micro_batch": 4},
}
ARMS: dict[str, dict[str, Any]] = {
    "flow-grpo": {"algorithm": "flow-grpo"},
    "flow-grpo, compiled": {"algorithm": "flow-grpo", "model": {"compile": True}},
    "aegpo, compiled": {"algorithm": "aegpo", "model": {"compile": True}},
}
PLAIN = "plain loop"


def denoiser(size: str, config: Config) -> Denoiser:
    """The model of a size with random weights, on the device, and random embeddings in the place of text encoders."""
    network, about = NETWORKS[size], SIZES[size]
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if config.model.dtype == "bfloat16" else torch.float32
    torch.manual_seed(0)
    make_pipeline: Any = StableDiffusion3Pipeline
    with torch.device("cuda" if gpu else "cpu"):
        transformer: Any = SD3Transformer2DModel(**network)
        make_vae: Any = AutoencoderKL
        vae = make_vae(
            block_out_channels=about["channels"],
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2 if size == "medium" else 1,
            latent_channels=16,
            norm_num_groups=32 if size == "medium" else 4,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    clip = CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = make_pipeline(transformer.to(dtype), scheduler, vae.to(dtype), clip, *[None] * 5)
    pipe.set_progress_bar_config(disable=True)
    family = SD3(pipe, config.model)
    tokens = family.text_shapes["embeds"][0]

    def encode(prompt: str) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(len(prompt) + 1)
        return {
            "embeds": torch.randn(tokens, network["joint_attention_dim"], generator=generator),
            "pooled": torch.randn(network["pooled_projection_dim"], generator=generator),
        }

    family.encode = encode  # type: ignore[method-assign]
    model = Denoiser(pipe, family, config.model, dtype, 0)
    with torch.no_grad():  # past the point where half of an adapter's gradient is zero
        for i, parameter in enumerate(model.trainable.values()):
            generator = torch.Generator(model.device).manual_seed(i)
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator, device=model.device)
    return model


def brightness(images: np.ndarray, prompts: Any, metadata: Any) -> Judgement:
    """A reward that costs nothing."""
    return Judgement(images.reshape(len(images), -1).mean(1, dtype=np.float64).astype(np.float32))


def peaks() -> float:
    """The GPU's dense bf16 peak in operations a second; NaN for one that is not listed."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((value for key, value in PEAK.items() if key in name), float("nan"))


class Step:
    """A training step of one arm that can be taken again and again."""

    def __init__(self, size: str, arm: str, prompts: int) -> None:
        about = SIZES[size]
        settings = {
            "model": {
                "resolution": about["resolution"],
                "text_tokens": about["text_tokens"],
                "dtype": "bfloat16",
                "lora": {"rank": 32, "alpha": 64},
            },
            "sampler": {"guidance": 4.5},
            "prompts_per_step": prompts,
            "rollouts_per_step": prompts * about["group"],
            "allocation": {"low": about["group"] * 2 // 3, "high": about["group"] * 4 // 3},
            "optimizer": {"micro_batch": about["micro_batch"]},
        }
        self.arm = arm
        self.config: Config = resolve(ARMS["flow-grpo" if arm == PLAIN else arm], settings)
        self.model: Any = denoiser(size, self.config)
        if arm == PLAIN:  # the adapter as peft computes it
            for module in self.model.network.modules():
                if isinstance(module, LoraLayer):
                    vars(module).pop("forward", None)
        self.batch = [Prompt(i, "x" * i, {}) for i in range(1, prompts + 1)]
        self.sigmas = self.model.sigmas(self.config.sampler.steps)
        self.memory, self.optimizer = Memory(), torch.optim.AdamW(self.model.trainable.values(), lr=1e-6)

    def take(self, recompute: bool | None = None) -> dict[str, Any]:
        """Seconds of rollouts and of training, rows, evaluations, the worst ratio of the first update, peak memory."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        taken = self.plain() if self.arm == PLAIN else self.ours(recompute)
        memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else float("nan")
        return taken | {"peak_gib": memory}

    def ours(self, recompute: bool | None) -> dict[str, Any]:
        config, model = self.config, self.model
        config = replace(config, optimizer=replace(config.optimizer, recompute=recompute))
        before, began = model.forwards, time.perf_counter()
        conditions = model.encode([prompt.text for prompt in self.batch])
        signals, trunk = (
            probe(model, self.batch, conditions, config, 0, self.memory) if needs_probe(config) else (None,) * 2
        )
        spread = 0.0
        if needs_spread(config) and self.memory.reward_spread is None:  # once in ten steps of training
            synchronize()
            measured = time.perf_counter()
            self.memory.reward_spread = reward_spread(
                model, self.batch, conditions, alone(Reward("brightness", brightness)), config, 0, 0, trunk
            )
            synchronize()
            spread = time.perf_counter() - measured
        plan = make_plan(config, self.batch, signals, self.memory, self.sigmas, 0)
        drawn = collect(model, self.batch, conditions, plan, config, 0, trunk)
        scores = torch.from_numpy(brightness(drawn.images, None, None).score)
        synchronize()
        drew = time.perf_counter()
        advantage, taught = credit(config, scores, drawn.group, drawn.courses)
        rows = drawn.transitions.judged(advantage, taught)
        sampled = model.forwards - before
        learned = update(config, model, self.optimizer, rows, conditions, 0, Silent(), drawn.kept)
        synchronize()
        return {
            "rollouts": drew - began - spread,
            "update": time.perf_counter() - drew,
            "spread": spread,
            "images": len(scores),
            "rows": learned["rows"],
            "forwards": {"rollouts": sampled, "update": model.forwards - before - sampled},
            "first_error": learned["ratio/first_error"],
        }

    def plain(self) -> dict[str, Any]:
        config, model = self.config, self.model
        how, group = config.sampler, config.rollouts_per_step // config.prompts_per_step
        asked = [prompt for prompt in self.batch for _ in range(group)]
        keys = [(ROLLOUT, 0, 0, prompt.id, i) for prompt in self.batch for i in range(group)]
        began = time.perf_counter()

        @cache
        def drawn_noise(number: int) -> Tensor:
            return torch.stack([noise(model.latent_shape, *key, number, device=model.device) for key in keys])

        def encode(prompts: list[str]) -> tuple[Tensor, Tensor]:
            rows = model.encode(prompts).rows
            return rows["embeds"], rows["pooled"]

        drawn = reference_loop.sample(
            model.pipe,
            encode,
            [prompt.text for prompt in asked],
            drawn_noise(0),
            lambda step: drawn_noise(step + 1),
            self.sigmas,
            how.eta,
            config.optimizer.micro_batch,
            how.guidance,
            half=True,
        )
        scores = torch.from_numpy(brightness(np.concatenate([s.images for s in drawn]), None, None).score)
        synchronize()
        drew = time.perf_counter()
        advantage = reference_loop.advantages(scores, group).to(model.device)
        errors, at = [], 0
        for places in np.array_split(np.arange(len(drawn)), config.optimizer.updates):
            part = [drawn[i] for i in places]
            own = advantage[at : at + sum(len(samples.images) for samples in part)]
            at += len(own)
            self.optimizer.zero_grad()
            ratios = reference_loop.update(
                model.pipe, part, own, self.sigmas, how.eta, 1e-4, config.loss.kl, how.guidance, half=True
            )
            errors.append(torch.stack([(ratio - 1).abs().max() for ratio in ratios]).max())
            nn.utils.clip_grad_norm_(self.model.trainable.values(), 1.0)
            self.optimizer.step()
        synchronize()
        return {
            "rollouts": drew - began,
            "update": time.perf_counter() - drew,
            "spread": 0.0,
            "images": len(scores),
            "rows": len(scores) * (how.steps - 1),
            "forwards": None,
            "first_error": errors[0].item(),
        }

    def operations(self) -> float:
        """What training a row cannot do without, as torch counts it in a pass, through peft's layers, of one row."""
        own = {m: vars(m).pop("forward") for m in self.model.network.modules() if "forward" in vars(m)}
        conditions = self.model.encode([self.batch[0].text])
        x = noise(self.model.latent_shape, 0, device=self.model.device).unsqueeze(0)
        given = (x, torch.tensor(0.7), conditions, torch.tensor([0]), self.config.sampler.guidance)
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counted:
            self.model.predict(*given).sum().backward()
        self.optimizer.zero_grad()
        eager = torch.compiler.set_stance("force_eager")
        with eager, FlopCounterMode(display=False) as forward, torch.no_grad(), self.model.reference():
            self.model.predict(*given)
        for module, forward_of in own.items():
            module.forward = forward_of
        return counted.get_total_flops() + forward.get_total_flops() * needs_reference(self.config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--size", choices=SIZES, default="medium" if torch.cuda.is_available() else "toy")
    parser.add_argument("--prompts", type=int, default=2, help="of a step, 24 images each")
    parser.add_argument("--pairs", type=int, default=2, help="steps that are timed, after one that is not")
    parser.add_argument("--only", nargs="*", default=[*ARMS, PLAIN], help="rows of the table")
    asked = parser.parse_args()
    code = {"commit": git("rev-parse", "HEAD"), "changed": git("status", "--porcelain", ".")}
    rows: dict[str, Any] = {}
    for arm in asked.only:
        rows[arm] = measured(asked.size, arm, asked.prompts, asked.pairs)
        print(arm, json.dumps(rows[arm]), flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if PLAIN in rows:
        for row in rows.values():
            row["times_as_fast"] = rows[PLAIN]["seconds"] / row["seconds"]
            row["update_times_as_fast"] = rows[PLAIN]["update"] / row["update"]
    show(rows)
    if asked.json:
        versions = {name: version(name) for name in ("aegpo", "torch", "diffusers", "peft")}
        gpu = torch.cuda.is_available()
        device = torch.cuda.get_device_name() if gpu else f"cpu, {torch.get_num_threads()} threads"
        settings = {"device": device, "size": asked.size, "prompts": asked.prompts, **SIZES[asked.size]}
        about = code | {"versions": versions, "settings": settings | {"arms": ARMS, "peak": peaks()}}
        asked.json.write_text(json.dumps(about | {"results": rows}, indent=1) + "\n")


def measured(size: str, arm: str, prompts: int, pairs: int) -> dict[str, Any]:
    """An arm's row: medians over steps, after a first that compiles and shows how far ratios are from 1."""
    step = Step(size, arm, prompts)
    operations = step.operations()
    first = step.take(recompute=False)
    taken = [step.take() for _ in range(pairs)]
    row = {key: float(np.median([one[key] for one in taken])) for key in ("rollouts", "update", "peak_gib")}
    trained = operations * taken[0]["rows"]
    return {
        "seconds": row["rollouts"] + row["update"],
        **row,
        "first_step": first["rollouts"] + first["update"],
        "spread": first["spread"],
        "images": taken[0]["images"],
        "rows": taken[0]["rows"],
        "forwards": taken[0]["forwards"],
        "tflop_a_row": operations / 1e12,
        "mfu": trained / row["update"] / peaks(),
        "ratio_error": first["first_error"],
        "ratio_error_recomputed": taken[0]["first_error"],
        "clip": step.config.loss.clip_high,
        "estimated_gib": estimated(step),
    }


def estimated(step: Step) -> float:
    """What `aegpo train --dry-run` says of a step's peak memory, in GiB, from the config files of the same pipeline."""
    with tempfile.TemporaryDirectory() as folder:
        step.model.pipe.save_config(folder)
        for part in ("transformer", "vae", "scheduler", "text_encoder"):
            save = getattr(step.model.pipe, part)
            (save.config.save_pretrained if part == "text_encoder" else save.save_config)(f"{folder}/{part}")
        config = replace(step.config, model=replace(step.config.model, path=folder))
        outline = memory.sizes(config.model)
        assert outline is not None
        return memory.total(memory.estimate(config, outline))[1] / memory.GIB


def show(rows: dict[str, Any]) -> None:
    table = Table(
        "step", "seconds", "rollouts", "training", "MFU", "peak GiB", "estimated", "times as fast", "ratio - 1"
    )
    for name, row in rows.items():
        table.add_row(
            name,
            *(f"{row[key]:.1f}" for key in ("seconds", "rollouts", "update")),
            f"{row['mfu']:.1%}",
            f"{row['peak_gib']:.1f}",
            f"{row['estimated_gib']:.1f}",
            f"{row.get('times_as_fast', float('nan')):.2f}",
            f"{row['ratio_error']:.1e}",
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
