"""Every family against diffusers' own call, on small pipelines of the real classes that are saved and loaded."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from PIL import Image

from aegpo import build, checkpoint, models, rewards, use
from aegpo.config import Model, Sampler, resolve
from aegpo.math.schedules import shifted_linear
from aegpo.models.base import height_and_width
from aegpo.models.flux import Flux
from aegpo.models.probe import AttentionProbe, _attention_layers
from aegpo.objective import objective, predict_again
from aegpo.report import read_metrics
from aegpo.rollout import _first_latents, collect, denoise, draw
from aegpo.types import Plan, Prompt
from tests.models.pipelines import PIPELINES
from tests.models.pipelines import build as build_pipeline

PROMPTS = ["a red circle", "two blue squares above a ring"]
EULER = (
    "ignore:__array__ implementation:DeprecationWarning"  # NumPy 2 of torch, in EulerDiscreteScheduler.set_timesteps
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Where each family's pipeline is saved."""
    root = tmp_path_factory.mktemp("pipelines")
    return {name: str(build_pipeline(name, root / name)) for name in PIPELINES}


def settings(folders, name, **more):
    return Model(path=folders[name], resolution=16, frames=5 if name == "wan" else 0, dtype="float32", **more)


def plain(folder, name, **parts):
    """The pipeline as a user loads it, with the scheduler that the model card names."""
    pipe = DiffusionPipeline.from_pretrained(folder, **parts)
    pipe.set_progress_bar_config(disable=True)
    if name in ("sd15", "sd21-v", "sdxl"):
        pipe.scheduler = DDIMScheduler.from_config(
            pipe.scheduler.config, timestep_spacing="leading", set_alpha_to_one=True, clip_sample=False
        )
    if name == "wan":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return pipe


def called(pipe, name, noise, guidance, steps=4, prompts=PROMPTS):
    """Pixels of the pipeline's own call, (B, [frames,] height, width, 3) from 0 to 1."""
    how = {"num_inference_steps": steps, "height": 16, "width": 16, "output_type": "np"}
    if name in ("flux-schnell", "qwen-image"):
        how |= {"true_cfg_scale": guidance, "negative_prompt": [""] * len(prompts)}
    else:
        how["guidance_scale"] = guidance
    if name == "sd3":
        how["max_sequence_length"] = 256
    if name == "wan":
        how["num_frames"] = 5
    if name == "flux2-klein":  # which packs what it is given
        noise = noise.transpose(1, 2).unflatten(2, (4, 4))
    drawn = pipe(prompt=list(prompts), latents=noise, **how)
    return drawn["frames"] if "frames" in drawn else drawn["images"]


def noise_like(model, count):
    return torch.randn(count, *model.latent_shape, generator=torch.Generator().manual_seed(0))


def ours(model, noise, guidance, steps=4, prompts=PROMPTS):
    """Clean latents by ODE from standard normal noise."""
    first = model.sigmas(steps)[0]
    x = noise * torch.hypot(first, 1 - first).float()
    sampler = Sampler(steps=steps, guidance=guidance)
    return denoise(model, x, model.encode(prompts), torch.arange(len(prompts)), sampler).latents[:, -1]


@pytest.mark.filterwarnings(EULER)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", PIPELINES)
def test_noiseless_sampling_is_the_pipelines_own_call(name, guidance, folders):
    model = models.load(settings(folders, name))
    noise = noise_like(model, 2)
    with torch.no_grad():
        pixels = model.family.decode(ours(model, noise, guidance)) / 2 + 0.5
    theirs = torch.from_numpy(called(plain(folders[name], name), name, noise, guidance)).movedim(-1, 1)
    assert theirs.std() > 0.02
    assert (pixels.clamp(0, 1) - theirs).abs().max() < 1e-4
    said = plain(folders[name], name)  # as `aegpo sample` and the model card call it
    given = noise.transpose(1, 2).unflatten(2, (4, 4)) if name == "flux2-klein" else noise
    many = {"negative_prompt": [""] * 2} if "negative_prompt" in model.family.call(guidance) else {}
    how = {"num_inference_steps": 4, "output_type": "np"} | model.family.call(guidance) | many
    drawn = said(prompt=PROMPTS, latents=given, **how)
    again = torch.from_numpy(drawn["frames"] if "frames" in drawn else drawn["images"]).movedim(-1, 1)
    assert (again - theirs).abs().max() < 1e-6
    if guidance > 1:
        with torch.no_grad():
            other = model.family.decode(ours(model, noise, 1.0)) / 2 + 0.5
        assert (other.clamp(0, 1) - theirs).abs().max() > 1e-2  # guidance does something
    before = model.forwards
    ours(model, noise, guidance)
    assert model.forwards - before == 2 * 4 * (1 + model.doubles(guidance))
    assert model.doubles(guidance) == (guidance > 1 and name != "flux")


