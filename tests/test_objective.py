"""Every loss by name, on rows of the real model, against its formula written out again."""

from dataclasses import replace

import pytest
import torch

from aegpo.config import Advantage, Config, Loss, Sampler, resolve
from aegpo.math.transitions import transition
from aegpo.objective import objective
from aegpo.train import deal
from aegpo.types import Transitions

COUNT = 12
ADVANTAGE = torch.tensor([1.0, -1, 0.5, -2, 1.5, -0.5, 2, -1.5, 0.3, -0.3, 1, -1])


def normal(seed):
    return torch.randn(COUNT, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def policy(moved_policy):
    """A policy that has moved from its base, and its encoded prompts."""
    return moved_policy, moved_policy.encode(["a ring", "a red cross"])


def make_rows(model, conditions, sampler):
    """Rows of a policy that differs a little from the present one, at all noise levels."""
    step = torch.arange(COUNT) % 9
    matching = sampler.kind == "ode"
    sigmas = model.sigmas(10).float()
    until = torch.full_like(step, 10) if matching else step + 1
    clean, noise, prompt = normal(0), normal(1), torch.arange(COUNT) % 2
    s = sigmas[step].reshape(-1, 1, 1, 1)
    x = (1 - s) * clean + s * noise
    with torch.no_grad():
        v = model.predict(x, sigmas[step], conditions, prompt, sampler.guidance)
    velocity = v + 0.02 * normal(2)
    x_next = clean
    if not matching:
        mean, std = transition(
            x, velocity, sigmas[step], sigmas[until], sampler.kind, sampler.eta, model.sigmas(10)[1].item()
        )
        x_next = mean + std * noise
    return Transitions(
        x=x,
        x_next=x_next,
        step=step,
        until=until,
        prompt=prompt,
        rollout=torch.arange(COUNT),
        velocity=velocity,
        weight=torch.ones(COUNT),
        advantage=ADVANTAGE,
        unit=torch.tensor([0, 0, 1, 1, 1, 1, 7, 7, 0, 0, 1, 7]),
        graph=torch.full((COUNT,), -1),
    )


def predictions(model, conditions, rows):
    sigma = model.sigmas(10)[rows.step].float()
    v = model.predict(rows.x, sigma, conditions, rows.prompt, 1.0)
    with torch.no_grad(), model.reference():
        v_ref = model.predict(rows.x, sigma, conditions, rows.prompt, 1.0)
    return v, v_ref, sigma


def gradient(loss, model):
    found = torch.autograd.grad(loss, list(model.trainable.values()), allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def mean_square(a):
    return a.square().mean((1, 2, 3))


def by_hand(kind, rows, v, v_ref, sigma, beta):
    """The rows' losses, written from the papers' formulas."""
    s, target = sigma.reshape(-1, 1, 1, 1), (rows.x - rows.x_next) / sigma.reshape(-1, 1, 1, 1)
    a, old = rows.advantage, rows.velocity
    match kind:
        case "nft":
            r = (a / 5).clamp(-1, 1) / 2 + 0.5
            parts = []
            for u in (beta * v + (1 - beta) * old, (1 + beta) * old - beta * v):
                off = rows.x - s * u - rows.x_next
                parts.append(mean_square(off) / off.detach().abs().mean((1, 2, 3)).clamp(min=1e-5))
            return 5 * (r * parts[0] + (1 - r) * parts[1]) / beta
        case "ram":
            return mean_square(v - (v_ref + beta * a.reshape(-1, 1, 1, 1) * (target - v)).detach())
        case "dgpo":
            d, d_ref, loss = mean_square(v - target), mean_square(v_ref - target), torch.zeros(COUNT)
            for unit in rows.unit.unique():
                here = rows.unit == unit
                total = (a[here] * beta * (d - d_ref)[here]).sum() / here.sum()
                loss = loss.where(~here, total.sigmoid().detach() * a * d)
            return loss
    raise AssertionError(kind)


@pytest.mark.parametrize(("kind", "beta"), [("nft", 1.0), ("nft", 0.3), ("ram", 4.0), ("dgpo", 30.0)])
@pytest.mark.parametrize("kl", [0.0, 0.2])
def test_losses_of_finished_images_are_their_papers(policy, kind, beta, kl):
    model, conditions = policy
    sampler = Sampler(kind="ode")
    rows = replace(make_rows(model, conditions, sampler), weight=torch.linspace(0.5, 2, COUNT))
    config = Config(sampler=sampler, loss=Loss(kind=kind, beta=beta, kl=kl))
    found = objective(config, model, rows, conditions)
    v, v_ref, sigma = predictions(model, conditions, rows)
    expected = rows.weight * (by_hand(kind, rows, v, v_ref, sigma, beta) + kl * mean_square(v - v_ref))
    torch.testing.assert_close(found.rows, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient(found.rows.sum(), model), gradient(expected.sum(), model), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.metrics["loss"], found.rows.detach())


def test_nft_takes_the_largest_advantage_for_entirely_good(policy):
    """Advantages cut at 2 and halved are to a clip of 1 what they were to 2: the same r, half the factor in front."""
    model, conditions = policy
    sampler = Sampler(kind="ode")
    rows = make_rows(model, conditions, sampler)

    def losses(rows, most):
        config = Config(sampler=sampler, loss=Loss(kind="nft"), advantage=Advantage(clip=most))
        return objective(config, model, rows, conditions).rows

    half = replace(rows, advantage=rows.advantage / 2)
    torch.testing.assert_close(losses(half, 1.0), losses(rows, 2.0) / 2)
    assert (losses(rows, 2.0) - losses(rows, 5.0)).abs().max() > 1e-3


def test_dpo_pairs_the_best_and_the_worst_of_each_unit_wherever_they_stand(policy):
    model, conditions = policy
    sampler = Sampler(kind="ode")
    rows = make_rows(model, conditions, sampler)[torch.tensor([7, 0, 3, 2, 6, 1])]
    rows = replace(rows, unit=torch.tensor([7, 3, 1, 1, 7, 3]))  # units 7: rows 0, 4; 3: rows 1, 5; 1: rows 2, 3
    config = Config(sampler=sampler, loss=Loss(kind="dpo", beta=5.0))
    found = objective(config, model, rows, conditions)
    v, v_ref, sigma = predictions(model, conditions, rows)
    target = (rows.x - rows.x_next) / sigma.reshape(-1, 1, 1, 1)
    moved = mean_square(v - target) - mean_square(v_ref - target)
    pairs = ((4, 0), (1, 5), (3, 2))  # by the signs of the advantages: 2 -1.5, 1 -1, .5 -2
    losses = [-torch.nn.functional.logsigmoid(-2.5 * (moved[best] - moved[worst])) for best, worst in pairs]
    torch.testing.assert_close(found.rows[[4, 1, 3]], torch.stack(losses), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.rows[[0, 5, 2]], found.rows[[4, 1, 3]])  # so the mean over rows is that over pairs
    torch.testing.assert_close(
        gradient(found.rows.mean(), model), gradient(torch.stack(losses).mean(), model), rtol=1e-3, atol=1e-5
    )


def noisy(model, conditions, **loss):
    sampler = Sampler()
    rows = make_rows(model, conditions, sampler)
    found = objective(Config(sampler=sampler, loss=Loss(**loss)), model, rows, conditions)
    v, v_ref, sigma = predictions(model, conditions, rows)
    sigmas = model.sigmas(10)
    at = (sigma, sigmas[rows.until].float(), "flow_sde", 0.7, sigmas[1].item())
    (mean, std), (old, _) = (transition(rows.x, u, *at) for u in (v, rows.velocity))
    normals = [torch.distributions.Normal(m, std.expand_as(m)) for m in (mean, old)]
    log_ratio = (normals[0].log_prob(rows.x_next) - normals[1].log_prob(rows.x_next)).mean((1, 2, 3))
    return found, rows, log_ratio, mean - old, std.reshape(COUNT), v, v_ref


def test_guards_ratio_is_the_noise_times_how_the_mean_moved(policy):
    """tau (l - l_old) + mean(d_mu^2) / (2 tau) is mean(z d_mu), z the noise that was drawn: nothing else is left."""
    model, conditions = policy
    found, rows, _, moved, std, *_ = noisy(model, conditions, kind="guard", clip_low=9, clip_high=9)
    z = normal(1)
    ratio = (z * moved).mean((1, 2, 3)).exp()
    torch.testing.assert_close(found.metrics["ratio/mean"], ratio.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.rows, -rows.advantage * ratio, rtol=1e-5, atol=1e-6)
    assert (ratio - 1).abs().max() > 1e-5 and std.min() > 0
    expected = gradient((-rows.advantage * ratio).sum(), model)
    torch.testing.assert_close(gradient(found.rows.sum(), model), expected, rtol=1e-3, atol=1e-5)
    assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("weight", ["noise", "step"])
def test_a_steps_weight_is_the_policys_and_not_the_pulls(policy, weight):
    """TempFlow-GRPO's std over the mean step's, GRPO-Guard's 1 / h; the pull to the base counts alike at all steps."""
    model, conditions = policy
    found, rows, log_ratio, _, std, *_ = noisy(
        model, conditions, kl=0.3, kl_of="velocity", weight=weight, clip_low=9, clip_high=9
    )
    sigmas = model.sigmas(10).float()
    s, s_next = sigmas[:9], sigmas[1:]
    noise = 0.7 * (s * (s - s_next[:9]) / (1 - s.where(s < 1, sigmas[1]))).sqrt()
    torch.testing.assert_close(std, noise[rows.step], rtol=1e-4, atol=0)
    expected = {"noise": std / noise.mean(), "step": 1 / (s - s_next[:9])[rows.step]}[weight]
    surrogate = -rows.advantage * log_ratio.exp()
    torch.testing.assert_close(found.rows, expected * surrogate + 0.3 * found.metrics["kl"], rtol=1e-4, atol=1e-5)
    assert expected.max() > 2 * expected.min()


def test_dppo_stops_only_what_moves_on_and_is_far_already(policy):
    model, conditions = policy
    _, rows, log_ratio, moved, std, *_ = noisy(model, conditions)
    divergence = mean_square(moved) / (2 * std**2)
    limit = divergence.median().item()
    found = noisy(model, conditions, kind="dppo", max_kl=limit)[0]
    stopped = (divergence >= limit) & (rows.advantage * log_ratio > 0)
    assert 0 < stopped.sum() < COUNT
    expected = (-rows.advantage * log_ratio.exp()).where(~stopped, 0.0)
    torch.testing.assert_close(found.rows, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient(found.rows.sum(), model), gradient(expected.sum(), model), rtol=1e-3, atol=1e-5)


def test_flow_cps_own_score_leaves_out_the_noise(policy):
    model, conditions = policy
    found, rows, _, moved, std, *_ = noisy(model, conditions, score="squared", clip_low=9, clip_high=9)
    z = normal(1)
    drift = std.reshape(-1, 1, 1, 1) * z
    log_ratio = mean_square(drift) - mean_square(drift - moved)  # -(x' - mean)^2 + (x' - old)^2
    torch.testing.assert_close(found.rows, -rows.advantage * log_ratio.exp(), rtol=1e-5, atol=1e-6)


def test_the_pull_may_be_of_the_velocity(policy):
    model, conditions = policy
    plain = noisy(model, conditions)[0]
    found, *_, v, v_ref = noisy(model, conditions, kl=0.4, kl_of="velocity")
    torch.testing.assert_close(found.rows - plain.rows, 0.4 * mean_square(v - v_ref), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("matching", ["uniform", "t", "t2", "huber", "ghuber"])
def test_the_matching_ratio_is_of_the_weighted_losses(policy, matching):
    model, conditions = policy
    sampler = Sampler(kind="ode")
    rows = make_rows(model, conditions, sampler)
    loss = Loss(clip_low=9, clip_high=9, matching=matching)
    found = objective(Config(sampler=sampler, loss=loss), model, rows, conditions)
    v, _, t = predictions(model, conditions, rows)
    target = (rows.x - rows.x_next) / t.reshape(-1, 1, 1, 1)

    def score(u):
        d = mean_square(u - target)
        powers = {"huber": (1 / 2, 1.0), "ghuber": (1 / 4, 4.0)}
        if matching in powers:
            p, over = powers[matching]
            return -t * ((d + 1e-10) ** p - 1e-10**p) * over
        return -d * t ** {"uniform": 0, "t": 1, "t2": 2}[matching]

    expected = -rows.advantage * (score(v) - score(rows.velocity)).exp()
    torch.testing.assert_close(found.rows, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- who is seen together


@pytest.mark.parametrize("most", [1, 3, 4, 7, 100])
@pytest.mark.parametrize("updates", [1, 2, 5])
def test_rows_of_a_unit_stay_together_and_every_row_is_dealt_once(most, updates):
    unit = torch.tensor([5, 5, 5, 5, 5, 2, 2, 9, 9, 9, 1, 4, 4, 4])
    dealt = deal(unit, updates, most, [1, 2, 3])
    assert len(dealt) == updates
    everything = torch.cat([micro for micros in dealt for micro in micros])
    assert everything.sort().values.tolist() == list(range(len(unit)))
    for micros in dealt:
        for micro in micros:
            for one in unit[micro].unique():
                assert (unit[micro] == one).sum() == (unit == one).sum()
            assert len(micro) <= most or len(unit[micro].unique()) == 1
    if updates == 1:
        order = [unit[micro].tolist() for micro in dealt[0]]
        assert order != [unit[micro].tolist() for micro in deal(unit, 1, most, [1, 2, 4])[0]]


@pytest.mark.parametrize("kind", ["dgpo", "dpo"])
def test_a_group_loss_does_not_depend_on_micro_batches(policy, kind):
    model, conditions = policy
    sampler = Sampler(kind="ode")
    rows = make_rows(model, conditions, sampler)
    if kind == "dpo":
        rows = replace(rows, unit=torch.arange(COUNT) // 2)
    config = resolve({"algorithm": {"dgpo": "dgpo", "dpo": "online-dpo"}[kind]})
    whole = gradient(objective(config, model, rows, conditions).rows.sum(), model)
    parts = torch.zeros_like(whole)
    micros = deal(rows.unit, 1, 4, [0])[0]
    assert len(micros) > 1
    for micro in micros:
        parts += gradient(objective(config, model, rows[micro], conditions).rows.sum(), model)
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["ram", "clip"])
def test_the_reference_may_be_guided_while_the_policy_is_not(policy, kind):
    """RAM's target and the pull in velocity with v_ref = v_0 + w (v_c - v_0) of the base, in value and gradient."""
    model, conditions = policy
    rows = make_rows(model, conditions, Sampler(kind="ode"))
    how = Loss(kind=kind, beta=0.5, kl=0.0 if kind == "ram" else 0.7, reference_guidance=2.5, clip_low=9, clip_high=9)
    before = model.forwards
    found = objective(Config(sampler=Sampler(kind="ode"), loss=how), model, rows, conditions)
    assert model.forwards - before == 3 * COUNT  # one of the policy, and a conditional and an empty one of the base
    v, v_ref, sigma = predictions(model, conditions, rows)
    with torch.no_grad(), model.reference():
        guided = model.predict(rows.x, sigma, conditions, rows.prompt, 2.5)
    assert (guided - v_ref).abs().max() > 0.05
    target, a = (rows.x - rows.x_next) / sigma.reshape(-1, 1, 1, 1), rows.advantage
    if kind == "ram":
        aim = (guided + 0.5 * a.reshape(-1, 1, 1, 1) * (target - v)).detach()
        expected = mean_square(v - aim)
    else:
        ratio = (mean_square(rows.velocity - target) - mean_square(v - target)).exp()
        expected = -a * ratio + 0.7 * mean_square(v - guided)
    torch.testing.assert_close(found.rows, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        gradient(found.rows.mean(), model), gradient(expected.mean(), model), rtol=1e-3, atol=1e-5
    )
