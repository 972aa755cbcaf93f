"""The embedded pipeline as it is shipped."""

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.models import AutoencoderKL

from aegpo import world
from aegpo.world import pretrain, scenes


def test_it_is_small_half_precision_and_safetensors_only():
    files = [file for file in world.path().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 16 * 2**20
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    pipe = StableDiffusion3Pipeline.from_pretrained(world.path(), text_encoder_3=None, tokenizer_3=None)
    assert {type(part).__name__ for part in (pipe.transformer, pipe.vae, pipe.scheduler, pipe.text_encoder)} == {
        "SD3Transformer2DModel",
        "AutoencoderKL",
        "FlowMatchEulerDiscreteScheduler",
        "CLIPTextModelWithProjection",
    }


def test_every_word_is_one_token_and_every_prompt_fits():
    pipe = StableDiffusion3Pipeline.from_pretrained(world.path(), text_encoder_3=None, tokenizer_3=None)
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        assert [word for word in scenes.words() if len(tokenizer.tokenize(word)) != 1] == []
        ids = [tokenizer(word).input_ids[1] for word in scenes.words()]
        assert len(set(ids)) == len(ids)
        assert tokenizer.model_max_length == world.MAX_WORDS + 2
    for row in world.training() + world.held_out():
        assert len(row["prompt"].split()) <= world.MAX_WORDS
        assert world.unknown_words(row["prompt"]) == []


def test_the_vae_keeps_what_the_verifier_sees():
    vae = AutoencoderKL.from_pretrained(world.path(), subfolder="vae").float()
    rng = np.random.default_rng(0)
    requests = [scenes.random_request(rng) for _ in range(200)]
    pictures = np.stack([scenes.draw(scenes.arrange(request, rng)) for request in requests])
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(x).latent_dist.mean
        y = vae.decode(latents).sample
    decoded = ((y.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    rows = [{"objects": request.objects, "relation": request.relation} for request in requests]
    assert world.verify(decoded, None, rows)[1].mean() >= 0.97
    normalised = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert abs(normalised.mean()) < 0.1
    assert abs(normalised.std() - 1) < 0.1


def test_the_base_is_half_good_and_tasks_differ():
    pipe = StableDiffusion3Pipeline.from_pretrained(world.path(), text_encoder_3=None, tokenizer_3=None)
    rates = pretrain.pass_rates(pipe.to(torch.float32), images=2)
    assert 0.30 <= rates["pass"] <= 0.60
    assert rates["one_object"] > 0.6
    assert rates["color_attribution"] < 0.3


def test_pretraining_learns_and_writes_a_pipeline_that_diffusers_loads(tmp_path, capsys):
    """A few steps of the real thing: the errors fall, and the folder loads."""
    pretrain.pretrain(tmp_path / "out", steps=2, vae_steps=25, scene_count=128, seed=0)
    printed = capsys.readouterr().out
    assert "step 2:" in printed
    error = float(printed.split("error ")[1].split()[0])
    assert error < 0.5  # it begins at 1.2
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "out", text_encoder_3=None, tokenizer_3=None)
    assert pipe.transformer.dtype == torch.float32  # diffusers' default; the file itself is half precision
    assert (tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size < 8 * 2**20


def test_the_flow_learns_the_velocity(tmp_path):
    """On one latent seen again and again, the error on it falls well below the target's own variance."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    pipe = pretrain.build_pipeline(tmp_path)
    requests = [scenes.Request((("ring", None),))] * 4
    latents = torch.randn(1, 4, 8, 8).repeat(4, 1, 1, 1)

    def error():
        embeds, _, pooled, _ = pipe.encode_prompt(
            ["a ring"] * 4, None, None, do_classifier_free_guidance=False, max_sequence_length=0
        )
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            velocity = pipe.transformer(
                hidden_states=torch.lerp(latents, noise, 0.5),
                timestep=torch.full((4,), 500.0),
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
            ).sample
        return (velocity - (noise - latents)).square().mean().item()

    before = error()
    for _ in pretrain.train_flow(pipe, requests, latents, 60, set(), rng, batch=4):
        pass
    after = error()
    assert before > 1.5
    assert after < 0.75 * before