REWARD = """
def score(images, prompts):
    return images[..., 0].reshape(len(images), -1).mean(1) / 255
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A prompt file and a reward of a user's own."""
    root = tmp_path_factory.mktemp("task")
    (root / "reward.py").write_text(REWARD)
    (root / "prompts.txt").write_text("\n".join([*PROMPTS, "a green cross", "a ring"]))
    return root


def trained(name, train, folders, task, run):
    """Two AEGPO steps, with noise and a trunk, under guidance, of changed weights."""
    config = resolve(
        {
            "algorithm": "aegpo-paper",
            "model": {
                "path": folders[name],
                "resolution": 16,
                "frames": 5 if name == "wan" else 0,
                "train": train,
                "dtype": "float32",
                "lora": {"rank": 4, "alpha": 8},
            },
            "prompts": {"train": str(task / "prompts.txt"), "eval": str(task / "prompts.txt")},
            "reward": f"{task / 'reward.py'}:score",
            "sampler": {
                "steps": 4,
                "guidance": 2.0,
                "kind": "ddim" if name.startswith("sd") and name != "sd3" else "cps",
            },
            "exploration": {"k": 2},
            "allocation": {"low": 2, "high": 4},
            "steps": 2,
            "prompts_per_step": 2,
            "rollouts_per_step": 6,
            "eval_images": 1,
            "optimizer": {"lr": 0.02 if train == "lora" else 0.002},
            "output_dir": str(run),
        }
    )
    (build.run if name == "wan" else build.fit)(config)  # a page and a card of videos, too
    return config


@pytest.mark.filterwarnings(EULER)
@pytest.mark.parametrize(
    ("name", "train"),
    [*((name, "lora") for name in PIPELINES), *((n, "full") for n in PIPELINES if n not in ("flux-schnell", "sd21-v"))],
)
def test_trained_weights_draw_the_same_image_in_a_plain_diffusers_pipeline(name, train, folders, task, tmp_path):
    config = trained(name, train, folders, task, tmp_path / "run")
    rows = read_metrics(tmp_path / "run")
    assert [row["rows"] > 0 for row in rows[1:]] == [True, True]
    assert all(row["delta_entropy/mean"] == 0 for row in rows[1:2]) and rows[2]["delta_entropy/mean"] > 0
    assert max(row["ratio/first_error"] for row in rows[1:]) < 1e-5

    model = models.load(config.model, config.seed)
    base = model.family.decode(ours(model, noise_like(model, 2), 2.0))
    checkpoint.load_weights(tmp_path / "run" / "checkpoint-2", model.trainable)
    policy = model.family.decode(ours(model, noise_like(model, 2), 2.0))
    assert (policy - base).abs().max() > 1e-2
    if train == "lora":
        pipe = plain(folders[name], name)
        pipe.load_lora_weights(str(tmp_path / "run"))
        assert pipe.get_active_adapters() == ["default_0"]
    else:  # a pipeline by itself, with the scheduler that draws so
        pipe = DiffusionPipeline.from_pretrained(tmp_path / "run")
        pipe.set_progress_bar_config(disable=True)
    theirs = torch.from_numpy(called(pipe, name, noise_like(model, 2), 2.0)).movedim(-1, 1)
    assert ((policy / 2 + 0.5).clamp(0, 1) - theirs).abs().max() < 2e-4

    use.sample(tmp_path / "run", PROMPTS[0], tmp_path / "x.png", seed=7)
    with Image.open(tmp_path / "x.png") as image:
        assert getattr(image, "n_frames", 1) == (5 if name == "wan" else 1)
        assert np.asarray(image.convert("RGB")).std() > 1


