"""What a plan goes by: the probe's entropies against plain runs, and the spread of reward against its definition."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from aegpo import models, rewards, world
from aegpo.adapt import memory as memories
from aegpo.adapt.memory import Memory
from aegpo.config import Checks, Config, Model, Optimizer, Probe, Sampler, resolve
from aegpo.models.probe import AttentionProbe
from aegpo.rewards import Reward
from aegpo.rewards.panel import Panel, alone
from aegpo.rollout import SPREAD, collect, noise, shared_trunk
from aegpo.signals import entropy_curves, probe, reward_spread
from aegpo.types import Judgement, Plan, Prompt

PROMPTS = [Prompt(4, "a red circle", {}), Prompt(9, "two squares", {}), Prompt(11, "a cross above a ring", {})]
SAMPLER = Sampler(steps=6)


def settings(sampler=SAMPLER, batch=10):
    return Config(sampler=sampler, optimizer=Optimizer(micro_batch=batch))


def test_the_probe_reads_what_a_plain_run_of_the_same_trajectory_shows(moved_policy):
    model = moved_policy
    conditions = model.encode([prompt.text for prompt in PROMPTS])
    memory = Memory()
    signals, _ = probe(model, PROMPTS, conditions, settings(batch=2), 0, memory)
    assert sorted(memory.base_entropy) == [(4, 0), (9, 0), (11, 0)]
    assert (signals.entropy - signals.base_entropy).abs().max() > 1e-4

    base, _ = probe(models.load(Model()), PROMPTS, conditions, settings(), 0, Memory())
    torch.testing.assert_close(base.entropy, signals.base_entropy, atol=1e-5, rtol=0)
    assert base.delta_entropy.max() < 1e-6
    by_hand = (signals.entropy.numpy().mean(1) - base.entropy.numpy().mean(1)).__abs__()
    np.testing.assert_allclose(signals.delta_entropy, by_hand, atol=1e-5)
    np.testing.assert_allclose(signals.relative_delta_entropy, by_hand / base.entropy.numpy().mean(1), atol=1e-5)

    before = model.forwards
    turned = PROMPTS[::-1]
    again, _ = probe(model, turned, model.encode([p.text for p in turned]), settings(batch=2), 5, memory)
    assert model.forwards - before == 3 * 6  # the base is not run again
    torch.testing.assert_close(again.entropy, signals.entropy.flip(0), atol=1e-5, rtol=0)


def test_visits_take_turns_with_a_prompts_noises_and_the_base_is_probed_once_for_each(model):
    config = replace(settings(), probe=Probe(noises=2))
    conditions = model.encode([prompt.text for prompt in PROMPTS])
    memory, curves, costs = Memory(), [], []
    for visit in range(4):
        before = model.forwards
        signals, _ = probe(model, PROMPTS, conditions, config, visit, memory)
        costs.append(model.forwards - before)
        curves.append(signals.entropy)
    assert costs == [36, 36, 18, 18]
    assert torch.equal(curves[0], curves[2]) and torch.equal(curves[1], curves[3])
    assert (curves[0] - curves[1]).abs().min() > 0
    assert sorted(memory.base_entropy) == [(i, n) for i in (4, 9, 11) for n in (0, 1)]


def test_a_memory_too_small_for_a_batch_only_costs_more_probes(model, monkeypatch):
    conditions = model.encode([prompt.text for prompt in PROMPTS])
    expected, _ = probe(model, PROMPTS, conditions, settings(), 0, Memory())
    monkeypatch.setattr(memories, "REMEMBERED", 2)
    memory = Memory()
    for _ in range(2):
        signals, _ = probe(model, PROMPTS, conditions, settings(), 0, memory)
        torch.testing.assert_close(signals.base_entropy, expected.base_entropy, atol=1e-5, rtol=0)
    assert len(memory.base_entropy) == 2


def test_every_step_of_a_curve_is_that_steps_own_attention():
    """The trajectory walked by hand, each step's attention read on its own: no layer or step changes places."""
    model = models.load(Model())
    conditions, sigmas = model.encode([prompt.text for prompt in PROMPTS]), model.sigmas(6)
    signals, trunk = probe(model, PROMPTS, conditions, settings(batch=2), 0, Memory())
    layers, _ = entropy_curves(model, PROMPTS, conditions, settings(batch=2))
    x = torch.stack([noise((4, 8, 8), 1, 0, prompt.id, 0) for prompt in PROMPTS])
    for step in range(6):
        torch.testing.assert_close(trunk.latents[:, step], x, atol=1e-5, rtol=1e-5)
        with AttentionProbe(model.network) as attention, torch.no_grad():
            v = model.predict(x, sigmas[step], conditions, torch.arange(3), 1.0)
        expected = attention.entropy().double()
        torch.testing.assert_close(signals.entropy[:, step], expected.mean(0), atol=1e-5, rtol=0)
        torch.testing.assert_close(layers[:, :, step], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(trunk.velocities[:, step], v, atol=3e-5, rtol=1e-5)
        x = x - (sigmas[step] - sigmas[step + 1]).float() * v
    torch.testing.assert_close(trunk.latents[:, 6], x, atol=1e-5, rtol=1e-5)
    assert signals.entropy.std(1).min() > 1e-3


def test_under_guidance_the_probe_reads_the_prompts_half_only():
    model = models.load(Model())
    conditions = model.encode([prompt.text for prompt in PROMPTS])
    guided, _ = probe(model, PROMPTS, conditions, settings(Sampler(steps=2, guidance=3.0)), 0, Memory())
    plain, _ = probe(model, PROMPTS, conditions, settings(Sampler(steps=2)), 0, Memory())
    torch.testing.assert_close(guided.entropy[:, 0], plain.entropy[:, 0], atol=1e-5, rtol=0)


def test_the_probe_reads_what_the_settings_name(model):
    conditions = model.encode([prompt.text for prompt in PROMPTS])
    read = {}
    for name, how in {
        "all": Probe(),
        "text": Probe(keys="text"),
        "one layer": Probe(layers=("transformer_blocks.1.attn",)),
        "share": Probe(normalise=True),
        "one row": Probe(rows=1),
        "from text": Probe(queries="text"),
    }.items():
        read[name], _ = entropy_curves(model, PROMPTS, conditions, replace(settings(), probe=how))
    tokens = conditions.rows["embeds"].shape[1]
    assert read["text"].max() <= np.log(tokens) + 1e-6 < read["all"].max()
    torch.testing.assert_close(read["one layer"][0], read["all"][1], atol=1e-6, rtol=0)
    torch.testing.assert_close(read["share"] * np.log(16 + tokens), read["all"], atol=1e-5, rtol=0)
    assert len({len(curves) for name, curves in read.items() if name != "one layer"}) == 1
    for name in ("one row", "from text"):
        assert (read[name] - read["all"]).abs().max() > 0.01


def test_the_spread_of_reward_is_measured_step_by_step(model):
    """The same by hand: for each prompt and step, six rollouts that explore it alone, and their standard deviation."""
    config = settings(Sampler(steps=4, kind="cps", eta=0.6))
    conditions = model.encode([prompt.text for prompt in PROMPTS])

    def brightness(images, prompts, metadata):
        return Judgement(images.mean((1, 2, 3)).astype(np.float32))

    called = []

    def sizes(images, prompts, metadata):
        called.append(len(images))
        return brightness(images, prompts, metadata)

    reward_spread(model, PROMPTS, conditions, alone(Reward("sizes", sizes, groupwise=True)), config, 5, 0)
    assert called == [6] * 9  # what is compared explored the same step of the same prompt
    before = model.forwards
    spread = reward_spread(model, PROMPTS, conditions, alone(Reward("brightness", brightness)), config, 5, 0)
    assert model.forwards - before == 3 * 3 + 3 * 6 * (3 + 2 + 1)
    shared = replace(config, sampler=replace(config.sampler, shared_noise=True))
    for step in range(3):
        explored = torch.eye(4, dtype=torch.bool)[step].expand(3, 4)
        each = Plan(torch.tensor([6, 6, 6]), explored, torch.ones(explored.shape, dtype=torch.float64))
        trunk = shared_trunk(model, PROMPTS, conditions, each, shared, 0, 0)
        drawn = collect(model, PROMPTS, conditions, each, shared, 5, trunk, purpose=SPREAD)
        groups = drawn.images.mean((1, 2, 3)).reshape(3, 6)
        assert spread[step].item() == pytest.approx(groups.std(1).mean(), rel=1e-3)
    assert spread[3] == 0


def test_the_spread_is_measured_on_whole_trajectories_of_eulers(model):
    """Whatever solver and however few steps rollouts take after the window: the same figures at the same cost."""
    conditions = model.encode([prompt.text for prompt in PROMPTS])
    found = []
    for name in ("mix-grpo", "mix-grpo-flash"):
        config = resolve({"algorithm": name, "sampler": {"steps": 5}, "exploration": {"k": 2}})
        before = model.forwards
        spread = reward_spread(model, PROMPTS, conditions, alone(rewards.load("world")), config, 0, 0)
        found.append((spread.tolist(), model.forwards - before))
    assert found[0] == found[1] and found[0][1] == 3 * 4 + 18 * (4 + 3 + 2 + 1)


def test_what_is_measured_and_what_is_trained_have_different_noise(model):
    conditions = model.encode([prompt.text for prompt in PROMPTS])
    explored = torch.eye(6, dtype=torch.bool)[[0, 2, 4]]
    plan = Plan(torch.tensor([2, 5, 3]), explored, torch.ones(explored.shape, dtype=torch.float64))
    measured = collect(model, PROMPTS, conditions, plan, settings(), 3, purpose=SPREAD)
    trained = collect(model, PROMPTS, conditions, plan, settings(), 3)
    assert not (measured.images == trained.images).all((1, 2, 3)).any()


def test_in_the_world_it_is_the_early_steps_whose_exploration_spreads_the_reward(model):
    prompts = [Prompt(i, row["prompt"], row) for i, row in enumerate(world.held_out()[::40])]
    config = settings(Sampler(steps=8, kind="cps", eta=0.6), batch=96)
    conditions = model.encode([prompt.text for prompt in prompts])
    spread = reward_spread(model, prompts, conditions, alone(rewards.load("world")), config, 0, 0)
    assert spread[:4].min() > spread[5:7].max()


def test_groups_that_cannot_be_judged_say_nothing_of_the_spread(model):
    config = settings(Sampler(steps=3, kind="cps", eta=0.6))
    conditions = model.encode([prompt.text for prompt in PROMPTS])

    def told(lost):
        def judge(images, prompts, metadata):
            score = images.mean((1, 2, 3), dtype=np.float32)
            return Judgement(np.where([prompt in lost for prompt in prompts], np.nan, score).astype(np.float32))

        checks = Checks(not_finite="drop")
        return reward_spread(
            model, PROMPTS, conditions, Panel({"told": (Reward("told", judge), 1.0)}, checks), config, 0, 0
        )

    texts = [prompt.text for prompt in PROMPTS]
    each = torch.stack([told([other for other in texts if other != text]) for text in texts])
    torch.testing.assert_close(told(texts[:1]), each[1:].mean(0))
    assert told(texts)[:2].isnan().all() and told(texts)[2] == 0
