from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from aegpo import models
from aegpo.config import Config, Loss, Model, Optimizer, Sampler
from aegpo.math.transitions import transition
from aegpo.models.probe import AttentionProbe
from aegpo.rollout import collect, denoise, draw, noise, probe
from aegpo.train import objective
from aegpo.types import Plan, Prompt

PROMPTS = [Prompt(4, "a red circle", {}), Prompt(9, "two squares", {}), Prompt(11, "a cross above a ring", {})]
SAMPLER = Sampler(steps=6)
AWM = Sampler(steps=6, kind="awm")


def settings(sampler=SAMPLER, batch=10, images=2):
    return Config(sampler=sampler, optimizer=Optimizer(micro_batch=batch), eval_images=images)


@pytest.fixture(scope="module")
def model():
    return models.load(Model())


def a_policy_that_moved():
    model = models.load(Model())
    with torch.no_grad():
        for i, parameter in enumerate(model.trainable.values()):
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    return model


def plan(rollouts=(2, 5, 3)):
    explored = torch.zeros(3, 6, dtype=torch.bool)
    explored[0, [0, 2]] = explored[1, [1, 2, 3]] = explored[2, [4]] = True
    return Plan(torch.tensor(rollouts), explored)


def rollouts(model, batch, sampler=SAMPLER, step=3, prompts=PROMPTS, **plans):
    conditions = model.encode([prompt.text for prompt in prompts])
    return conditions, collect(model, prompts, conditions, plan(**plans), settings(sampler, batch), step)


def test_noise_depends_on_its_whole_key():
    keys = [(0, 0, 1, 2, 3), (1, 0, 1, 2, 3), (0, 1, 1, 2, 3), (0, 0, 2, 2, 3), (0, 0, 1, 3, 3), (0, 0, 1, 2, 4)]
    drawn = [noise((4, 8, 8), *key) for key in keys]
    assert torch.equal(drawn[0], noise((4, 8, 8), *keys[0]))
    assert not any(torch.equal(drawn[0], other) for other in drawn[1:])
    many = torch.cat([noise((4, 8, 8), 7, i).flatten() for i in range(200)])
    assert abs(many.mean()) < 4 / len(many) ** 0.5
    assert abs(many.var() - 1) < 4 * (2 / len(many)) ** 0.5


@pytest.mark.parametrize("sampler", [SAMPLER, AWM], ids=["sde", "matching"])
def test_no_batch_size_changes_a_rollout(model, sampler):
    _, whole = rollouts(model, batch=10, sampler=sampler)
    for batch in (1, 3, 7):
        _, parts = rollouts(model, batch=batch, sampler=sampler)
        for name, value in vars(whole.transitions).items():
            index = torch.from_numpy(np.lexsort((whole.transitions.step, whole.transitions.rollout)))
            other = torch.from_numpy(np.lexsort((parts.transitions.step, parts.transitions.rollout)))
            torch.testing.assert_close(value[index], getattr(parts.transitions, name)[other], atol=1e-4, rtol=1e-4)
        assert np.abs(whole.images.astype(int) - parts.images).max() <= 1


def test_a_prompt_keeps_its_rollouts_in_other_company(model):
    """Noise is keyed by the prompt, so its neighbours and its place in the step change nothing."""
    _, ours = rollouts(model, batch=10)
    _, turned = rollouts(model, batch=10, prompts=[PROMPTS[i] for i in (0, 2, 1)], rollouts=(2, 3, 5))
    np.testing.assert_array_equal(ours.images[:2], turned.images[:2])


def test_rollouts_differ_and_another_step_draws_others(model):
    _, first = rollouts(model, batch=10)
    _, other = rollouts(model, batch=10, step=4)
    starts = first.transitions.x[first.transitions.step == 0]
    assert not torch.equal(starts[0], starts[1])
    assert not (first.images == other.images).all((1, 2, 3)).any()


