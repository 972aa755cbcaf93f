"""What `aegpo analyze` measures: planted relations are found, and a run's own record says the same."""

import json
import re
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from aegpo import build, display, models, use, world
from aegpo.adapt.memory import Memory
from aegpo.adapt.plan import policy_noise
from aegpo.analysis import (
    Stage,
    analyze,
    evaluations,
    follow,
    over_prompts,
    over_steps,
    rank_correlation,
    read_entropy,
    spread_of_each,
    with_noise,
)
from aegpo.checkpoint import load_weights
from aegpo.cli import main
from aegpo.config import Config, Model, Optimizer, Probe, Sampler, load_yaml, resolve
from aegpo.data import load_prompts
from aegpo.report.html import correlation
from aegpo.rewards import Reward, load
from aegpo.rewards.panel import alone
from aegpo.signals import entropy_curves, probe, reward_spread
from aegpo.types import Judgement, Prompt
from tests.small import SMALL

PROMPTS = [Prompt(4, "a red circle", {}), Prompt(9, "two squares", {}), Prompt(11, "a cross above a ring", {})]
MOVED = [3, 1, 6, 2, 5, 4]  # ranks of the change of entropy of six prompts,
GAINED = [4, 1, 5, 3, 6, 2]  # and of what they gained next


def stage(step, moved, reward, spread):
    """Two layers and two steps whose mean moved so far, and two images so far apart."""
    moved, reward, spread = (torch.tensor(row, dtype=torch.float64) for row in (moved, reward, spread))
    tilt = torch.tensor([[0.5, -0.5], [-0.25, 0.25]])[:, None, :]
    return Stage(step, 3 + moved[None, :, None] + tilt, torch.stack([reward - spread, reward + spread], 1).numpy())


def planted():
    """Entropy falls for half of the prompts; at step 8 the order of the gains turns."""
    signed = [m**2 / 100 * (-1) ** m for m in MOVED]
    before = [0.5, 0.25, 0.125, 0.5, 0.75, 0.375]
    after = [b + g / 16 for b, g in zip(before, GAINED, strict=True)]
    at_last = [b - m / 16 for b, m in zip(before, MOVED, strict=True)]
    spread = [g / 64 for g in reversed(GAINED)]
    return [
        stage(0, [0] * 6, before, [0] * 6),
        stage(4, signed, before, spread),
        stage(8, signed, after, [0] * 6),
        stage(12, signed, at_last, [0] * 6),
    ]


def spearman(a, b):
    """By the textbook's formula, for ranks without ties."""
    return 1 - 6 * sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / (len(a) * (len(a) ** 2 - 1))


def test_a_planted_relation_between_entropy_and_gain_is_found():
    said = over_prompts(planted())
    assert said["checkpoints"][1]["delta_entropy"] == pytest.approx([m**2 / 100 for m in MOVED])
    next_, last = (said["correlations"][i] for i in (2, 3))
    assert (next_["step"], next_["next"], next_["gain"], next_["n"]) == (4, 8, "gain_to_next", 6)
    assert next_["standard_error"] == pytest.approx(5**-0.5)
    assert next_["delta_entropy"] == pytest.approx(spearman(MOVED, GAINED))
    assert next_["reward_std"] == pytest.approx(spearman(GAINED[::-1], GAINED))
    assert (last["gain"], last["delta_entropy"]) == ("gain_to_last", pytest.approx(-1))
    assert [row["gain"] for row in said["correlations"]] == ["gain_to_next", "gain_to_last"] * 3


def test_prompts_are_ranked_where_entropy_has_moved_and_something_follows():
    said = over_prompts(planted())
    assert said["ranking"] == {"step": 8, "order": [2, 4, 5, 0, 3, 1]}
    assert over_prompts(planted()[:3])["ranking"]["step"] == 4
    assert (
        over_prompts(planted()[:2])["ranking"] is None
    )  # at the base nothing has moved, and at the last nothing follows


