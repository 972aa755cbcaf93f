"""What the benchmarks' figures rest on: statistics, and the loop that ours is beside."""

import importlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from aegpo import models
from aegpo.cli import main
from aegpo.config import Model, resolve
from aegpo.objective import objective
from aegpo.rollout import ROLLOUT, collect, noise
from aegpo.types import Plan, Prompt


@pytest.fixture(autouse=True)
def in_the_benchmarks_folder(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))


def test_signal_to_noise_of_gradients_that_are_a_mean_and_known_noise():
    """g = m + e with |m|^2 = 9 and tr Cov(e) = 400 x .25 = 100: .09; and the error is how far such findings spread."""
    signal_to_noise = importlib.import_module("signal_to_noise").signal_to_noise
    rng, found = np.random.default_rng(0), []
    for _ in range(200):
        gradients = rng.normal(0, 0.5, (32, 400))
        gradients[:, 0] += 3
        found.append(signal_to_noise(gradients @ gradients.T))
    ratios, errors = np.array(found).T
    assert ratios.mean() == pytest.approx(0.09, abs=3 * ratios.std() / 200**0.5)
    assert ratios.std() / 200**0.5 < 0.002
    assert errors.mean() == pytest.approx(ratios.std(), rel=0.2)
    exact = np.array([[3.0, 1.0, 1.0], [1.0, 5.0, 1.0], [1.0, 1.0, 4.0]])  # |m|^2 = 1, E |g|^2 = 4
    assert signal_to_noise(exact)[0] == pytest.approx(1 / 3)


def test_what_a_run_spends_to_a_target_and_the_median_over_runs_that_may_never_come():
    convergence = importlib.import_module("convergence")
    curve = [{"reward": r, "forwards": f} for r, f in ((0.9, 0), (0.5, 10), (0.7, 20), (0.6, 30), (0.8, 40))]
    assert convergence.to_target({"curve": curve}, 0.7, "forwards") == 20  # the first point is the base's
    assert convergence.to_target({"curve": curve}, 0.75, "forwards") == 40
    assert convergence.to_target({"curve": curve}, 0.85, "forwards") is None
    middle, low, high = convergence.median_of_seeds([30, None, 10, 20, 40])
    assert (middle, low, high) == (30, 10, np.inf)  # three of five are the one that never came in 5.8 % of samples
    assert convergence.median_of_seeds([7, 7, 7]) == (7, 7, 7)
    assert convergence.median_of_seeds([30, 10, None, 20])[0] == 25
    assert convergence.written([30, None, 10, 20, 40]) == "30 (10..never)"
    assert convergence.written([None, None]) == "never"