def test_rows_are_exactly_the_explored_steps(model):
    _, drawn = rollouts(model, batch=4)
    rows = drawn.transitions
    seen = sorted(zip(rows.rollout.tolist(), rows.prompt.tolist(), rows.step.tolist(), strict=True))
    group = [0] * 2 + [1] * 5 + [2] * 3
    wanted = {0: [0, 2], 1: [1, 2, 3], 2: [4]}
    assert seen == [(i, p, step) for i, p in enumerate(group) for step in wanted[p]]
    assert drawn.group.tolist() == group


def test_explored_steps_are_mean_plus_std_times_keyed_noise_and_others_are_ode(model):
    """One rollout replayed by hand, from its first noise to its last latent."""
    conditions, drawn = rollouts(model, batch=10)
    sigmas, rows = model.sigmas(6), drawn.transitions
    x = noise((4, 8, 8), 0, 0, 3, 9, 1, 0)[None]
    for step in range(6):
        with torch.no_grad():
            v = model.predict(x, sigmas[step], conditions, torch.tensor([1]), 1.0)
        at = (x, v, sigmas[step].item(), sigmas[step + 1].item())
        if step in (1, 2, 3):
            mean, std = transition(*at, "flow_sde", 0.7, sigmas[1].item())
            x = mean + std * noise((4, 8, 8), 0, 0, 3, 9, 1, step + 1)
            row = (rows.rollout == 3) & (rows.step == step)
            torch.testing.assert_close(rows.x_next[row], x, atol=1e-4, rtol=1e-4)
        else:
            x = at[0] - (at[2] - at[3]) * v
    assert np.abs(model.decode(x).astype(int) - drawn.images[3:4]).max() <= 1


def test_matching_brings_finished_images_back_to_the_explored_noise_levels(model):
    """Images are the noiseless ones; a row is (1 - s) x0 + s e, with keyed e, and goes straight to x0."""
    conditions, drawn = rollouts(model, batch=4, sampler=AWM)
    first = torch.stack([noise((4, 8, 8), 0, 0, 3, 9, i, 0) for i in range(5)])
    clean, _ = denoise(model, first, conditions, torch.ones(5, dtype=torch.long), AWM)
    assert np.abs(model.decode(clean).astype(int) - drawn.images[2:7]).max() <= 1
    rows, sigmas = drawn.transitions, model.sigmas(6).float()
    seen = sorted(zip(rows.rollout.tolist(), rows.prompt.tolist(), rows.step.tolist(), strict=True))
    assert seen == [(i, 0, t) for i in (0, 1) for t in (0, 2)] + [(i, 1, t) for i in range(2, 7) for t in (1, 2, 3)] + [
        (i, 2, 4) for i in (7, 8, 9)
    ]
    for row in (rows.prompt == 1).nonzero().flatten().tolist():
        i, t = rows.rollout[row].item() - 2, rows.step[row].item()
        torch.testing.assert_close(rows.x_next[row], clean[i], atol=1e-4, rtol=1e-4)
        e = noise((4, 8, 8), 0, 0, 3, 9, i, t + 1)
        torch.testing.assert_close(rows.x[row], (1 - sigmas[t]) * clean[i] + sigmas[t] * e, atol=1e-4, rtol=1e-4)


