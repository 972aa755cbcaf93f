"""The adapter against diffusers' own pipeline, on the embedded pipeline and on one of random weights saved to disk."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, StableDiffusion3Pipeline

from aegpo import models, world
from aegpo.config import Lora, Model, Sampler
from aegpo.rollout import denoise

PROMPTS = ["a red circle", "two squares", "a cross above a ring"]


@pytest.fixture(scope="module")
def pipe():
    pipe = StableDiffusion3Pipeline.from_pretrained(world.path(), text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(torch.float32)


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("steps", [4, 10])
def test_noiseless_sampling_is_the_pipelines_own_call(pipe, guidance, steps):
    model = models.load(Model())
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(steps=steps, guidance=guidance)
    ours = denoise(model, noise, model.encode(PROMPTS), torch.arange(3), sampler).latents[:, -1]
    theirs = pipe(
        PROMPTS,
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=0,
        latents=noise,
        output_type="latent",
    ).images
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)
    pixels = pipe(
        PROMPTS,
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=0,
        latents=noise,
        output_type="np",
    ).images
    assert np.abs(model.decode(ours).astype(float) - pixels * 255).max() <= 1.1


def test_sigmas_are_the_schedulers(pipe):
    for steps in (1, 2, 10, 28):
        pipe.scheduler.set_timesteps(steps)
        torch.testing.assert_close(models.load(Model()).sigmas(steps).float(), pipe.scheduler.sigmas, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "changed", [{"use_karras_sigmas": True}, {"use_dynamic_shifting": True}, {"shift_terminal": 0.1}], ids=str
)
def test_a_pipeline_with_another_schedule_is_sampled_by_its_own(changed, tmp_path):
    pipe = StableDiffusion3Pipeline.from_pretrained(world.path(), text_encoder_3=None, tokenizer_3=None)
    pipe.to(torch.float32).set_progress_bar_config(disable=True)
    plain = models.load(Model()).sigmas(6)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, **changed)
    pipe.save_pretrained(tmp_path)
    model = models.load(Model(path=str(tmp_path)))
    assert (model.sigmas(6) - plain).abs().max() > 1e-2
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = denoise(model, noise, model.encode(PROMPTS), torch.arange(3), Sampler(steps=6)).latents[:, -1]
    how = {"num_inference_steps": 6, "guidance_scale": 1.0, "max_sequence_length": 0, "output_type": "latent"}
    torch.testing.assert_close(ours, pipe(PROMPTS, latents=noise, **how).images, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        (FlowMatchHeunDiscreteScheduler(), "its scheduler is a FlowMatchHeunDiscreteScheduler"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "noise does not fall from 1 to 0"),
    ],
)
def test_a_scheduler_of_no_flow_is_refused(scheduler, said, tmp_path):
    pipe = StableDiffusion3Pipeline.from_pretrained(world.path(), text_encoder_3=None, tokenizer_3=None)
    pipe.scheduler = scheduler
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=said):
        models.load(Model(path=str(tmp_path))).sigmas(4)


def test_a_shift_of_the_rollouts_own():
    """DanceGRPO's schedule, S_3 of a uniform grid."""
    expected = torch.tensor([1, 0.9, 0.75, 0.5, 0], dtype=torch.float64)
    torch.testing.assert_close(models.load(Model()).sigmas(4, 3.0), expected)


def test_a_pipeline_without_t5_gets_no_t5_tokens_wherever_it_lies(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    here, there = models.load(Model()), models.load(Model(path=str(tmp_path)))
    torch.testing.assert_close(
        there.encode(PROMPTS).rows["embeds"], here.encode(PROMPTS).rows["embeds"], atol=0, rtol=0
    )
    padded = models.load(Model(path=str(tmp_path), text_tokens=3)).encode(PROMPTS).rows["embeds"]
    assert not padded[:, here.encode(PROMPTS).rows["embeds"].shape[1] :].any()
    assert padded.shape[1] == here.encode(PROMPTS).rows["embeds"].shape[1] + 3


def test_rows_of_many_noise_levels_and_prompts_in_one_forward_are_the_single_forwards():
    model = models.load(Model())
    conditions = model.encode(PROMPTS)
    x, sigma, prompt = torch.randn(5, 4, 8, 8), torch.tensor([1.0, 0.9, 0.5, 0.2, 0.9]), torch.tensor([2, 0, 0, 1, 2])
    together = model.predict(x, sigma, conditions, prompt, guidance=3.0)
    for i in range(5):
        alone = model.predict(x[i : i + 1], sigma[i], conditions, prompt[i : i + 1], guidance=3.0)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_guidance_is_linear_in_its_weight():
    model = models.load(Model())
    conditions, x = model.encode(PROMPTS), torch.randn(3, 4, 8, 8)
    at = {w: model.predict(x, torch.tensor(0.7), conditions, torch.arange(3), guidance=w) for w in (0.0, 1.0, 3.0)}
    torch.testing.assert_close(at[3.0], at[0.0] + 3 * (at[1.0] - at[0.0]), atol=1e-4, rtol=1e-4)
    assert (at[1.0] - at[0.0]).abs().max() > 1e-3


@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_reference_stays_the_base_while_the_policy_moves(train):
    model = models.load(Model(train=train))
    conditions, x = model.encode(PROMPTS), torch.randn(3, 4, 8, 8)

    def predict():
        with torch.no_grad():
            return model.predict(x, torch.tensor(0.7), conditions, torch.arange(3), 1.0)

    base = predict()
    with torch.no_grad():
        for i, parameter in enumerate(model.trainable.values()):
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    with model.reference():
        assert torch.equal(predict(), base)
    assert (predict() - base).abs().max() > 1e-3
    with pytest.raises(RuntimeError), model.reference():
        raise RuntimeError
    assert (predict() - base).abs().max() > 1e-3


def test_a_fresh_adapter_changes_nothing_and_its_seed_decides_it(pipe):
    model, same, other = (models.load(Model(), seed) for seed in (0, 0, 1))
    conditions, x = model.encode(PROMPTS), torch.randn(3, 4, 8, 8)
    with torch.no_grad():
        plain = pipe.transformer(
            x, conditions.rows["embeds"], conditions.rows["pooled"], torch.full((3,), 700.0)
        ).sample
        ours = model.predict(x, torch.tensor(0.7), conditions, torch.arange(3), 1.0)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=0)
    names = [name for name in model.trainable if "lora_A" in name]
    assert all(torch.equal(model.trainable[n], same.trainable[n]) for n in names)
    assert not any(torch.equal(model.trainable[n], other.trainable[n]) for n in names)