def test_the_target_is_the_highest_mean_of_flow_grpo_under_either_average():
    convergence = importlib.import_module("convergence")

    def run(method, seed, *rewards):
        return {"part": "hosts", "method": method, "seed": seed, "curve": [{"reward": r} for r in rewards]}

    long = [run("flow-grpo", 1, 0.5, 0.9, 0.6), run("flow-grpo", 2, 0.5, 0.5, 0.7)]  # means .5, .7, .65
    short = [run(convergence.AVERAGED, 1, 0.5, 0.74), run(convergence.AVERAGED, 2, 0.5, 0.7)]  # means .5, .72
    swept, other = run("flow-grpo", convergence.SWEEP, 0.5, 1.0, 1.0), run("aegpo", 1, 0.5, 1.0)
    assert convergence.target([*long, swept, other]) == pytest.approx(0.7)
    assert convergence.target([*long, *short, swept, other]) == pytest.approx(0.72)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_the_gpu_benchmark_at_a_size_for_a_cpu(tmp_path, monkeypatch):
    """Both arms draw and train the same rows, and evaluations are those counted by hand."""
    gpu = importlib.import_module("gpu")
    arms = ["flow-grpo", "plain loop"]
    words = ["--size", "toy", "--pairs", "1", "--only", *arms, "--json", str(tmp_path / "gpu.json")]
    monkeypatch.setattr("sys.argv", ["gpu.py", *words])
    gpu.main()
    ours, plain = (json.loads((tmp_path / "gpu.json").read_text())["results"][arm] for arm in arms)
    assert ours["images"] == plain["images"] == 8 and ours["rows"] == plain["rows"] == 8 * 9
    rollouts, training = 8 * 10 * 2, 72 * 2 * (1 + 2 + 1)  # under guidance: forward, backward, the base's forward
    assert ours["forwards"] == {"rollouts": rollouts, "update": training}
    assert ours["tflop_a_row"] == plain["tflop_a_row"] > 0
    assert ours["ratio_error"] < ours["clip"] / 10
    assert plain["times_as_fast"] == 1 and ours["times_as_fast"] == plain["seconds"] / ours["seconds"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("kl", [0.0, 0.5])
def test_the_plain_loop_has_the_gradient_of_ours_under_guidance_and_with_a_pull(kl):
    loop = importlib.import_module("reference_loop")
    config = resolve({"algorithm": "flow-grpo", "sampler": {"guidance": 3.0}, "loss": {"kl": kl}})
    model = models.load(Model(dtype="float32"))
    with torch.no_grad():
        for i, parameter in enumerate(model.trainable.values()):
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    prompts = [Prompt(0, "a ring", {}), Prompt(1, "two squares", {})]
    keys = [(ROLLOUT, 0, 0, prompt.id, i) for prompt in prompts for i in range(2)]

    def drawn_noise(number):
        return torch.stack([noise(model.latent_shape, *key, number) for key in keys])

    def encode(texts):
        rows = model.encode(texts).rows
        return rows["embeds"], rows["pooled"]

    sigmas, texts = model.sigmas(10), [prompt.text for prompt in prompts for _ in range(2)]
    drawn = loop.sample(
        model.pipe, encode, texts, drawn_noise(0), lambda i: drawn_noise(i + 1), sigmas, 0.7, 4, guidance=3.0
    )
    advantage = torch.tensor([1.0, -1.0, 0.5, -0.5])
    ratios = list(loop.update(model.pipe, drawn, advantage, sigmas, 0.7, 1e-4, kl, 3.0))
    assert len(ratios) == 9
    theirs = [p.grad.clone() for p in model.trainable.values()]

    model.pipe.transformer.zero_grad()
    conditions = model.encode([prompt.text for prompt in prompts])
    plan = Plan(torch.tensor([2, 2]), torch.arange(10).expand(2, 10) < 9, torch.ones(2, 10, dtype=torch.float64))
    own = collect(model, prompts, conditions, plan, config, 0)
    assert np.abs(own.images.astype(int) - drawn[0].images).max() <= 1
    rows = own.transitions.judged(advantage.unsqueeze(1).expand(4, 10), own.courses.trained)
    objective(config, model, rows, conditions).value.backward()
    largest = max(gradient.abs().max() for gradient in theirs)
    for one, other in zip(model.trainable.values(), theirs, strict=True):
        assert (one.grad - other).abs().max() < 1e-4 * largest


def test_a_run_killed_at_random_goes_on_to_the_same_end(tmp_path):
    """Once while it writes one of its first checkpoints, once as it has just been resumed."""
    chaos = importlib.import_module("chaos")
    recipe = chaos.prepared(tmp_path, chaos.SETTINGS | {"steps": 8, "eval_every": 3})
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert main(chaos.command(recipe, whole, 1)[3:]) == 0
    words, rng = chaos.command(recipe, run, 1), random.Random()
    for aim in (chaos.WRITING, chaos.FIRST):
        fell, _ = chaos.killed(words, run, tmp_path, aim, rng, 5.0)
        assert fell
        words = chaos.command(recipe, run, 1, resume=chaos.last_checkpoint(run) >= 0)
    assert main(words[3:]) == 0
    assert chaos.differences(whole, run) == []
    saved = run / "checkpoint-8" / "memory.safetensors"
    memory = load_file(saved)
    save_file(memory | {"signal/values": memory["signal/values"] * (1 + 1e-15)}, saved)
    assert chaos.differences(whole, run) == ["checkpoint-8/memory.safetensors"]