def test_matching_is_pretrainings_loss_weighed_by_advantages_and_held_by_the_velocity():
    """The gradient is that of `A |v - (e - x0)|^2 + kl |v - v_base|^2`, and of RAM's regression (arXiv 2605.10759).

    RAM regresses onto `v_base + w A ((e - x0) - v)`, held fixed, with w = 1 / kl; kl times its gradient is the same.
    """
    model = a_policy_that_moved()
    conditions, drawn = rollouts(model, batch=10, sampler=AWM)
    rows, kl = drawn.transitions.with_advantages(torch.linspace(-1, 2, 10)), 0.3
    config = Config(sampler=AWM, loss=Loss(kl=kl))
    weights = list(model.trainable.values())
    ours = torch.autograd.grad(objective(config, model, rows, conditions).value, weights)

    sigma = model.sigmas(6)[rows.step].float()
    target = (rows.x - rows.x_next) / sigma[:, None, None, None]
    v = model.predict(rows.x, sigma, conditions, rows.prompt, 1.0)
    with torch.no_grad(), model.reference():
        v_base = model.predict(rows.x, sigma, conditions, rows.prompt, 1.0)
    advantage = rows.advantage[:, None, None, None]
    plain = advantage * (v - target).square() + kl * (v - v_base).square()
    ram = kl * (v - (v_base + advantage / kl * (target - v)).detach()).square()
    for loss in (plain, ram):
        theirs = torch.autograd.grad(loss.mean((1, 2, 3)).sum(), weights, retain_graph=True)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-3)
    assert max(g.abs().max() for g in ours) > 1e-3


@pytest.mark.parametrize(
    "sampler",
    [SAMPLER, replace(SAMPLER, guidance=3.0), AWM, replace(AWM, guidance=3.0)],
    ids=["sde", "guided", "matching", "guided-matching"],
)
def test_first_ratio_is_one_to_the_bit_in_the_same_batch_shape(model, sampler):
    """Every rollout explores step 2 alone, so its rows stand in one batch in the rollout and in the update alike."""
    config = settings(sampler)
    conditions = model.encode([prompt.text for prompt in PROMPTS])
    explored = torch.zeros(3, 6, dtype=torch.bool)
    explored[:, 2] = True
    drawn = collect(model, PROMPTS, conditions, Plan(torch.tensor([2, 5, 3]), explored), config, 0)
    loss = objective(config, model, drawn.transitions, conditions)
    assert loss.metrics["ratio/first_error"].item() == 0.0


@pytest.mark.parametrize("sampler", [SAMPLER, AWM], ids=["sde", "matching"])
def test_first_ratio_is_one_in_any_other_batch_shape(model, sampler):
    conditions, drawn = rollouts(model, batch=4, sampler=sampler)
    rows = drawn.transitions
    for micro in torch.randperm(len(rows)).split(5):
        error = objective(Config(sampler=sampler), model, rows[micro], conditions).metrics["ratio/first_error"]
        assert error.item() < 1e-6