def test_the_gains_of_a_prompt_add_up():
    rows = over_prompts(planted())["checkpoints"]
    steps = np.array([row["gain_to_next"] for row in rows[:-1]])
    for i, row in enumerate(rows[:-1]):
        np.testing.assert_allclose(row["gain_to_last"], steps[i:].sum(0), atol=1e-12)
    assert rows[-1]["gain_to_next"] is rows[-1]["gain_to_last"] is None


def test_what_is_constant_has_no_correlation():
    base = over_prompts(planted())["correlations"][0]
    assert base["delta_entropy"] is base["reward_std"] is base["reward"] is None  # nothing was gained by step 4
    alone = [replace(s, entropy=s.entropy[:, :1], reward=s.reward[:1]) for s in planted()]
    assert over_prompts(alone)["correlations"][2] | {"step": 4} == {
        **{"step": 4, "next": 8, "gain": "gain_to_next", "n": 1, "standard_error": None},
        **{"delta_entropy": None, "reward": None, "reward_std": None},
    }


def test_ties_share_their_ranks():
    a, b = np.array([0.5, 0.5, 0.1, 7.0]), np.array([1.0, 2.0, 2.0, 3.0])
    assert rank_correlation(a, b) == pytest.approx(np.corrcoef([2.5, 2.5, 1, 4], [1, 2.5, 2.5, 4])[0, 1])


def test_a_reading_is_judged_by_the_spread_of_the_steps_that_it_would_choose():
    worth = torch.tensor([0.30, 0.10, 0.20, 0.05, 0.25, 0.15, 0.0], dtype=torch.float64)
    unequal = torch.stack([worth * 0.5, worth * 1.5])
    reading = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 9.0], dtype=torch.float64).expand(2, 7)
    said = over_steps(unequal, {"itself": unequal, "rising": reading, "flat": torch.ones(2, 7)})
    assert said["spread"] == pytest.approx(worth.tolist())
    assert said["best"] == [0, 2, 4, 5]
    itself, rising, flat = (said["readings"][name] for name in ("itself", "rising", "flat"))
    assert (itself["share"], itself["chosen"]) == (1, said["best"])
    assert itself["correlation"] == pytest.approx(1)
    assert rising["chosen"] == [2, 3, 4, 5]  # and not the last step, however high
    assert rising["share"] == pytest.approx((0.2 + 0.05 + 0.25 + 0.15) / 0.9)
    assert rising["correlation"] == pytest.approx(spearman([6, 2, 4, 1, 5, 3], [1, 2, 3, 4, 5, 6]))
    assert (flat["correlation"], flat["chosen"]) == (None, [0, 1, 2, 3])
    shares = [worth[list(steps)].sum().item() / 0.9 for steps in combinations(range(6), 4)]
    assert said["random_share"] == pytest.approx(np.mean(shares))


def test_where_exploring_spreads_nothing_there_is_no_share_and_with_few_steps_all_are_chosen():
    said = over_steps(torch.zeros(1, 4), {"rising": torch.arange(4.0)[None]})
    assert (
        said["random_share"] is said["readings"]["rising"]["share"] is said["readings"]["rising"]["correlation"] is None
    )
    assert said["readings"]["rising"]["chosen"] == said["best"] == [0, 1, 2]


# ---------------------------------------------------------------- with a model


@pytest.fixture(scope="module")
def model():
    return models.load(Model())


def _brightness(images, prompts, metadata):
    return Judgement(images.mean((1, 2, 3)).astype(np.float32))


brightness = alone(Reward("brightness", _brightness))


def test_prompts_one_by_one_have_the_spread_that_they_have_together(model):
    config = Config(sampler=Sampler(steps=4, kind="cps", eta=0.6), optimizer=Optimizer(micro_batch=16))
    _, trunk = read_entropy(config, model, PROMPTS, moved=False)
    conditions = model.encode([prompt.text for prompt in PROMPTS])
    together = reward_spread(model, PROMPTS, conditions, brightness, config, 0, 0)
    each = spread_of_each(config, model, PROMPTS, brightness, trunk)
    torch.testing.assert_close(each.mean(0), together, rtol=1e-3, atol=1e-4)
    assert each[:, :3].std(0).min() > 0


