"""Rollouts: their rows, their noise, their costs, trunks and trees, on the real model."""

import itertools
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from aegpo.adapt.courses import lay_out
from aegpo.adapt.memory import Memory
from aegpo.config import Config, Loss, Optimizer, Sampler, resolve
from aegpo.math.solvers import dpmpp_2m
from aegpo.math.transitions import transition
from aegpo.objective import objective
from aegpo.rollout import collect, denoise, draw, noise, shared_trunk
from aegpo.signals import probe
from aegpo.train import credit
from aegpo.types import Plan, Prompt

PROMPTS = [Prompt(4, "a red circle", {}), Prompt(9, "two squares", {}), Prompt(11, "a cross above a ring", {})]
SAMPLER = Sampler(steps=6)
AWM = Sampler(steps=6, kind="ode")


def settings(sampler=SAMPLER, batch=10, images=2):
    return Config(sampler=sampler, optimizer=Optimizer(micro_batch=batch), eval_images=images)


def plan(rollouts=(2, 5, 3)):
    explored = torch.zeros(3, 6, dtype=torch.bool)
    explored[0, [0, 2]] = explored[1, [1, 2, 3]] = explored[2, [4]] = True
    return Plan(torch.tensor(rollouts), explored, torch.ones(3, 6, dtype=torch.float64))


def rollouts(model, batch, sampler=SAMPLER, step=3, prompts=PROMPTS, **plans):
    conditions = model.encode([prompt.text for prompt in prompts])
    return conditions, collect(model, prompts, conditions, plan(**plans), settings(sampler, batch), step)


def alike(explored):
    """Equal weights for every row of these steps."""
    return torch.ones(explored.shape, dtype=torch.float64)


def with_advantages(drawn, advantage):
    """The rows, each with its rollout's advantage; `advantage` is (n,)."""
    steps = drawn.courses.lands.shape[1]
    return drawn.transitions.judged(advantage[:, None].expand(-1, steps), drawn.courses.trained)


def first_error(loss):
    return (loss.metrics["ratio/mean"] - 1).abs().max().item()


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
    clean = denoise(model, first, conditions, torch.ones(5, dtype=torch.long), AWM).latents[:, -1]
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


def test_matching_is_pretrainings_loss_weighed_by_advantages_and_held_by_the_velocity(moved_policy):
    """The gradient is that of `A |v - (e - x0)|^2 + kl |v - v_base|^2`, and of RAM's regression (arXiv 2605.10759).

    RAM regresses onto `v_base + w A ((e - x0) - v)`, held fixed, with w = 1 / kl; kl times its gradient is the same.
    """
    model = moved_policy
    conditions, drawn = rollouts(model, batch=10, sampler=AWM)
    rows, kl = with_advantages(drawn, torch.linspace(-1, 2, 10)), 0.3
    config = Config(sampler=AWM, loss=Loss(kl=kl))
    weights = list(model.trainable.values())
    ours = torch.autograd.grad(objective(config, model, rows, conditions).rows.sum(), weights)

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
    drawn = collect(model, PROMPTS, conditions, Plan(torch.tensor([2, 5, 3]), explored, alike(explored)), config, 0)
    loss = objective(config, model, drawn.transitions, conditions)
    assert first_error(loss) == 0.0


@pytest.mark.parametrize("sampler", [SAMPLER, AWM], ids=["sde", "matching"])
def test_first_ratio_is_one_in_any_other_batch_shape(model, sampler):
    conditions, drawn = rollouts(model, batch=4, sampler=sampler)
    rows = drawn.transitions
    for micro in torch.randperm(len(rows)).split(5):
        assert first_error(objective(Config(sampler=sampler), model, rows[micro], conditions)) < 1e-6


