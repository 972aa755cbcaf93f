"""Transitions against worked numbers, closed forms, torch.distributions and diffusers."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch.distributions import Normal, kl_divergence

from aegpo.math.losses import clipped_surrogate
from aegpo.math.schedules import shifted_linear
from aegpo.math.transitions import gaussian_kl, log_prob, transition

KINDS = ("ode", "flow_sde", "dance_sde", "cps", "awm")
NOISY = ("flow_sde", "dance_sde", "cps", "awm")


def scalar(value: float) -> torch.Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


def step(kind: Any, eta: float, s: float = 0.5, s_next: float = 0.4, **settings: Any) -> tuple[torch.Tensor, ...]:
    """One step of the scalar x = 1, v = .5."""
    return transition(scalar(1.0), scalar(0.5), s, s_next, kind, eta, **settings)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(
    ("kind", "eta", "s", "s_next", "mean", "std"),
    [
        ("flow_sde", 0.7, 0.5, 0.4, 0.88875, 0.2213594),
        ("flow_sde", 0.7, 1.0, 0.9, 0.705, 0.7),
        ("dance_sde", 0.3, 0.5, 0.4, 0.93875, 0.0948683),
        ("dance_sde", 0.3, 1.0, 0.9, 0.9455, 0.3 * math.sqrt(0.1)),
        ("cps", 0.8, 0.5, 0.4, 0.6045085, 0.3804226),
        ("cps", 1.0, 0.5, 0.4, 0.45, 0.4),
        ("ode", 0.7, 0.5, 0.4, 0.95, 0.0),
        ("flow_sde", 0.0, 0.5, 0.4, 0.95, 0.0),
        ("dance_sde", 0.0, 0.5, 0.4, 0.95, 0.0),
        ("cps", 0.0, 0.5, 0.4, 0.95, 0.0),
    ],
)
def test_mean_and_std_are_the_worked_numbers(kind, eta, s, s_next, mean, std):
    got_mean, got_std = step(kind, eta, s, s_next, sigma_first=0.9)
    assert got_mean.item() == pytest.approx(mean, abs=1e-7)
    assert got_std.item() == pytest.approx(std, abs=1e-7)


@pytest.mark.parametrize(("kind", "eta", "expected"), [("flow_sde", 0.7, 0.4627375), ("dance_sde", 0.3, 1.2279067)])
def test_log_prob_is_the_worked_number(kind, eta, expected):
    mean, std = step(kind, eta)
    assert log_prob(scalar(1.0), mean, std).item() == pytest.approx(expected, abs=1e-7)


def test_log_prob_peaks_at_the_mean():
    mean, std = step("flow_sde", 0.7)
    assert log_prob(mean, mean, std).item() == pytest.approx(0.5890290, abs=1e-7)


def test_squared_distance_score_of_flow_cps_is_a_choice_of_std():
    mean, _ = step("cps", 0.8)
    std = scalar(0.5).sqrt()
    score = log_prob(scalar(1.0), mean, std) - log_prob(mean, mean, std)
    assert score.item() == pytest.approx(-0.1564135, abs=1e-7)


def test_first_flow_sde_step_has_std_eta_and_a_closed_form_mean():
    x, v = randn(2, 3), randn(2, 3, seed=1)
    for first in (0.3, 0.9, 0.96, 0.999):
        mean, std = transition(x, v, 1.0, first, "flow_sde", 0.8, sigma_first=first)
        torch.testing.assert_close(std, torch.full_like(std, 0.8))
        torch.testing.assert_close(mean, (1 - 0.8**2 / 2) * x - (1 - first) * v)


def test_first_flow_sde_step_takes_its_coefficient_from_sigma_first_even_if_it_goes_elsewhere():
    mean, std = step("flow_sde", 0.7, 1.0, 0.75, sigma_first=0.9)
    assert std.item() == pytest.approx(2.2135944 * math.sqrt(0.25), abs=1e-6)
    assert mean.item() == pytest.approx(0.25 * 0.5 + (0.75 - 2.2135944**2 * 0.25 / 2) * 1.0, abs=1e-6)


def test_sigma_first_changes_nothing_below_one():
    assert step("flow_sde", 0.7, sigma_first=0.9) == step("flow_sde", 0.7)


def test_flow_sde_from_one_needs_sigma_first():
    x, sigmas, after = randn(2, 3), torch.tensor([0.5, 1.0]), torch.tensor([0.4, 0.9])
    with pytest.raises(ValueError, match="sigma_first") as error:
        transition(x, x, sigmas, after, "flow_sde", 0.7)
    assert "\n" not in str(error.value)
    for kind in ("ode", "dance_sde", "cps"):
        assert transition(x, x, sigmas, after, kind, 0.7)[0].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_derivative_by_the_velocity_is_the_table(kind):
    levels = torch.rand(20, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 0.9 + 0.05
    for s_next, s in levels.sort(dim=1).values.tolist():
        v = scalar(-0.4).requires_grad_()
        mean, _ = transition(scalar(1.3), v, s, s_next, kind, 0.6)
        (slope,) = torch.autograd.grad(mean, v)
        h = s - s_next
        expected = {
            "ode": -h,
            "flow_sde": -h * (1 + 0.6**2 / 2),
            "dance_sde": -h * (1 + 0.6**2 * (1 - s) / (2 * s)),
            "cps": -s * (1 - s_next) + (1 - s) * s_next * math.cos(0.3 * math.pi),
            "awm": -s,
        }[kind]
        assert slope.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_at_different_steps_equal_the_rows_alone(kind):
    x, v = randn(5, 2, 3, 3), randn(5, 2, 3, 3, seed=1)
    schedule = shifted_linear(6, 3.0)
    at = torch.tensor([3, 0, 4, 0, 1])
    mean, std = transition(x, v, schedule[at], schedule[at + 1], kind, 0.7, sigma_first=schedule[1].item())
    for row, i in enumerate(at.tolist()):
        s, s_next, first = schedule[i].item(), schedule[i + 1].item(), schedule[1].item()
        alone, alone_std = transition(x[row : row + 1], v[row : row + 1], s, s_next, kind, 0.7, sigma_first=first)
        torch.testing.assert_close(mean[row : row + 1], alone, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(std.expand_as(x)[row : row + 1], alone_std.expand_as(alone), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_widened_before_the_arithmetic(kind):
    x, v = randn(2, 4).bfloat16(), randn(2, 4, seed=1).bfloat16()
    mean, std = transition(x, v, 0.5, 0.4, kind, 0.7)
    wide, wide_std = transition(x.double(), v.double(), 0.5, 0.4, kind, 0.7)
    assert mean.dtype == std.dtype == torch.float32
    assert wide.dtype == wide_std.dtype == torch.float64
    torch.testing.assert_close(mean.double(), wide, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(std.double(), wide_std, rtol=1e-6, atol=1e-6)


def test_ode_is_the_step_of_diffusers():
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    x, v = randn(2, 4, 3, 3, dtype=torch.float32), randn(2, 4, 3, 3, seed=1, dtype=torch.float32)
    for i in range(10):
        theirs = scheduler.step(v, scheduler.timesteps[i], x).prev_sample
        ours, std = transition(x, v, scheduler.sigmas[i].item(), scheduler.sigmas[i + 1].item(), "ode", 0.0)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        assert not std.any()
        x = theirs


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_log_prob_is_the_normal_density(reduction):
    x, mean, std = randn(3, 2, 4), randn(3, 2, 4, seed=1), torch.tensor([0.1, 0.5, 2.0]).double().reshape(3, 1, 1)
    density = Normal(mean, std.expand_as(mean)).log_prob(x).reshape(3, -1)
    expected = density.mean(1) if reduction == "mean" else density.sum(1)
    torch.testing.assert_close(log_prob(x, mean, std, reduction), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gaussian_kl_is_the_divergence_of_normals(reduction):
    mean, ref, std = randn(3, 2, 4), randn(3, 2, 4, seed=1), torch.tensor([0.1, 0.5, 2.0]).double().reshape(3, 1, 1)
    spread = std.expand_as(mean)
    divergence = kl_divergence(Normal(mean, spread), Normal(ref, spread)).reshape(3, -1)
    expected = divergence.mean(1) if reduction == "mean" else divergence.sum(1)
    torch.testing.assert_close(gaussian_kl(mean, ref, std, reduction), expected, rtol=1e-12, atol=1e-12)


def test_gradient_flows_through_the_mean_only():
    x, mean, ref, std = (randn(2, 3, seed=i).requires_grad_() for i in range(4))
    log_prob(x, mean, std.abs()).sum().backward()
    assert x.grad is None and std.grad is None
    torch.testing.assert_close(mean.grad, (x - mean).detach() / std.detach() ** 2 / 3)
    mean.grad = None
    gaussian_kl(mean, ref, std.abs()).sum().backward()
    assert ref.grad is None and std.grad is None
    torch.testing.assert_close(mean.grad, (mean - ref).detach() / std.detach() ** 2 / 3)


def test_log_prob_and_kl_of_half_precision_are_computed_wide():
    x, mean, std = randn(2, 64).bfloat16(), randn(2, 64, seed=1).bfloat16(), scalar(0.3).bfloat16()
    wide = [t.double() for t in (x, mean, std)]
    for function in (log_prob, gaussian_kl):
        torch.testing.assert_close(
            function(x, mean, std), function(wide[0], wide[1], wide[2]).float(), rtol=1e-5, atol=1e-5
        )


def test_mean_reduced_ratio_averages_to_its_closed_form():
    size, std = 8, 0.5
    shift = randn(size, seed=2) * 0.3
    drawn = std * randn(20_000, size, seed=3)
    old, new = torch.zeros_like(drawn), shift.expand_as(drawn)
    ratio = (log_prob(drawn, new, scalar(std)) - log_prob(drawn, old, scalar(std))).exp()
    k = shift.square().sum().item() / (2 * std**2)
    error = ratio.std().item() / math.sqrt(len(ratio))
    assert ratio.mean().item() == pytest.approx(math.exp(-k / size + k / size**2), abs=4 * error)
    assert abs(ratio.mean().item() - 1) > 10 * error


@pytest.mark.parametrize("kind", NOISY)
def test_on_policy_gradient_is_reinforce(kind):
    weight = randn(6, 6, seed=4).requires_grad_()
    x, advantage = randn(4, 6), randn(4, seed=5)
    sigma, sigma_next = torch.tensor([1.0, 0.9, 0.75, 0.5]).double(), torch.tensor([0.9, 0.75, 0.5, 0.2]).double()
    mean, std = transition(x, x @ weight, sigma, sigma_next, kind, 0.7, sigma_first=0.9)
    drawn = (mean + std * randn(4, 6, seed=6)).detach()
    now = log_prob(drawn, mean, std)
    before = now.detach().clone()
    assert torch.equal((now - before).exp(), torch.ones_like(now))
    (surrogate,) = torch.autograd.grad(
        clipped_surrogate(now, before, advantage, 1e-4, 1e-4).mean(), weight, retain_graph=True
    )
    (reinforce,) = torch.autograd.grad(-(advantage * now).mean(), weight)
    assert reinforce.norm() > 1e-3
    torch.testing.assert_close(surrogate, reinforce, rtol=1e-12, atol=1e-14)


# x0 ~ N(0, 1/4) makes x_s ~ N(0, (1-s)^2/4 + s^2) and the ideal velocity a multiple of x, so every mean is one too.


def ideal_velocity(s: float) -> float:
    return (s - (1 - s) / 4) / ((1 - s) ** 2 / 4 + s**2)


def final_variance(kind: Any, eta: float, steps: int) -> float:
    """Variance at s = 0 of a sampler that starts from N(0, 1), exactly; its last step is the ODE."""
    levels = shifted_linear(steps, 1.0).tolist()
    variance = 1.0
    for s, s_next in pairwise(levels):
        kind_now = kind if s_next else "ode"
        velocity = scalar(ideal_velocity(s))
        slope, std = transition(scalar(1.0), velocity, s, s_next, kind_now, eta, sigma_first=levels[1])
        variance = slope.item() ** 2 * variance + std.item() ** 2
    return variance


@pytest.mark.parametrize(("kind", "eta"), [("ode", 0.0), ("flow_sde", 0.7), ("dance_sde", 0.7)])
def test_sampler_keeps_the_marginal_as_the_steps_grow(kind, eta):
    """Flow-SDE's first step adds eta^4 / 4 to the variance for any N; later steps forget it, but only as N^(-eta^2)."""
    errors = [abs(final_variance(kind, eta, steps) - 0.25) for steps in (25, 100, 400)]
    assert errors[0] > 4 * errors[2]
    assert errors[2] < 0.002