def test_the_curves_are_the_probes_and_the_samplers(model):
    config = with_noise(Config(sampler=Sampler(steps=4, kind="ode")))
    readings, _ = read_entropy(config, model, PROMPTS, moved=True)
    conditions = model.encode([prompt.text for prompt in PROMPTS])
    assert torch.equal(readings["entropy"], probe(model, PROMPTS, conditions, config, 0, Memory())[0].entropy)
    text = replace(config, probe=replace(config.probe, keys="text"))
    assert torch.equal(readings["entropy_to_text"], probe(model, PROMPTS, conditions, text, 0, Memory())[0].entropy)
    assert (readings["delta_entropy"] == 0).all()  # this policy is the base
    cps = policy_noise(Config(sampler=Sampler(steps=4, kind="cps", eta=0.6)), model.sigmas(4))
    assert torch.equal(readings["policy_noise"], cps.expand(3, 4))
    assert torch.equal(readings["entropy_times_noise"], readings["entropy"] * cps)


def moved_policy(train="lora"):
    model = models.load(Model(train=train))
    with torch.no_grad():
        for i, weights in enumerate(model.trainable.values()):
            weights += 0.02 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(i))
    return model


def test_the_change_of_entropy_over_steps_has_no_sign():
    config, model = Config(sampler=Sampler(steps=4)), moved_policy()
    readings, _ = read_entropy(config, model, PROMPTS, moved=True)
    signals, _ = probe(model, PROMPTS, model.encode([p.text for p in PROMPTS]), config, 0, Memory())
    change = signals.entropy - signals.base_entropy
    assert change.min() < 0 < change.max()
    assert torch.equal(readings["delta_entropy"], change.abs())


@pytest.mark.parametrize("train", ["lora", "full"])
def test_step_0_is_the_base_whatever_the_policy_has_become(model, train):
    config = Config(sampler=Sampler(steps=3), eval_images=2)
    [base], [fresh] = (follow(config, one, PROMPTS, brightness, []) for one in (moved_policy(train), model))
    torch.testing.assert_close(base.entropy, fresh.entropy)
    np.testing.assert_allclose(base.reward, fresh.reward, rtol=1e-3)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_it_costs_the_evaluations_that_were_announced(model, guidance):
    config = Config(sampler=Sampler(steps=3, guidance=guidance), optimizer=Optimizer(micro_batch=2), eval_images=3)
    before, told = model.forwards, []
    analyze(config, model, PROMPTS, brightness, progress=told.append)
    assert model.forwards - before == sum(told) == evaluations(config, 3, 1, guidance > 1)


# ---------------------------------------------------------------- a run