@pytest.mark.parametrize("name", PIPELINES)
def test_the_probe_sees_every_attention_layer(name, folders):
    model = models.load(settings(folders, name))
    conditions, x = model.encode(PROMPTS), noise_like(model, 2)
    with AttentionProbe(model.network, queries="all", rows=4096) as probe:
        v = model.predict(x, torch.tensor(0.7), conditions, torch.arange(2), 1.0)
    entropy = probe.entropy()
    assert {layer.name for layer in probe.layers} == set(_attention_layers(model.network))
    assert entropy.shape == (len(_attention_layers(model.network)), 2) and (entropy > 0).all()
    assert torch.equal(v, model.predict(x, torch.tensor(0.7), conditions, torch.arange(2), 1.0))


@pytest.mark.parametrize("name", PIPELINES)
def test_no_prompt_is_encoded_twice_and_none_depends_on_its_neighbours(name, folders):
    model = models.load(settings(folders, name))
    calls = []
    encode = model.family.encode
    model.family.encode = lambda prompt: calls.append(prompt) or encode(prompt)
    together = model.encode([PROMPTS[1], PROMPTS[0], PROMPTS[1]])
    assert calls == ["", PROMPTS[1], PROMPTS[0]]
    alone = model.encode(PROMPTS[:1])
    model.prepare([*PROMPTS, ""])
    assert len(calls) == 3
    tokens = alone.rows["embeds"].shape[1]
    assert torch.equal(together.rows["embeds"][1, :tokens], alone.rows["embeds"][0])
    assert torch.equal(together.rows["embeds"][0], together.rows["embeds"][2])
    assert (together.rows["embeds"][0] - together.rows["embeds"][1]).abs().max() > 1e-2

    x, sigma = noise_like(model, 1), torch.tensor(0.6)
    with torch.no_grad():  # what pads a prompt beside a longer one changes nothing
        padded = model.predict(x, sigma, together, torch.tensor([1]), 2.0)
        bare = model.predict(x, sigma, alone, torch.tensor([0]), 2.0)
    torch.testing.assert_close(padded, bare, atol=2e-5, rtol=1e-4)


def test_a_run_encodes_each_of_its_prompts_once(folders, task, tmp_path, monkeypatch):
    """Over two steps, three evaluations, the probe and the base's probe."""
    calls, encode = [], Flux.encode
    monkeypatch.setattr(Flux, "encode", lambda self, prompt: calls.append(prompt) or encode(self, prompt))
    trained("flux", "lora", folders, task, tmp_path / "run")
    assert sorted(calls) == sorted(["", *PROMPTS, "a green cross", "a ring"])


@pytest.mark.parametrize("name", ["sd15", "sd21-v", "sdxl"])
def test_a_u_nets_velocity_is_that_of_its_own_prediction(name, folders):
    """x0 and e by diffusers' DDIM formulas, in its own coordinates, at every tenth timestep."""
    model = models.load(settings(folders, name))
    pipe, conditions = model.pipe, model.encode(PROMPTS[:1])
    alphas = pipe.scheduler.alphas_cumprod.double()
    assert pipe.scheduler.config.prediction_type == ("v_prediction" if name == "sd21-v" else "epsilon")
    for t in range(0, 1000, 100):
        a = alphas[t]
        sigma = (1 - a).sqrt() / (a.sqrt() + (1 - a).sqrt())
        x = noise_like(model, 1)
        latent = x * (a.sqrt() + (1 - a).sqrt()).float()
        given = {"encoder_hidden_states": conditions.rows["embeds"]}
        if name == "sdxl":
            sizes = torch.tensor([[16.0, 16, 0, 0, 16, 16]])
            given["added_cond_kwargs"] = {"text_embeds": conditions.rows["pooled"], "time_ids": sizes}
        with torch.no_grad():
            v = model.predict(x, sigma, conditions, torch.tensor([0]), 1.0)
            predicted = pipe.unet(latent, t, **given).sample
        step = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True)
        step.set_timesteps(1000)
        step.final_alpha_cumprod = torch.tensor(1.0)
        x0 = step.step(predicted, t, latent).pred_original_sample
        e = (latent - a.sqrt().float() * x0) / (1 - a).sqrt().float()
        torch.testing.assert_close(v, e - x0, atol=1e-3, rtol=1e-3)