def test_cps_does_not_keep_the_marginal():
    errors = [abs(final_variance("cps", 0.8, steps) - 0.25) for steps in (25, 100, 400)]
    assert min(errors) > 0.05


@pytest.mark.parametrize(("kind", "eta"), [("flow_sde", 0.7), ("dance_sde", 0.7), ("cps", 0.8)])
def test_drawn_samples_have_the_variance_of_the_recursion(kind, eta):
    steps, samples = 40, 20_000
    levels = shifted_linear(steps, 1.0).tolist()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 1, generator=generator)
    for s, s_next in pairwise(levels):
        kind_now = kind if s_next else "ode"
        mean, std = transition(x, ideal_velocity(s) * x, s, s_next, kind_now, eta, sigma_first=levels[1])
        x = mean + std * torch.randn(samples, 1, generator=generator)
    expected = final_variance(kind, eta, steps)
    assert x.square().mean().item() == pytest.approx(expected, abs=4 * expected * math.sqrt(2 / samples))


def test_unknown_choices_are_named():
    with pytest.raises(ValueError, match="ode, flow_sde, dance_sde, cps, awm, not 'euler'"):
        step("euler", 0.7)
    with pytest.raises(ValueError, match="mean, sum"):
        log_prob(scalar(1.0), scalar(1.0), scalar(1.0), "max")  # pyright: ignore[reportArgumentType]


def test_matching_is_the_loss_of_pretraining():
    """Its log-probability of x0 is -mean |v - (e - x0)|^2 but for a constant, and its divergence mean |v - v_ref|^2."""
    x0, e, v, v_ref = randn(4, 5, 3, 2, 2)
    s = torch.tensor([1.0, 0.9, 0.5, 0.2, 0.01], dtype=torch.float64)
    wide = s[:, None, None, None]
    x = (1 - wide) * x0 + wide * e
    mean, std = transition(x, v, s, 0.0, "awm", eta=0.7)
    ref, _ = transition(x, v_ref, s, 0.0, "awm", eta=0.7)
    constant = -(wide.flatten() / 2**0.5).log() - math.log(2 * math.pi) / 2
    expected = -(v - (e - x0)).square().mean((1, 2, 3)) + constant
    torch.testing.assert_close(log_prob(x0, mean, std), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gaussian_kl(mean, ref, std), (v - v_ref).square().mean((1, 2, 3)), rtol=1e-9, atol=1e-9)
    elsewhere, same = transition(x, v, s, s / 2, "awm", eta=0.1)
    assert torch.equal(elsewhere, mean)
    assert torch.equal(same, std)