def test_on_policy_gradient_is_reinforce(model):
    """At the policy that drew the rows the surrogate's gradient is -sum A grad log p, whatever the clip."""
    conditions, drawn = rollouts(model, batch=10)
    advantage = torch.linspace(-1, 2, 10)
    rows = with_advantages(drawn, advantage)
    assert rows.advantage.tolist() == advantage[rows.rollout].tolist()
    weights = list(model.trainable.values())
    surrogate = torch.autograd.grad(objective(Config(sampler=SAMPLER), model, rows, conditions).rows.sum(), weights)

    sigmas = model.sigmas(6)
    s, s_next = sigmas[rows.step].float(), sigmas[rows.step + 1].float()
    v = model.predict(rows.x, s, conditions, rows.prompt, 1.0)
    mean, std = transition(rows.x, v, s, s_next, "flow_sde", 0.7, sigmas[1].item())
    normal = torch.distributions.Normal(mean, std.expand_as(mean))
    reinforce = -(rows.advantage * normal.log_prob(rows.x_next).mean((1, 2, 3))).sum()
    for ours, theirs in zip(surrogate, torch.autograd.grad(reinforce, weights), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert max(g.abs().max() for g in surrogate) > 1e-4


def drawn_by_another(model, rows, ratio, sampler=SAMPLER):
    """The rows as if drawn by a policy beside which the present one has these ratios, (m,).

    The old mean is put on the line through the new one and x_next, so far that its log-probability is right; and since
    the mean is affine in the velocity, so is the velocity that belongs to it.
    """
    sigmas = model.sigmas(sampler.steps)
    at = (sigmas[rows.step].float(), sigmas[rows.until].float(), sampler.kind, sampler.eta, sigmas[1].item())
    mean, std = transition(rows.x, rows.velocity, *at)
    zero, one = torch.zeros_like(rows.velocity), torch.ones_like(rows.velocity)
    slope = transition(rows.x, one, *at)[0] - transition(rows.x, zero, *at)[0]
    distance = (rows.x_next - mean).square().mean((1, 2, 3), keepdim=True)
    stretch = (1 + 2 * std**2 * ratio.log().reshape(-1, 1, 1, 1) / distance).sqrt()
    old_mean = rows.x_next + stretch * (mean - rows.x_next)
    return replace(rows, velocity=rows.velocity + (old_mean - mean) / slope)


def test_the_surrogate_is_clipped_at_its_own_two_ends_and_says_so(model):
    """Old policies made by hand: ratios 1.25, .65, 1.1 and .75 against a clip of [.7, 1.2]."""
    conditions, drawn = rollouts(model, batch=10)
    few = drawn.transitions[torch.tensor([0, 3, 6, 9])]
    ratio = torch.tensor([1.25, 0.65, 1.1, 0.75])
    old = drawn_by_another(model, few, ratio)
    config = Config(sampler=SAMPLER, loss=Loss(clip_low=0.3, clip_high=0.2))
    for sign, expected in ((1, [1.2, 0.65, 1.1, 0.75]), (-1, [1.25, 0.7, 1.1, 0.75])):
        loss = objective(config, model, replace(old, advantage=torch.full((4,), 2.0 * sign)), conditions)
        torch.testing.assert_close(loss.rows.detach(), -2.0 * sign * torch.tensor(expected), rtol=1e-4, atol=0)
        assert loss.metrics["clip_fraction"].tolist() == [1, 1, 0, 0]
        torch.testing.assert_close(loss.metrics["ratio/mean"], ratio, rtol=1e-4, atol=0)
        torch.testing.assert_close(loss.metrics["approx_kl"], ratio.log().square() / 2, rtol=1e-3, atol=0)


def test_the_pull_to_the_base_is_flow_grpos_and_has_a_gradient(moved_policy):
    model = moved_policy
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
    torch.testing.assert_close(loss.metrics["kl"].double(), by_hand.detach(), rtol=1e-3, atol=0)
    weights = list(model.trainable.values())
    pull = torch.autograd.grad(loss.rows.sum(), weights)  # no row has an advantage here
    for ours, theirs in zip(pull, torch.autograd.grad(0.5 * by_hand.sum(), weights), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-2)
    assert max(g.abs().max() for g in pull) > 3e-4


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps", "ddim", "dpm_sde"])
def test_the_weight_of_the_pull_follows_the_samplers_own_noise(kind, moved_policy):
    """Flow-GRPO divides by 2 std_dev^2: g without sqrt(h) for an SDE, the whole noise for the others."""
    model = moved_policy
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
    fresh = s_next * (1 - ((1 - s) * s_next / (s * (1 - s_next))) ** 2) ** 0.5
    std_dev = {
        "flow_sde": 0.7 * (s / (1 - s)) ** 0.5,
        "dance_sde": 0.7,
        "cps": s_next * np.sin(0.7 * np.pi / 2),
        "ddim": 0.7 * fresh,
        "dpm_sde": fresh,
    }[kind]
    expected = (means[0] - means[1]).square().mean().item() / (2 * std_dev**2)
    assert loss.metrics["kl"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("most", [1, 4, 7, 16, 96])
def test_no_forward_holds_more_than_a_micro_batch_and_those_of_a_step_are_alike(model, monkeypatch, most):
    held, predict = {}, model.predict

    def counting(x, sigma, *others):
        held.setdefault(sigma.item(), []).append(len(x))
        return predict(x, sigma, *others)

    monkeypatch.setattr(model, "predict", counting)
    rollouts(model, most)
    assert len(held) == 6
    for sizes in held.values():
        assert sum(sizes) == 10
        assert len(sizes) == -(-10 // most)  # as few as can be
        assert max(sizes) <= most
        assert max(sizes) - min(sizes) <= 1


# ---------------------------------------------------------------- the trunk


def random_plan(seed, steps=6, most=20):
    rng = np.random.default_rng(seed)
    explored = np.zeros((3, steps), bool)
    for row in explored:
        row[rng.choice(steps - 1, rng.integers(1, steps), replace=False)] = True
    return Plan(torch.from_numpy(rng.integers(2, most, 3)), torch.from_numpy(explored), alike(explored))


@pytest.mark.parametrize(("seed", "batch"), [(3, 5), (4, 96), (7, 96)])  # 0 to 4 riders, that leave at step 0 to 2
@pytest.mark.parametrize("kind", ["cps", "ode"])
def test_a_plan_costs_its_closed_form_and_no_prefix_twice(model, seed, batch, kind):
    """n N for rollouts on their own; with a trunk, N a prompt, and N - first - 1 for each rollout that branches off."""
    chosen, steps = random_plan(seed), 6
    own, shared = settings(Sampler(steps=6, kind=kind), batch), settings(Sampler(steps=6, shared_noise=True), batch)
    conditions = model.encode([prompt.text for prompt in PROMPTS])
    count, first = chosen.rollouts.tolist(), [row.tolist().index(True) for row in chosen.explored]

    def cost(config, probed):
        memory, before = Memory(), model.forwards
        probe(model, PROMPTS, conditions, config, 0, memory)  # fills the memory: the base is free from here on
        assert model.forwards - before == 2 * 3 * steps
        before, trunk = model.forwards, None
        if probed:
            _, trunk = probe(model, PROMPTS, conditions, config, 0, memory)
        elif config.sampler.shared_noise:
            trunk = shared_trunk(model, PROMPTS, conditions, chosen, config, 0, 0)
        done = []
        rows = collect(model, PROMPTS, conditions, chosen, config, 0, trunk, done.append).transitions
        assert sum(done) == sum(count) * steps
        revisited = len(rows) if config.sampler.kind == "ode" else 0
        return model.forwards - before - revisited

    assert cost(own, probed=False) == sum(count) * steps
    if kind == "ode":  # the probe is each prompt's first rollout
        assert cost(own, probed=True) == sum(count) * steps
        return
    left = [steps - f - 1 for f in first]
    riders = [{0: 1, 1: 1, 2: 2, 3: 3, 4: 4}[n // 4] for n in count]
    assert cost(own, probed=True) == 3 * steps + sum(
        (n - ride) * steps + ride * rest for n, ride, rest in zip(count, riders, left, strict=True)
    )
    branches = sum(n * rest for n, rest in zip(count, left, strict=True))
    assert cost(shared, probed=True) == 3 * steps + branches
    assert cost(shared, probed=False) == sum(f + 1 for f in first) + branches


def alone(model, conditions, chosen, config, prompt, number, start):
    """One rollout from its first latent to its last, in a batch of one, as if there were no trunk."""
    sigmas, x, rows = model.sigmas(6), start[None], []
    for step in range(6):
        s, s_next = sigmas[step].item(), sigmas[step + 1].item()
        with torch.no_grad():
            v = model.predict(x, sigmas[step], conditions, torch.tensor([prompt]), config.sampler.guidance)
        if chosen.explored[prompt, step]:
            mean, std = transition(x, v, s, s_next, config.sampler.kind, config.sampler.eta, sigmas[1].item())
            after = mean + std * noise((4, 8, 8), 0, 0, 3, PROMPTS[prompt].id, number, step + 1)
            rows.append((x[0], after[0]))
            x = after
        else:
            x, _ = transition(x, v, s, s_next, "ode", 0.0)
    return x, rows


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("probed", [False, True], ids=["walked", "probed"])
@pytest.mark.parametrize(("batch", "tolerance"), [(1, 0.0), (7, 1e-5)], ids=["same-shape", "another-shape"])
def test_rollouts_off_a_shared_trunk_are_those_computed_one_by_one(model, batch, tolerance, probed, guidance):
    """To the bit where each forward holds one latent in both, and to 1e-5 in other batches."""
    config = settings(Sampler(steps=6, kind="cps", eta=0.6, shared_noise=True, guidance=guidance), batch)
    conditions = model.encode([prompt.text for prompt in PROMPTS])
    chosen = plan()
    if probed:
        _, trunk = probe(model, PROMPTS, conditions, config, 0, Memory())
    else:
        trunk = shared_trunk(model, PROMPTS, conditions, chosen, config, 0, 0)
    drawn = collect(model, PROMPTS, conditions, chosen, config, 3, trunk)
    rows = drawn.transitions
    names = [(p, i) for p, count in enumerate(chosen.rollouts.tolist()) for i in range(count)]
    for rollout, (prompt, number) in enumerate(names):
        start = noise((4, 8, 8), 1, 0, PROMPTS[prompt].id, 0)
        clean, expected = alone(model, conditions, chosen, config, prompt, number, start)
        mine = (rows.rollout == rollout).nonzero().flatten()
        assert rows.step[mine].tolist() == chosen.explored[prompt].nonzero().flatten().tolist()
        for row, (x, x_next) in zip(mine, expected, strict=True):
            torch.testing.assert_close(rows.x[row], x, atol=tolerance, rtol=tolerance)
            torch.testing.assert_close(rows.x_next[row], x_next, atol=tolerance, rtol=tolerance)
        image = model.decode(clean)[0].astype(int)
        assert np.abs(image - drawn.images[rollout]).max() <= (tolerance > 0)


# ---------------------------------------------------------------- trees, single branches, merged and fewer steps


def family(layer, batch=10, steps=6):
    """Settings of a variant, with its name's own choices."""
    return resolve({"algorithm": "aegpo", "sampler": {"steps": steps}, "optimizer": {"micro_batch": batch}}, layer)


def branched(model, config, chosen, trunk="walked"):
    conditions = model.encode([prompt.text for prompt in PROMPTS])
    if trunk == "probed":
        _, walked = probe(model, PROMPTS, conditions, config, 0, Memory())
    else:
        walked = shared_trunk(model, PROMPTS, conditions, chosen, config, 3, 0)
    before = model.forwards
    drawn = collect(model, PROMPTS, conditions, chosen, config, 3, walked)
    return conditions, drawn, model.forwards - before


TREE = {"algorithm": "branch-grpo", "exploration": {"k": 2}}


@pytest.mark.parametrize(("batch", "tolerance"), [(1, 0.0), (7, 1e-4)], ids=["same-shape", "another-shape"])
def test_a_tree_is_its_leaves_drawn_one_by_one_and_no_node_twice(model, batch, tolerance):
    """Every leaf from the shared first noise on, with the noise of the node it lies under at each step."""
    config = family(TREE, batch)
    explored = torch.zeros(3, 6, dtype=torch.bool)
    explored[0, [0, 2]] = explored[1, [1, 3]] = explored[2, [2, 4]] = True
    chosen = Plan(torch.tensor([2, 5, 3]), explored, alike(explored))
    conditions, drawn, cost = branched(model, config, chosen)
    node = drawn.courses.node
    assert cost == sum(len(node[:, t].unique()) for t in range(1, 6))  # the root's evaluation is the trunk's
    sigmas, rows = model.sigmas(6), drawn.transitions
    names = [(p, i) for p, count in enumerate(chosen.rollouts.tolist()) for i in range(count)]
    seen = set()
    for leaf, (prompt, _) in enumerate(names):
        x = noise((4, 8, 8), 1, 0, PROMPTS[prompt].id, 0)[None]
        for t in range(6):
            at = (x, None, sigmas[t].item(), sigmas[t + 1].item())
            with torch.no_grad():
                v = model.predict(x, sigmas[t], conditions, torch.tensor([prompt]), 1.0)
            if t == 5:
                x, _ = transition(x, v, *at[2:], "ode", 0.0)
                break
            mean, std = transition(x, v, *at[2:], "dance_sde", 0.3)
            owner = node[leaf, t + 1].item()
            after = mean + std * noise((4, 8, 8), 0, 0, 3, PROMPTS[prompt].id, names[owner][1], t + 1)
            row = ((rows.rollout == owner) & (rows.step == t)).nonzero().flatten()
            assert len(row) == 1  # one row for an edge, whoever passes there
            seen.add((owner, t))
            for mine, theirs in ((rows.x, x), (rows.x_next, after), (rows.velocity, v)):
                torch.testing.assert_close(mine[row], theirs, atol=tolerance, rtol=tolerance)
            x = after
        assert np.abs(model.decode(x)[0].astype(int) - drawn.images[leaf]).max() <= (tolerance > 0)
    assert len(rows) == len(seen)


@pytest.mark.parametrize(
    "layer",
    [
        {"algorithm": "flow-grpo"},
        {"algorithm": "branch-grpo", "exploration": {"min_distance": 1}},
        {"algorithm": "tempflow-grpo"},
        {"algorithm": "aegpo", "optimizer": {"keep_graphs": True}},
        {"algorithm": "awm", "exploration": {"rule": "entropy_peaks", "k": 2}},
        {"algorithm": "dgpo"},
    ],
    ids=["noise", "tree", "branches", "kept", "matching", "groups"],
)
def test_in_parts_the_same_rollouts_are_drawn_and_told_of_in_order(model, layer):
    config = family(layer, 4)
    chosen = Plan(torch.tensor([2, 5, 3]), random_plan(1).explored[:3], random_plan(1).weight[:3])
    conditions = model.encode([prompt.text for prompt in PROMPTS])
    told, done = [], []
    given = model, PROMPTS, conditions, chosen, config, 3
    trunk = shared_trunk(model, PROMPTS, conditions, chosen, config, 3, 0) if config.sampler.shared_noise else None
    whole = collect(*given, trunk)
    before = model.forwards
    parts = collect(*given, trunk, done.append, parts=8, finished=lambda *part: told.append(part))
    assert model.forwards > before and sum(done) == 10 * config.sampler.steps
    assert [places.tolist() for _, places in told] == [[0, 1, 2, 3, 4, 5, 6], [7, 8, 9]]  # whole prompts, four at least
    assert (np.concatenate([images for images, _ in told]) == parts.images).all()
    assert np.abs(parts.images.astype(int) - whole.images).max() <= 1
    for name, values in vars(parts.transitions).items():
        other = getattr(whole.transitions, name)
        if name == "graph":  # numbered part by part
            predicted = torch.cat(parts.kept) if parts.kept else parts.transitions.velocity
            used = values >= 0
            assert torch.equal(used, other >= 0)
            torch.testing.assert_close(predicted[values[used]].detach(), parts.transitions.velocity[used])
        elif values.is_floating_point():
            torch.testing.assert_close(values, other, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(values, other), name


def test_branchgrpos_tree_costs_its_203_evaluations_here_too(model):
    config = family({"algorithm": "branch-grpo", "exploration": {"min_distance": 3}}, 96, steps=20)
    explored = torch.zeros(1, 20, dtype=torch.bool)
    explored[0, [0, 3, 6, 9]] = True
    chosen = Plan(torch.tensor([16]), explored, alike(explored))
    conditions = model.encode([PROMPTS[0].text])
    before = model.forwards
    trunk = shared_trunk(model, PROMPTS[:1], conditions, chosen, config, 0, 0)
    drawn = collect(model, PROMPTS[:1], conditions, chosen, config, 0, trunk)
    assert model.forwards - before == 203
    assert len(drawn.transitions) == 218 - 16
    advantage, taught = credit(config, torch.arange(16.0), drawn.group, drawn.courses)
    assert taught.all(1).sum() == 0 and len(drawn.transitions.judged(advantage, taught)) == 202


@pytest.mark.parametrize("trunk", ["walked", "probed"])
def test_single_branches_leave_the_trunk_at_their_own_step(model, trunk):
    """TempFlow-GRPO: the trunk to the step, one noisy step, ODE from there."""
    config = family({"algorithm": "tempflow-grpo"})
    explored = torch.zeros(3, 6, dtype=torch.bool)
    explored[:, [1, 4]] = True
    chosen = Plan(torch.tensor([4, 5, 2]), explored, alike(explored))
    conditions, drawn, cost = branched(model, config, chosen, trunk)
    rows = drawn.transitions
    step = dict(zip(rows.rollout.tolist(), rows.step.tolist(), strict=True))
    assert sorted(step) == list(range(11))
    assert [[step[i] for i in part].count(1) for part in ((0, 1, 2, 3), (4, 5, 6, 7, 8))] in ([2, 3], [2, 2])
    assert step[9] == step[10]  # two rollouts explore one step, lest each be alone
    assert cost == sum(6 - step[i] - 1 for i in range(11))
    for i in (0, 3, 4):
        prompt, number = ((0, 0), (0, 3), (1, 0))[(0, 3, 4).index(i)]
        own = torch.zeros_like(explored)
        own[prompt, step[i]] = True
        start = noise((4, 8, 8), 1, 0, PROMPTS[prompt].id, 0)
        clean, expected = alone(
            model, conditions, Plan(chosen.rollouts, own, alike(own)), config, prompt, number, start
        )
        torch.testing.assert_close(rows.x_next[rows.rollout == i][0], expected[0][1], atol=1e-4, rtol=1e-4)
        assert np.abs(model.decode(clean)[0].astype(int) - drawn.images[i]).max() <= 1


def test_a_merged_step_jumps_and_its_density_is_that_of_the_noise_it_took(model):
    """One rollout by hand through steps 0, 1, 2 (to 4) and on; the row says where it landed, the loss believes it."""
    layer = {"algorithm": "flow-grpo", "exploration": {"merge": 0.9, "rule": "random", "k": 1}}
    config = family(layer)
    explored = torch.zeros(3, 6, dtype=torch.bool)
    explored[:, 2] = True
    chosen = Plan(torch.tensor([2, 2, 2]), explored, alike(explored))
    conditions = model.encode([prompt.text for prompt in PROMPTS])
    drawn = collect(model, PROMPTS, conditions, chosen, config, 3)
    sigmas, rows = model.sigmas(6), drawn.transitions
    lands = drawn.courses.lands[0].tolist()
    assert lands[2] > 3 and rows.until.tolist() == [lands[2]] * 6
    x, at = noise((4, 8, 8), 0, 0, 3, 4, 1, 0)[None], 0
    while at < 6:
        to = lands[at]
        with torch.no_grad():
            v = model.predict(x, sigmas[at], conditions, torch.tensor([0]), 1.0)
        kind = "flow_sde" if at == 2 else "ode"
        mean, std = transition(x, v, sigmas[at].item(), sigmas[to].item(), kind, 0.7, sigmas[1].item())
        x = mean + std * noise((4, 8, 8), 0, 0, 3, 4, 1, at + 1) if at == 2 else mean
        at = to
    assert np.abs(model.decode(x)[0].astype(int) - drawn.images[1]).max() <= 1
    kind, where = ("flow_sde", 0.7), (sigmas[2].item(), sigmas[lands[2]].item())
    mean, std = transition(rows.x, rows.velocity, *where, *kind, sigmas[1].item())
    keys = [(3, prompt.id, i) for prompt in PROMPTS for i in range(2)]
    z = torch.stack([noise((4, 8, 8), 0, 0, *key, 3) for key in keys])
    torch.testing.assert_close((rows.x_next - mean) / std, z, atol=1e-5, rtol=1e-5)
    assert first_error(objective(config, model, rows, conditions)) < 1e-6
    moved = 0.01 * torch.randn(rows.x.shape, generator=torch.Generator().manual_seed(1))
    rows = replace(rows, advantage=-torch.ones(6), velocity=rows.velocity + moved)  # as if drawn by another policy
    old, _ = transition(rows.x, rows.velocity, *where, *kind, sigmas[1].item())
    normals = [torch.distributions.Normal(m, std.expand_as(m)) for m in (mean, old)]
    log_ratio = (normals[0].log_prob(rows.x_next) - normals[1].log_prob(rows.x_next)).mean((1, 2, 3))
    found = objective(config, model, rows, conditions).metrics["ratio/mean"]
    assert (found - 1).abs().max() > 1e-4
    torch.testing.assert_close(found, log_ratio.exp(), atol=2e-6, rtol=0)


def test_after_the_window_a_rollout_is_the_second_order_solvers(model):
    """MixGRPO-Flash by hand: a noisy step, then DPM-Solver++ 2M over the points that are left, order 1 at its ends."""
    layer = {"algorithm": "mix-grpo-flash", "exploration": {"rule": "window", "k": 1, "moves": "none"}}
    config = family({**layer, "sampler": {"compress": 0.8}}, batch=1, steps=8)
    explored = torch.zeros(3, 8, dtype=torch.bool)
    explored[:, 1] = True
    conditions, drawn, _ = branched(model, config, Plan(torch.tensor([1, 1, 1]), explored, alike(explored)))
    sigmas, sampler = model.sigmas(8), config.sampler
    path = [0, 1, 2, 3, 5, 6, 8]  # of the six steps after the window int(6 x .8), evenly: 2 + 6 i // 4
    assert [*(drawn.courses.lands[0] > 0).nonzero().flatten().tolist(), 8] == path
    x, clean, before = noise((4, 8, 8), 1, 0, 4, 0)[None], None, None
    for at, to in itertools.pairwise(path):
        with torch.no_grad():
            v = model.predict(x, sigmas[at], conditions, torch.tensor([0]), 1.0)
        s, s_next = sigmas[at].item(), sigmas[to].item()
        if at < 2:
            kind = sampler.kind if at == 1 else "ode"
            x, std = transition(x, v, s, s_next, kind, sampler.eta, sigmas[1].item())
            x = x + std * noise((4, 8, 8), 0, 0, 3, 4, 0, at + 1) if at == 1 else x
        else:
            x, clean = dpmpp_2m(x, v, s, s_next, clean, before)
            before = s
    assert np.abs(model.decode(x)[0].astype(int) - drawn.images[0]).max() <= 1
    euler = branched(
        model,
        replace(config, sampler=replace(sampler, solver="euler")),
        Plan(torch.tensor([1, 1, 1]), explored, alike(explored)),
    )[1]
    assert np.abs(euler.images[0].astype(int) - drawn.images[0]).max() > 3


@pytest.mark.parametrize("kind", ["flow_sde", "ode"])
def test_rows_weigh_what_the_plan_says_of_their_prompt_and_step(model, kind):
    weight = torch.arange(1.0, 19.0, dtype=torch.float64).reshape(3, 6)
    conditions = model.encode([prompt.text for prompt in PROMPTS])
    chosen = replace(plan(), weight=weight)
    rows = collect(model, PROMPTS, conditions, chosen, settings(Sampler(steps=6, kind=kind)), 3).transitions
    assert len(rows) == 2 * 2 + 5 * 3 + 3
    assert rows.weight.tolist() == weight[rows.prompt, rows.step].tolist()


def test_a_trunk_without_a_probe_starts_anew_at_each_visit(model):
    config = family({"algorithm": "tempflow-grpo"})
    chosen = Plan(torch.tensor([2, 2, 2]), torch.eye(6, dtype=torch.bool)[:3], torch.ones(3, 6, dtype=torch.float64))
    conditions = model.encode([prompt.text for prompt in PROMPTS])
    first = [shared_trunk(model, PROMPTS, conditions, chosen, config, 0, v).latents[:, 0] for v in (0, 1, 0)]
    assert torch.equal(first[0], first[2])
    assert (first[0] - first[1]).abs().flatten(1).max(1).values.min() > 0.5
    torch.testing.assert_close(first[1][1], noise((4, 8, 8), 1, 0, 9, 1))


def test_after_the_window_few_second_order_steps_end_where_many_would(model):
    """MixGRPO-Flash: seven steps after the window end nearer to 24 of Euler's than seven of Euler's do."""
    layer = {"algorithm": "mix-grpo-flash", "exploration": {"rule": "window", "k": 2, "moves": "none"}}
    explored = torch.zeros(3, 26, dtype=torch.bool)
    explored[:, [0, 1]] = True
    chosen = Plan(torch.tensor([2, 2, 2]), explored, alike(explored))
    images, costs = {}, {}
    for name, sampler in (
        ("all", {"solver": "euler", "compress": 1.0}),
        ("few", {"solver": "euler", "compress": 0.3}),
        ("flash", {"solver": "dpm2m", "compress": 0.3}),
    ):
        config = family({**layer, "sampler": {"steps": 26, "kind": "cps", "eta": 0.3} | sampler}, 96, steps=26)
        _, drawn, costs[name] = branched(model, config, chosen)
        images[name] = drawn.images.astype(float)
    assert costs == {"all": 6 * 25, "few": 6 * (1 + 7), "flash": 6 * (1 + 7)}
    far, near = (np.abs(images[name] - images["all"]).mean() for name in ("few", "flash"))
    assert 0 < near < 0.7 * far


@pytest.mark.parametrize("kind", ["dgpo", "dpo"])
def test_what_is_compared_is_brought_back_by_one_noise(model, kind):
    """x - (1 - s) x0 is s e: the same for all of a group at one level, and another for another prompt or level."""
    name = {"dgpo": "dgpo", "dpo": "online-dpo"}[kind]
    conditions = model.encode([prompt.text for prompt in PROMPTS])
    drawn = collect(model, PROMPTS, conditions, plan(), family({"algorithm": name}), 3)
    rows, sigmas = drawn.transitions, model.sigmas(6).float()
    s = sigmas[rows.step].reshape(-1, 1, 1, 1)
    e = (rows.x - (1 - s) * rows.x_next) / s
    firsts = []
    for unit in rows.unit.unique():
        here = (rows.unit == unit).nonzero().flatten()
        assert len(rows.prompt[here].unique()) == len(rows.step[here].unique()) == 1
        assert len(here) == drawn.group.bincount()[rows.prompt[here[0]]]
        torch.testing.assert_close(e[here], e[here[:1]].expand(len(here), -1, -1, -1), atol=1e-4, rtol=1e-4)
        firsts.append(e[here[0]])
    assert all((a - b).abs().max() > 0.1 for i, a in enumerate(firsts) for b in firsts[:i])


def test_credit_on_a_tree_by_hand():
    """Five leaves of one prompt, parting at steps 0 and 2, and two of another: each edge beside its depth's others."""
    config = family(TREE | {"advantage": {"std": "none", "best_of": 0}})
    explored = torch.zeros(2, 6, dtype=torch.bool)
    explored[:, [0, 2]] = True
    chosen = Plan(torch.tensor([4, 2]), explored, alike(explored))
    courses = lay_out(chosen, config, PROMPTS[:2], torch.linspace(1, 0, 7, dtype=torch.float64), 0)
    assert courses.node[:4, 1].tolist() == [0, 0, 2, 2] and courses.node[:4, 3].tolist() == [0, 1, 2, 3]
    scores = torch.tensor([1.0, 2, 3, 6, 5, 7])
    advantage, taught = credit(config, scores, chosen.group, courses)
    early, late = [-1.5, -1.5, 1.5, 1.5, -1, 1], [-2, -1, 0, 3, -1, 1]
    expected = torch.tensor([early, early, late, late, late, [0] * 6]).T.float()
    torch.testing.assert_close(advantage, expected)
    assert torch.equal(taught, courses.trained)
    few = replace(config, advantage=replace(config.advantage, best_of=2))
    same, taught = credit(few, scores, chosen.group, courses)
    assert torch.equal(same, advantage)
    # the best and the worst leaf of the first tree are 3 and 0; both its early edges lead to one of them
    assert taught[:4, 0].tolist() == [True] * 4 and taught[:4, 3].tolist() == [True, False, False, True]
    assert taught[4:, :5].all() and not taught[:, 5].any()


@pytest.mark.parametrize("sampler", [SAMPLER, AWM], ids=["sde", "matching"])
def test_with_noises_of_their_own_a_quarter_of_a_group_is_on_the_trunk(model, sampler):
    conditions = model.encode([prompt.text for prompt in PROMPTS])
    config, chosen = settings(sampler), plan((2, 12, 7))
    _, trunk = probe(model, PROMPTS, conditions, config, 0, Memory())
    on, off = (collect(model, PROMPTS, conditions, chosen, config, 3, t) for t in (trunk, None))
    firsts = {0: (0, 0), 2: (1, 0), 3: (1, 1), 4: (1, 2), 14: (2, 0)}
    if sampler is AWM:  # two would be one image
        del firsts[3], firsts[4]
    others = [i for i in range(21) if i not in firsts]
    assert np.abs(on.images[others].astype(int) - off.images[others]).max() <= 1
    for rollout, (prompt, number) in firsts.items():
        assert (on.images[rollout] != off.images[rollout]).any()
        if sampler is AWM:  # the trunk is that rollout
            clean = trunk.latents[prompt, -1][None]
        else:  # it explores by noise of its own from there
            start = noise((4, 8, 8), 1, 0, PROMPTS[prompt].id, 0)
            clean, _ = alone(model, conditions, chosen, config, prompt, number, start)
        assert np.abs(model.decode(clean)[0].astype(int) - on.images[rollout]).max() <= 1


def test_evaluation_pictures_are_always_the_same(model):
    one = draw(model, PROMPTS, settings(batch=6))
    other = draw(model, PROMPTS[::-1], settings(batch=4))
    assert np.abs(one.astype(int) - other.reshape(3, 2, 32, 32, 3)[::-1].reshape(6, 32, 32, 3)).max() <= 1
    assert not (one[0] == one[1]).all()


def test_a_trajectory_ends_where_it_is_told_to(model):
    x = noise((3, 4, 8, 8), 5)
    conditions = model.encode(["a ring", "a cross", "a red ring"])
    whole = denoise(model, x, conditions, torch.arange(3), SAMPLER)
    before = model.forwards
    cut = denoise(model, x, conditions, torch.arange(3), SAMPLER, torch.tensor([1, 6, 3]))
    assert model.forwards - before == 10
    for i, steps in enumerate((1, 6, 3)):
        torch.testing.assert_close(cut.latents[i, : steps + 1], whole.latents[i, : steps + 1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(cut.velocities[i, :steps], whole.velocities[i, :steps], atol=1e-5, rtol=1e-5)
        assert not cut.velocities[i, steps:].any()


def test_denoise_is_deterministic(model):
    x = noise((2, 4, 8, 8), 5)
    conditions = model.encode(["a ring", "a ring"])
    first = denoise(model, x, conditions, torch.arange(2), SAMPLER).latents
    assert torch.equal(first, denoise(model, x, conditions, torch.arange(2), SAMPLER).latents)


@pytest.mark.parametrize("probed", [False, True], ids=["own", "trunk"])
def test_second_order_rollouts_without_noise_are_the_solver_step_by_step(model, probed):
    """The finished latents that rows hold, by hand; the first of a prompt's rollouts is the probe's own trajectory."""
    sampler = Sampler(steps=6, kind="ode", solver="dpm2m")
    config = resolve({"algorithm": "aegpo-fast", "sampler": {"steps": 6}, "optimizer": {"micro_batch": 10}})
    assert (config.sampler.kind, config.sampler.solver) == ("ode", "dpm2m")
    conditions, trunk = model.encode([prompt.text for prompt in PROMPTS]), None
    if probed:
        trunk = probe(model, PROMPTS, conditions, config, 0, Memory())[1]
    drawn = collect(model, PROMPTS, conditions, plan(), config, 3, trunk)
    sigmas = model.sigmas(6).tolist()
    for i, (prompt, number) in enumerate((p, n) for p, count in enumerate((2, 5, 3)) for n in range(count)):
        on_trunk = probed and number == 0
        key = (1, 0, PROMPTS[prompt].id, 0) if on_trunk else (0, 0, 3, PROMPTS[prompt].id, number, 0)
        x, clean, before = noise((4, 8, 8), *key)[None], None, None
        for at in range(6):
            with torch.no_grad():
                v = model.predict(x, torch.tensor(sigmas[at]), conditions, torch.tensor([prompt]), 1.0)
            x, clean = dpmpp_2m(x, v, sigmas[at], sigmas[at + 1], clean, before)
            before = sigmas[at]
        own = drawn.transitions.rollout == i
        assert own.any()
        for latent in drawn.transitions.x_next[own]:
            torch.testing.assert_close(latent, x[0], atol=2e-4, rtol=1e-4)
    euler = collect(model, PROMPTS, conditions, plan(), replace(config, sampler=replace(sampler, solver="euler")), 3)
    assert (euler.transitions.x_next - drawn.transitions.x_next).abs().max() > 0.05


def test_evaluations_take_their_own_number_of_eulers_steps(model):
    own = settings(Sampler(steps=9), batch=6)
    fewer = replace(settings(Sampler(steps=4, kind="ode", solver="dpm2m"), batch=6), eval_steps=9)
    assert np.array_equal(draw(model, PROMPTS, own), draw(model, PROMPTS, fewer))
    assert not np.array_equal(draw(model, PROMPTS, own), draw(model, PROMPTS, replace(fewer, eval_steps=0)))