def test_the_first_latents_of_a_u_net_are_pure_noise(folders):
    model = models.load(settings(folders, "sd15"))
    sigmas = model.sigmas(10)
    alpha = model.pipe.scheduler.alphas_cumprod[901].double()
    assert sigmas[0] == pytest.approx(((1 - alpha).sqrt() / (alpha.sqrt() + (1 - alpha).sqrt())).item(), abs=1e-7)
    first = _first_latents(model, [(1, 2)], sigmas) * (alpha.sqrt() + (1 - alpha).sqrt())
    whole = _first_latents(model, [(1, 2)], torch.ones(1))
    torch.testing.assert_close(first.float(), whole, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        ("flux", {"resolution": 15}, "model.resolution: 15 is not a multiple of 4 pixels; 16 is near it"),
        ("sd15", {"resolution": [16, 18]}, "model.resolution: 18 is not a multiple of 4 pixels"),
        ("wan", {"resolution": 16, "frames": 4}, "model.frames: 4 is not one more than a multiple of 2; 5 is near it"),
        ("flux", {"family": "sd3"}, "is of flux, not sd3; set that, or auto"),
        ("sd3", {"resolution": 4096}, "is above"),
        ("flux", {"text_tokens": 9999}, "model.text_tokens: 9999 is above 512, the most that this pipeline takes"),
        ("flux", {"frames": 5}, "draws images, not videos; leave it 0"),
        ("flux", {"lora": {"targets": ["to_z"]}}, "model.lora.targets: no linear layer is named 'to_z'"),
    ],
)
def test_what_a_pipeline_cannot_do_is_said_in_a_line(name, changed, said, folders):
    with pytest.raises(ValueError, match=re.escape(said)):
        models.load(resolve({"model": {"path": folders[name]} | changed}).model)


@pytest.mark.parametrize("name", ["flux", "sdxl", "qwen-image"])
def test_an_image_need_not_be_square(name, folders):
    model = models.load(Model(path=folders[name], resolution=(16, 24), dtype="float32"))
    noise = noise_like(model, 1)
    pixels = model.decode(ours(model, noise, 1.0, prompts=PROMPTS[:1]))
    assert pixels.shape == (1, 16, 24, 3)
    pipe = plain(folders[name], name)
    guidance = {"true_cfg_scale" if name == "qwen-image" else "guidance_scale": 1.0}
    theirs = pipe(
        prompt=PROMPTS[:1], latents=noise, num_inference_steps=4, height=16, width=24, output_type="np", **guidance
    ).images
    assert np.abs(pixels - theirs * 255).max() <= 0.51


def test_the_size_of_an_image():
    assert height_and_width(Model(), (32, 48), 16) == (32, 48)
    assert height_and_width(Model(resolution=64), (32, 48), 16) == (64, 64)
    assert height_and_width(Model(resolution=(16, 48)), (32, 48), 16) == (16, 48)


def test_a_video_is_judged_kept_and_read_back(folders, task, tmp_path):
    config = trained("wan", "lora", folders, task, tmp_path / "run")
    use.evaluate_by_all(tmp_path / "run", [config.reward])
    said = json.loads((tmp_path / "run" / "eval" / "eval.json").read_text())["rewards"][config.reward]
    kept = sorted((tmp_path / "run" / "eval" / "images" / "run").glob("*.png"))
    videos = []
    for file in kept:
        with Image.open(file) as image:
            frames = [image.seek(i) or np.asarray(image.convert("RGB")) for i in range(image.n_frames)]
        videos.append(np.stack(frames))
    assert np.stack(videos).shape == (4, 5, 16, 16, 3)
    again = rewards.load(config.reward).judge(np.stack(videos), PROMPTS * 2, [{}] * 4).score
    assert again.tolist() == pytest.approx(np.concatenate(said["run"]["scores"]).tolist(), rel=1e-6)
    with pytest.raises(ValueError, match=r"x\.jpg is a video's, which is written as \.gif, \.webp, \.png"):
        use.sample(tmp_path / "run", PROMPTS[0], tmp_path / "x.jpg")
    with Image.open(tmp_path / "run" / "samples" / "step-000002.png") as grid:
        assert grid.width > 3 * 16


