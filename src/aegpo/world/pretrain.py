"""Makes the embedded pipeline from nothing: tokenizer, VAE, text encoders and the SD3 transformer.

    aegpo world pretrain OUT

The base is meant to be *half good*: it draws every shape and colour, but binds, counts and places them only
sometimes, so that reinforcement learning has something to teach. The number of steps decides how good it is.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from aegpo.world import held_out, scenes, verifier

TEXT_TOKENS = 20
LATENT_CHANNELS = 4


def pretrain(output: Path, steps: int = 5000, vae_steps: int = 1500, scene_count: int = 100_000, seed: int = 0) -> None:
    """Train the embedded model and save it as a diffusers pipeline folder in half precision.

    Args:
        output: the folder to write; a snapshot stands in `step-NNNNN` beside the final pipeline every 1,000 steps.
        steps: updates of the transformer and the text encoders, batch 128.
        vae_steps: updates of the VAE, batch 32.
        scene_count: how many scenes are drawn and encoded once as the training set.
        seed: of everything random.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    pipe = build_pipeline(output)
    held = {row["prompt"] for row in held_out()}

    train_vae(pipe.vae, vae_steps, rng)
    requests, latents = encode_scenes(pipe.vae, scene_count, rng)
    for step, average in train_flow(pipe, requests, latents, steps, held, rng):
        folder = output if step == steps else output / f"step-{step:05d}"
        snapshot = _with_weights(pipe, average).to(torch.float16)
        snapshot.save_pretrained(folder, safe_serialization=True)
        build_tokenizer(folder)
        print(f"step {step}: {json.dumps(pass_rates(snapshot.to(torch.float32)))}", flush=True)