def test_lora_adapts_the_attention_projections_only():
    names = {n.split(".lora_")[0].split(".", 2)[2] for n in models.load(Model()).trainable}
    assert names == {
        f"attn.{n}"
        for n in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    }
    small = models.load(Model(lora=Lora(rank=2, targets=("ff.net.2",)))).trainable
    assert {p.shape[0] for n, p in small.items() if "lora_A" in n} == {2}
    with pytest.raises(ValueError, match="no linear layer is named 'to_z'"):
        models.load(Model(lora=Lora(targets=("to_z",))))


def test_forwards_count_samples_guidance_and_backwards():
    model = models.load(Model())
    conditions, x = model.encode(PROMPTS), torch.randn(3, 4, 8, 8)
    with torch.no_grad():
        model.predict(x, torch.tensor(0.5), conditions, torch.arange(3), 1.0)
    assert model.forwards == 3
    with torch.no_grad():
        model.predict(x, torch.tensor(0.5), conditions, torch.arange(3), 2.0)
    assert model.forwards == 9
    velocity = model.predict(x, torch.tensor(0.5), conditions, torch.arange(3), 1.0)
    assert model.forwards == 12
    velocity.sum().backward()
    assert model.forwards == 18
    model.predict(x, torch.tensor(0.5), conditions, torch.arange(3), 2.0).sum().backward()
    assert model.forwards == 18 + 3 * 6


@pytest.mark.parametrize("train", ["lora", "full"])
def test_saved_weights_load_in_diffusers_and_predict_the_same(train, tmp_path):
    model = models.load(Model(train=train))
    with torch.no_grad():
        for i, parameter in enumerate(model.trainable.values()):
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    model.save(tmp_path)
    conditions, x = model.encode(PROMPTS), torch.randn(3, 4, 8, 8)
    with torch.no_grad():
        ours = model.predict(x, torch.tensor(0.7), conditions, torch.arange(3), 1.0)
    where = world.path() if train == "lora" else tmp_path
    theirs = StableDiffusion3Pipeline.from_pretrained(where, text_encoder_3=None, tokenizer_3=None).to(torch.float32)
    if train == "lora":
        theirs.load_lora_weights(tmp_path)
        assert theirs.get_active_adapters() == ["default_0"]
    with torch.no_grad():
        loaded = theirs.transformer(
            x, conditions.rows["embeds"], conditions.rows["pooled"], torch.full((3,), 700.0)
        ).sample
    torch.testing.assert_close(ours, loaded, atol=1e-5, rtol=1e-5)


def test_a_folder_that_is_no_pipeline(tmp_path):
    with pytest.raises(ValueError, match="holds no diffusers pipeline"):
        models.load(Model(path=str(tmp_path)))
    with pytest.raises(ValueError, match="neither a folder nor a pipeline that the hub gives us"):
        models.load(Model(path=str(tmp_path / "missing")))
    (tmp_path / "model_index.json").write_text('{"_class_name": "SanaPipeline"}')
    with pytest.raises(ValueError, match="is a SanaPipeline; known are StableDiffusion3Pipeline, FluxPipeline"):
        models.load(Model(path=str(tmp_path)))


def test_a_resolution_that_does_not_fit_the_patches():
    with pytest.raises(ValueError, match="20 is not a multiple of 8 pixels"):
        models.load(Model(resolution=20))