def test_on_policy_gradient_is_reinforce(model):
    """At the policy that drew the rows the surrogate's gradient is -sum A grad log p, whatever the clip."""
    conditions, drawn = rollouts(model, batch=10)
    advantage = torch.linspace(-1, 2, 10)
    rows = drawn.transitions.with_advantages(advantage)
    assert rows.advantage.tolist() == advantage[rows.rollout].tolist()
    weights = list(model.trainable.values())
    surrogate = torch.autograd.grad(objective(Config(sampler=SAMPLER), model, rows, conditions).value, weights)

    sigmas = model.sigmas(6)
    s, s_next = sigmas[rows.step].float(), sigmas[rows.step + 1].float()
    v = model.predict(rows.x, s, conditions, rows.prompt, 1.0)
    mean, std = transition(rows.x, v, s, s_next, "flow_sde", 0.7, sigmas[1].item())
    normal = torch.distributions.Normal(mean, std.expand_as(mean))
    reinforce = -(rows.advantage * normal.log_prob(rows.x_next).mean((1, 2, 3))).sum()
    for ours, theirs in zip(surrogate, torch.autograd.grad(reinforce, weights), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert max(g.abs().max() for g in surrogate) > 1e-4


def test_the_surrogate_is_clipped_at_its_own_two_ends_and_says_so(model):
    """Old log-probabilities shifted by hand: ratios 1.5, .6, 1.1 and .9 against a clip of [.7, 1.2]."""
    conditions, drawn = rollouts(model, batch=10)
    few = drawn.transitions[torch.tensor([0, 3, 6, 9])]
    ratio = torch.tensor([1.5, 0.6, 1.1, 0.9])
    old = replace(few, log_prob=few.log_prob - ratio.log())
    config = Config(sampler=SAMPLER, loss=Loss(clip_low=0.3, clip_high=0.2))
    for sign, expected in ((1, [1.2, 0.6, 1.1, 0.9]), (-1, [1.5, 0.7, 1.1, 0.9])):
        metrics = objective(config, model, replace(old, advantage=torch.full((4,), 2.0 * sign)), conditions).metrics
        assert metrics["loss"].item() == pytest.approx(-2 * sign * sum(expected), rel=1e-5)
        assert metrics["clip_fraction"].item() == 2
        assert metrics["ratio/mean"].item() == pytest.approx(ratio.sum().item(), rel=1e-5)
        assert metrics["approx_kl"].item() == pytest.approx(ratio.log().square().sum().item() / 2, rel=1e-4)


def test_the_pull_to_the_base_is_flow_grpos_and_has_a_gradient():
    model = a_policy_that_moved()
    conditions, drawn = rollouts(model, batch=10)
    rows, sigmas = drawn.transitions, model.sigmas(6)
    config = Config(sampler=SAMPLER, loss=Loss(kl=0.5))
    loss = objective(config, model, rows, conditions)

    s, s_next = sigmas[rows.step].float(), sigmas[rows.step + 1].float()
    v = model.predict(rows.x, s, conditions, rows.prompt, 1.0)
    with torch.no_grad(), model.reference():
        v_base = model.predict(rows.x, s, conditions, rows.prompt, 1.0)
    h = (s - s_next).double()
    c = 1 + 0.7**2 / 2  # d mu / d v = -h c away from the first step
    g_squared = 0.7**2 * s.double() / (1 - s.double())
    first = rows.step == 0
    g_squared[first] = 0.7**2 / (1 - sigmas[1])
    c = torch.where(first, 1.0, c)
    by_hand = ((h * c).reshape(-1, 1, 1, 1) * (v - v_base)).square().mean((1, 2, 3)) / (2 * g_squared)
    torch.testing.assert_close(loss.metrics["kl"].double(), by_hand.sum().detach(), rtol=1e-3, atol=0)
    weights = list(model.trainable.values())
    pull = torch.autograd.grad(loss.value, weights)  # no row has an advantage here
    for ours, theirs in zip(pull, torch.autograd.grad(0.5 * by_hand.sum(), weights), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-2)
    assert max(g.abs().max() for g in pull) > 3e-4


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps"])
def test_the_weight_of_the_pull_follows_the_samplers_own_noise(kind):
    """Flow-GRPO divides by 2 std_dev^2: g without sqrt(h) for an SDE, the whole s' sin(phi) for CPS."""
    model = a_policy_that_moved()
    sampler = Sampler(steps=6, kind=kind)
    conditions, drawn = rollouts(model, batch=10, sampler=sampler)
    row = drawn.transitions[(drawn.transitions.step == 2).nonzero().flatten()[:1]]
    loss = objective(Config(sampler=sampler, loss=Loss(kl=0.5)), model, row, conditions)
    s, s_next = model.sigmas(6)[2:4].tolist()
    means = []
    for context in (nullcontext(), model.reference()):
        with context, torch.no_grad():
            v = model.predict(row.x, torch.tensor(s), conditions, row.prompt, 1.0)
        means.append(transition(row.x, v, s, s_next, kind, 0.7)[0])
    std_dev = {"flow_sde": 0.7 * (s / (1 - s)) ** 0.5, "dance_sde": 0.7, "cps": s_next * np.sin(0.7 * np.pi / 2)}[kind]
    expected = (means[0] - means[1]).square().mean().item() / (2 * std_dev**2)
    assert loss.metrics["kl"].item() == pytest.approx(expected, rel=1e-4)


def test_the_probe_reads_what_a_plain_run_of_the_same_trajectory_shows():
    model = a_policy_that_moved()
    conditions = model.encode([prompt.text for prompt in PROMPTS])
    cache = {}
    signals = probe(model, PROMPTS, conditions, settings(batch=2), cache)
    assert sorted(cache) == [4, 9, 11]
    assert (signals.entropy - signals.base_entropy).abs().max() > 1e-4

    base = probe(models.load(Model()), PROMPTS, conditions, settings(), {})
    torch.testing.assert_close(base.entropy, signals.base_entropy, atol=1e-5, rtol=0)
    assert base.delta_entropy.max() < 1e-6
    by_hand = (signals.entropy.numpy().mean(1) - base.entropy.numpy().mean(1)).__abs__()
    np.testing.assert_allclose(signals.delta_entropy, by_hand, atol=1e-5)

    before = model.forwards
    again = probe(model, PROMPTS[::-1], model.encode([p.text for p in PROMPTS[::-1]]), settings(batch=2), cache)
    assert model.forwards - before == 3 * 6  # the base is not run again
    torch.testing.assert_close(again.entropy, signals.entropy.flip(0), atol=1e-5, rtol=0)


def test_every_step_of_a_curve_is_that_steps_own_attention():
    """The trajectory walked by hand, each step's attention read on its own: no layer or step changes places."""
    model = models.load(Model())
    conditions, sigmas = model.encode([prompt.text for prompt in PROMPTS]), model.sigmas(6)
    signals = probe(model, PROMPTS, conditions, settings(batch=2), {})
    x = torch.stack([noise((4, 8, 8), 1, 0, prompt.id) for prompt in PROMPTS])
    for step in range(6):
        with AttentionProbe(model.image_tokens) as attention, torch.no_grad():
            v = model.predict(x, sigmas[step], conditions, torch.arange(3), 1.0)
        expected = attention.entropy().mean(0).double()
        torch.testing.assert_close(signals.entropy[:, step], expected, atol=1e-5, rtol=0)
        x = x - (sigmas[step] - sigmas[step + 1]).float() * v
    assert signals.entropy.std(1).min() > 1e-3


def test_under_guidance_the_probe_reads_the_prompts_half_only():
    model = models.load(Model())
    conditions = model.encode([prompt.text for prompt in PROMPTS])
    guided = probe(model, PROMPTS, conditions, settings(Sampler(steps=2, guidance=3.0)), {})
    plain = probe(model, PROMPTS, conditions, settings(Sampler(steps=2)), {})
    torch.testing.assert_close(guided.entropy[:, 0], plain.entropy[:, 0], atol=1e-5, rtol=0)


def test_evaluation_pictures_are_always_the_same(model):
    one = draw(model, PROMPTS, settings(batch=6))
    other = draw(model, PROMPTS[::-1], settings(batch=4))
    assert np.abs(one.astype(int) - other.reshape(3, 2, 32, 32, 3)[::-1].reshape(6, 32, 32, 3)).max() <= 1
    assert not (one[0] == one[1]).all()


def test_a_jump_of_matching_is_never_taken_for_a_step(model):
    conditions, explored = model.encode(["a ring"]), torch.eye(6, dtype=torch.bool)[2:3]
    with pytest.raises(AssertionError, match="revisit"):
        denoise(
            model, noise((1, 4, 8, 8), 5), conditions, torch.arange(1), AWM, explored, lambda *_: noise((4, 8, 8), 6)
        )


def test_denoise_without_exploration_is_deterministic(model):
    x = noise((2, 4, 8, 8), 5)
    conditions = model.encode(["a ring", "a ring"])
    first, rows = denoise(model, x, conditions, torch.arange(2), SAMPLER)
    assert rows == []
    assert torch.equal(first, denoise(model, x, conditions, torch.arange(2), SAMPLER)[0])