def build_pipeline(folder: Path) -> Any:
    """An untrained Stable Diffusion 3 pipeline of the world's size: 32 x 32 pixels, 16 image and 20 text tokens."""
    tokenizer: Any = build_tokenizer(folder)
    pipeline: Any = StableDiffusion3Pipeline
    autoencoder: Any = AutoencoderKL
    encoder = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=TEXT_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=6,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=128,
            caption_projection_dim=128,
            pooled_projection_dim=128,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(16, 32, 48),
            layers_per_block=1,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=8,
            sample_size=scenes.SIZE,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=False,
        ),
        text_encoder=CLIPTextModelWithProjection(encoder),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(encoder),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer in which every word of the world is one token: byte-pair merges are learned on the words.

    Its `vocab.json` and `merges.txt` are written into the pipeline's folder, for both text encoders.
    """
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in sorted(scenes.words())]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *sorted({piece for word in spelled for piece in word})]
    merges = []
    while counts := Counter(pair for word in spelled for pair in pairwise(word)):
        best = max(counts, key=lambda pair: (counts[pair], pair))
        spelled = [_merge(word, best) for word in spelled]
        merges.append(best)
        vocabulary.append("".join(best))
    for part in ("tokenizer", "tokenizer_2"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(vocabulary)}))
        (folder / part / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=TEXT_TOKENS)


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    """The word's pieces with every occurrence of the pair joined, left to right."""
    joined: list[str] = []
    for piece in word:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def _random_scenes(count: int, rng: np.random.Generator) -> tuple[list[scenes.Request], Tensor]:
    """Requests and their pictures, float32 (count, 3, 32, 32) in [-1, 1]."""
    requests = [scenes.random_request(rng) for _ in range(count)]
    pictures = np.stack([scenes.draw(scenes.arrange(request, rng)) for request in requests])
    return requests, torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(vae: Any, steps: int, rng: np.random.Generator) -> None:
    """Fit the VAE to random scenes (absolute error plus a small KL) and set its latent shift and scale."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    for step in range(1, steps + 1):
        _, pictures = _random_scenes(32, rng)
        posterior = vae.encode(pictures).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        error = (decoded - pictures).abs().mean() + (decoded - pictures).square().mean()
        loss = error + 1e-3 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            print(f"vae {step}/{steps}: error {error.item():.4f}", flush=True)
    vae.requires_grad_(False).eval()
    with torch.no_grad():
        latents = vae.encode(_random_scenes(2048, rng)[1]).latent_dist.mean
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


@torch.no_grad()
def encode_scenes(vae: Any, count: int, rng: np.random.Generator) -> tuple[list[scenes.Request], Tensor]:
    """Draw `count` scenes and encode them; the normalised latents are float32 (count, 4, 8, 8)."""
    requests: list[scenes.Request] = []
    latents = []
    while len(requests) < count:
        more, pictures = _random_scenes(min(500, count - len(requests)), rng)
        requests += more
        latents.append((vae.encode(pictures).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor)
    return requests, torch.cat(latents)


def train_flow(
    pipe: Any,
    requests: list[scenes.Request],
    latents: Tensor,
    steps: int,
    held: set[str],
    rng: np.random.Generator,
    batch: int = 128,
) -> Iterator[tuple[int, AveragedModel]]:
    """Rectified-flow training of transformer and text encoders; yields (step, EMA) every 1,000 steps and at the end.

    Velocity target `noise - x0`, logit-normal times (arXiv 2403.03206), a tenth of the captions dropped. Prompts of the
    held-out set are never shown.
    """
    modules = nn.ModuleList([pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]).train()
    average = AveragedModel(modules, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    optimizer = torch.optim.AdamW(modules.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1.0, total_iters=300)
    start = time.monotonic()
    losses: list[float] = []
    for step in range(1, steps + 1):
        index = rng.integers(len(requests), size=batch)
        prompts = [_caption(requests[i], held, rng) for i in index]
        x0 = latents[index]
        noise = torch.randn_like(x0)
        sigma = torch.sigmoid(torch.randn(batch))
        sigma = pipe.scheduler.config.shift * sigma / (1 + (pipe.scheduler.config.shift - 1) * sigma)
        x = torch.lerp(x0, noise, sigma[:, None, None, None])
        embeds, _, pooled, _ = pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=0, device=torch.device("cpu")
        )
        velocity = pipe.transformer(
            hidden_states=x, timestep=1000 * sigma, encoder_hidden_states=embeds, pooled_projections=pooled
        ).sample
        loss = (velocity - (noise - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(modules)
        losses.append(loss.item())
        if step % 100 == 0 or step == steps:
            pace = (time.monotonic() - start) / step
            print(f"flow {step}/{steps}: loss {np.mean(losses):.4f}, {pace:.3f} s a step", flush=True)
            losses.clear()
        if step % 1000 == 0 or step == steps:
            yield step, average


def _caption(request: scenes.Request, held: set[str], rng: np.random.Generator) -> str:
    if rng.random() < 0.1:
        return ""
    while (prompt := scenes.write(request, rng)) in held:
        pass
    return prompt


def _with_weights(pipe: Any, average: AveragedModel) -> Any:
    """A copy of the pipeline that carries the averaged weights."""
    copy = build_pipeline(Path(pipe.tokenizer.name_or_path).parent)
    copy.vae.load_state_dict(pipe.vae.state_dict())
    copy.vae.register_to_config(
        shift_factor=pipe.vae.config.shift_factor, scaling_factor=pipe.vae.config.scaling_factor
    )
    nn.ModuleList([copy.transformer, copy.text_encoder, copy.text_encoder_2]).load_state_dict(
        average.module.state_dict()
    )
    return copy


def pass_rates(pipe: Any, steps: int = 10, images: int = 2) -> dict[str, float]:
    """Graded score and strict pass rate of a pipeline on the held-out prompts, in all and by task."""
    pipe.set_progress_bar_config(disable=True)
    rows = held_out() * images
    drawn = pipe(
        [row["prompt"] for row in rows],
        num_inference_steps=steps,
        guidance_scale=1.0,
        max_sequence_length=0,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images
    score, passed = verifier.verify(np.rint(drawn * 255).astype(np.uint8), None, rows)
    rates = {"score": score.mean(), "pass": passed.mean()}
    for task in scenes.TASKS:
        rates[task] = passed[[row["task"] == task for row in rows]].mean()
    return {name: round(float(rate), 3) for name, rate in rates.items()}