def test_a_klein_that_was_distilled_takes_no_guidance(tmp_path, folders):
    pipe = DiffusionPipeline.from_pretrained(folders["flux2-klein"])
    pipe.register_to_config(is_distilled=True)
    pipe.save_pretrained(tmp_path)
    model = models.load(Model(path=str(tmp_path), resolution=16, dtype="float32"))
    assert not model.doubles(4.0)
    with pytest.raises(ValueError, match=r"sampler\.guidance: this FLUX\.2 klein does without by distillation"):
        model.family.call(4.0)
    noise = noise_like(model, 2)
    with torch.no_grad():
        pixels = (model.family.decode(ours(model, noise, 1.0)) / 2 + 0.5).clamp(0, 1)
    theirs = torch.from_numpy(called(plain(str(tmp_path), "flux2-klein"), "flux2-klein", noise, 4.0)).movedim(-1, 1)
    assert (pixels - theirs).abs().max() < 1e-4


def test_rollouts_and_training_go_by_a_shift_as_by_a_scheduler_of_that_schedule(folders):
    """Everything is as if the pipeline's own schedule were the shifted one; but evaluations keep to its own."""
    prompts = [Prompt(i, text, {}) for i, text in enumerate(PROMPTS)]
    plan = Plan(
        torch.tensor([2, 3]), torch.tensor([[True, True, True, False]] * 2), torch.ones(2, 4, dtype=torch.float64)
    )

    def found(model, shift):
        changes = {"sampler": {"steps": 4, "shift": shift, "guidance": 2.0}, "loss": {"kl": 0.3}}
        config = resolve({"algorithm": "flow-grpo"}, changes)
        conditions = model.encode(PROMPTS)
        drawn = collect(model, prompts, conditions, plan, config, 0)
        rows = replace(drawn.transitions, advantage=torch.linspace(-1, 1, len(drawn.transitions)))
        loss = objective(config, model, rows, conditions)
        rows.velocity.zero_()
        predict_again(config, model, rows, conditions, [torch.arange(len(rows))])
        x = noise_like(model, 2)
        walked = denoise(model, x, conditions, torch.arange(2), config.sampler).latents[:, -1]
        return drawn.transitions.x_next, loss.rows.detach(), rows.velocity, walked, draw(model, prompts, config)

    model = models.load(settings(folders, "sd3"))
    with torch.no_grad():
        for i, parameter in enumerate(model.trainable.values()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    shifted, plain_ones = found(model, 2.0), found(model, None)
    own = model.family.sigmas
    model.family.sigmas = lambda steps: shifted_linear(steps, 2.0)
    model._sigmas.clear()
    for one, other, unlike in zip(shifted[:4], found(model, None)[:4], plain_ones[:4], strict=True):
        assert torch.equal(one, other) and not torch.equal(one, unlike)
    model.family.sigmas = own
    assert (shifted[4] == plain_ones[4]).all()


def test_a_shift_is_refused_where_no_latent_is_pure_noise(folders):
    with pytest.raises(
        ValueError, match=r"sampler\.shift: a shifted grid begins with pure noise, but this model knows"
    ):
        models.load(settings(folders, "sd15")).sigmas(4, 3.0)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "has no folder tokenizer, which its model_index.json"),
        (lambda folder: (folder / "vae" / "config.json").write_text("{"), r"cannot be loaded \(\w+: .*"),
        (lambda folder: (folder / "transformer" / "config.json").unlink(), r"cannot be loaded \(\w+: .*"),
    ],
)
def test_a_pipeline_that_is_not_whole_is_said_in_a_line(spoil, said, tmp_path):
    spoil(build_pipeline("flux", tmp_path / "flux") and tmp_path / "flux")
    with pytest.raises(ValueError, match=rf"model\.path: .*flux {said}") as error:
        models.load(Model(path=str(tmp_path / "flux"), resolution=16))
    assert len(str(error.value).splitlines()) == 1


def test_a_u_net_that_is_told_the_guidance_is_refused(tmp_path):
    build_pipeline("sd15", tmp_path / "lcm")
    distilled = UNet2DConditionModel.from_config(
        UNet2DConditionModel.load_config(tmp_path / "lcm" / "unet"), time_cond_proj_dim=8
    )
    distilled.save_pretrained(tmp_path / "lcm" / "unet")
    with pytest.raises(ValueError, match=r"model\.path: its U-Net is told the guidance, as a distilled one \(LCM\) is"):
        models.load(Model(path=str(tmp_path / "lcm")))