OWN = {
    "sampler": {"steps": 4},
    "exploration": {"k": 2},
    "optimizer": {"micro_batch": 8, "lr": 3e-3},
    "eval_every": 1,
    "eval_images": 2,
    "checkpoints_total_limit": 10,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run that kept all its checkpoints, analysed."""
    folder = tmp_path_factory.mktemp("analysed")
    rows = world.held_out()[::12]
    (folder / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "bright.py").write_text("def score(images, prompts):\n    return images.mean((1, 2, 3)) / 255\n")
    where = {"prompts": {"eval": str(folder / "few.jsonl")}, "output_dir": str(folder / "run")}
    build.fit(resolve(SMALL | OWN, where, {"reward": f"{folder / 'bright.py'}:score"}))
    use.analyze(str(folder / "run"), images=2)
    return folder / "run"


def numbers(run):
    return json.loads((run / "analysis" / "analysis.json").read_text())


def test_the_reward_at_each_checkpoint_is_that_of_its_evaluation(run):
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = {row["step"]: row["eval/reward_mean"] for row in metrics}
    found = {row["step"]: np.mean(row["reward"]) for row in numbers(run)["checkpoints"]}
    assert list(found) == [0, 1, 2, 3]
    assert found == pytest.approx(evaluated, rel=1e-6)
    assert len(set(found.values())) == 4


def test_the_change_of_entropy_is_what_the_probe_of_training_says(run):
    rows = numbers(run)["checkpoints"]
    assert rows[0]["delta_entropy"] == [0.0] * 12
    config = resolve(load_yaml(run / "config.yaml"))
    prompts, model = load_prompts(config.prompts.eval, "eval"), models.load(config.model)
    load_weights(run / "checkpoint-2", model.trainable)
    signals, _ = probe(model, prompts, model.encode([p.text for p in prompts]), config, 0, Memory())
    assert rows[2]["delta_entropy"] == pytest.approx(signals.delta_entropy.tolist(), abs=1e-6)
    assert min(rows[2]["delta_entropy"]) > 0


def test_gains_telescope_and_are_ranked_by_entropy(run):
    said = numbers(run)
    rows = said["checkpoints"]
    np.testing.assert_allclose(
        np.sum([row["gain_to_next"] for row in rows[:-1]], 0), np.subtract(rows[-1]["reward"], rows[0]["reward"])
    )
    assert said["ranking"]["step"] == 2
    ranked = [rows[2]["delta_entropy"][i] for i in said["ranking"]["order"]]
    assert ranked == sorted(rows[2]["delta_entropy"], reverse=True)


def test_layers_average_to_the_curve_whose_peaks_training_would_take(run):
    said = numbers(run)
    assert said["spread_over"]["prompts"] == list(range(12))
    policy, base = (np.array(said["entropy"][name]) for name in ("policy", "base"))
    np.testing.assert_allclose(policy.mean(0), said["readings"]["entropy"]["curve"], atol=1e-6)
    change = np.array(said["readings"]["delta_entropy"]["curve"])
    assert (
        change >= np.abs((policy - base).mean(0)) - 1e-6
    ).all()  # a mean of sizes is no less than the size of a mean
    assert said["readings"]["policy_noise"]["curve"][-1] == said["spread"][-1] == 0


def test_twice_is_the_same_and_so_it_is_without_checkpoint_0(run, tmp_path, monkeypatch, capsys):
    first = {file.name: file.read_bytes() for file in (run / "analysis").iterdir()}
    assert set(first) == {"analysis.json", "analysis.html"}
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "analysis")
    shutil.rmtree(copy / "checkpoint-0")
    monkeypatch.setattr(display, "QUIET", -1)
    page = use.analyze(str(copy), images=2)
    assert page == copy / "analysis" / "analysis.html"
    assert {file.name: file.read_bytes() for file in page.parent.iterdir()} == first
    printed = capsys.readouterr().out
    done, total = re.findall(r"^analysis: ([\d,]+) of ([\d,]+)$", printed, re.MULTILINE)[-1]
    assert done == total
    table = [[cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines() if line[0] == "│"]
    signals = ("delta_entropy", "reward", "reward_std")
    assert table[:3] == [
        [str(row["step"]), str(row["next"]), *(correlation(row[signal]) for signal in signals)]
        for row in numbers(run)["correlations"]
        if row["gain"] == "gain_to_next"
    ]
    assert len(table) == 3 + len(numbers(run)["readings"])


def test_an_analysed_run_may_still_be_overwritten(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    build.fit(replace(resolve(load_yaml(run / "config.yaml")), steps=0, output_dir=str(copy)), overwrite=True)
    assert not (copy / "analysis").exists()


def test_a_model_before_training(tmp_path, capsys):
    (tmp_path / "three.txt").write_text("".join(f"{prompt.text}\n" for prompt in PROMPTS))
    page = use.analyze("world", str(tmp_path / "three.txt"), images=1, out=tmp_path / "deep" / "down")
    said = json.loads((page.parent / "analysis.json").read_text())
    assert page == tmp_path / "deep" / "down" / "analysis.html"
    assert said["entropy"]["policy"] is said["ranking"] is None
    assert said["correlations"] == []
    assert list(said["readings"]) == ["entropy", "entropy_to_text", "entropy_times_noise", "policy_noise"]
    [row] = said["checkpoints"]
    model = models.load(Model())
    config = resolve({"algorithm": "aegpo", "eval_images": 1, "prompts": {"eval": str(tmp_path / "three.txt")}})
    judged = use.evaluate_policy(config, model, load_prompts(config.prompts.eval, "eval"), alone(load("world")))
    assert np.mean(row["reward"]) == pytest.approx(judged["eval/reward_mean"])
    printed = capsys.readouterr().out
    assert "gained" not in printed
    assert re.search(rf"^analysis: {re.escape(str(page))}$", printed, re.MULTILINE)


def test_what_cannot_be_read_is_said_before_anything_is_drawn(tmp_path):
    """Layers in which images look at themselves alone, and an analysis of those: there are no text keys."""
    pipe = StableDiffusion3Pipeline.from_pretrained(world.path(), text_encoder_3=None, tokenizer_3=None)
    how = dict(pipe.transformer.config) | {"dual_attention_layers": (0,)}
    pipe.register_modules(transformer=SD3Transformer2DModel.from_config(how))
    pipe.save_pretrained(tmp_path / "dual")
    (tmp_path / "three.txt").write_text("".join(f"{prompt.text}\n" for prompt in PROMPTS))
    (tmp_path / "mine.py").write_text(
        "def score(images, prompts):\n"
        "    assert images.shape[1] == images.shape[2] and set(images.flatten()) == {0, 255}, 'an image was drawn'\n"
        "    return [0.0, 1.0]\n"
    )
    with pytest.raises(ValueError, match="no attention layer has run that has image queries and text keys"):
        use.analyze(
            str(tmp_path / "dual"),
            str(tmp_path / "three.txt"),
            f"{tmp_path}/mine.py:score",
            images=1,
            out=tmp_path / "out",
            settings={"sampler": {"steps": 3, "guidance": 1}, "probe": {"layers": ["*.attn2"]}},
        )
    assert not (tmp_path / "out").exists()


def test_settings_say_how_a_model_is_sampled_and_what_is_read_of_it(run, tmp_path, capsys):
    (tmp_path / "three.txt").write_text("".join(f"{prompt.text}\n" for prompt in PROMPTS))
    words = ["--prompts", str(tmp_path / "three.txt"), "--images", "1", "--out", str(tmp_path / "out")]
    said = ["--sampler.steps=3", "--sampler.guidance=2", "--probe.layers", "[transformer_blocks.1.attn]"]
    assert main(["analyze", "world", *words, *said, "--probe.normalise", "true"]) == 0
    found = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert (found["steps"], found["guidance"]) == (3, 2)
    [layer] = found["entropy"]["base"]
    config = Config(sampler=Sampler(steps=3, guidance=2))
    model = models.load(Model())
    prompts = load_prompts(str(tmp_path / "three.txt"), "eval")
    conditions = model.encode([prompt.text for prompt in prompts])
    whole = entropy_curves(model, prompts, conditions, replace(config, probe=Probe(normalise=True)))[0]
    np.testing.assert_allclose(layer, whole[1].mean(0), rtol=1e-5)
    assert max(layer) < 1
    copy = shutil.copytree(run, tmp_path / "run")
    assert main(["analyze", str(copy), *words[:4], "--probe.keys", "text"]) == 0  # over what the run was trained with
    assert numbers(copy)["probe"]["keys"] == "text"
    assert numbers(copy)["reward"] == numbers(run)["reward"]
    capsys.readouterr()


def test_a_damaged_checkpoint_is_named_before_anything_is_written(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("analysis"))
    Path(copy / "checkpoint-1" / "weights.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"checkpoint-1 is damaged: weights\.safetensors"):
        use.analyze(str(copy))
    assert not (copy / "analysis").exists()
