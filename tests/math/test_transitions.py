"""Transitions against worked numbers, closed forms, torch.distributions and diffusers."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch.distributions import Normal, kl_divergence

from aegpo.math.losses import clipped_surrogate
from aegpo.math.schedules import shifted_linear
from aegpo.math.transitions import ddim_transition, gaussian_kl, log_prob, transition

KINDS = ("ode", "flow_sde", "dance_sde", "cps", "ddim", "dpm_sde")
NOISY = ("flow_sde", "dance_sde", "cps", "ddim", "dpm_sde")


def scalar(value: float) -> torch.Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


def step(kind: Any, eta: float, s: float = 0.5, s_next: float = 0.4, **settings: Any) -> tuple[torch.Tensor, ...]:
    """One step of the scalar x = 1, v = .5."""
    return transition(scalar(1.0), scalar(0.5), s, s_next, kind, eta, **settings)


def fresh(s: float, s_next: float) -> float:
    """The variance that replaces noise when all of what may be replaced is."""
    rise = math.log((1 - s_next) / s_next) - math.log((1 - s) / s)
    return s_next**2 * (1 - math.exp(-2 * rise))


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
            "ddim": -s * (1 - s_next) + (1 - s) * math.sqrt(s_next**2 - 0.6**2 * fresh(s, s_next)),
            "dpm_sde": -s * (1 - s_next) + (1 - s) * math.sqrt(s_next**2 - fresh(s, s_next)),
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


@pytest.mark.parametrize("kind", ["ode", "flow_sde", "dance_sde", "cps", "ddim"])
def test_without_noise_every_sampler_is_the_sampler_of_diffusers(kind):
    """A whole trajectory, each on its own latents, of a velocity that bends with the latent and the noise level."""
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    theirs = ours = randn(2, 4, 3, 3, dtype=torch.float32)
    for i, (s, s_next) in enumerate(pairwise(scheduler.sigmas.tolist())):
        theirs = scheduler.step((theirs + s).sin(), scheduler.timesteps[i], theirs).prev_sample
        ours, std = transition(ours, (ours + s).sin(), s, s_next, kind, 0.0, sigma_first=scheduler.sigmas[1])
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        assert not std.any()


LEVELS = [(1.0, 0.9), (1.0, 0.3), (0.9, 0.75), (0.5, 0.4), (0.51, 0.5), (0.2, 0.01), (0.4, 0.0), (1.0, 0.0)]


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize(("s", "s_next"), LEVELS)
def test_ddim_is_the_textbook_step_in_coordinates_of_unit_variance(eta, s, s_next):
    x, v = randn(3, 4), randn(3, 4, seed=1)
    size, size_next = math.hypot(1 - s, s), math.hypot(1 - s_next, s_next)
    a, a_next = ((1 - s) / size) ** 2, ((1 - s_next) / size_next) ** 2
    x0_hat, e_hat = x - s * v, x + (1 - s) * v
    std = eta * math.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))
    mean = math.sqrt(a_next) * x0_hat + math.sqrt(max(1 - a_next - std**2, 0)) * e_hat
    got, got_std = transition(x, v, s, s_next, "ddim", eta)
    torch.testing.assert_close(got, size_next * mean, rtol=0, atol=1e-7)
    torch.testing.assert_close(got_std, scalar(size_next * std), rtol=0, atol=1e-12)
    prediction = (x / size, math.sqrt(a) * e_hat - math.sqrt(1 - a) * x0_hat, a, a_next, eta, "v_prediction")
    of_images, of_images_std = ddim_transition(*prediction)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(got, size_next * of_images, rtol=0, atol=1e-7)
    torch.testing.assert_close(got_std, size_next * of_images_std, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("s", "s_next"), [(0.9, 0.75), (0.5, 0.4), (0.51, 0.5), (0.2, 0.01)])
def test_dpm_sde_is_its_papers_step_and_ddim_at_eta_one(s, s_next):
    x, v = randn(3, 4), randn(3, 4, seed=1)
    rise = math.log((1 - s_next) / s_next) - math.log((1 - s) / s)
    mean = s_next / s * math.exp(-rise) * x + (1 - s_next) * (1 - math.exp(-2 * rise)) * (x - s * v)
    got, got_std = transition(x, v, s, s_next, "dpm_sde", 0.3)
    torch.testing.assert_close(got, mean, rtol=0, atol=1e-12)
    assert got_std.item() == pytest.approx(s_next * math.sqrt(1 - math.exp(-2 * rise)), abs=1e-12)
    ddim, ddim_std = transition(x, v, s, s_next, "ddim", 1.0)
    assert torch.equal(got, ddim) and torch.equal(got_std, ddim_std)


def test_dpm_sde_is_the_step_of_diffusers():
    levels = [0.95, 0.8, 0.5, 0.2]
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    scheduler: Any = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=1, **flow)
    scheduler.sigmas, scheduler.timesteps = torch.tensor([*levels, 0.0]), torch.arange(4)
    scheduler.num_inference_steps = 4  # all that set_timesteps would do, on this grid
    x = randn(2, 3, dtype=torch.float32)
    for i, (s, s_next) in enumerate(pairwise(levels)):
        v, z = randn(2, 3, seed=i + 1, dtype=torch.float32), randn(2, 3, seed=i + 10, dtype=torch.float32)
        mean, std = transition(x, v, s, s_next, "dpm_sde", 0.0)
        x = scheduler.step(v, scheduler.timesteps[i], x, variance_noise=z).prev_sample
        torch.testing.assert_close(mean + std * z, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["ddim", "dpm_sde"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ddim_from_pure_noise_and_onto_the_image(kind, dtype):
    x, v = randn(2, 3, dtype=dtype).requires_grad_(), randn(2, 3, seed=1, dtype=dtype)
    mean, std = transition(x, v, 1.0, 0.6, kind, 1.0)
    torch.testing.assert_close(mean, 0.4 * (x - v))  # none of the noise is kept
    torch.testing.assert_close(std, torch.full_like(std, 0.6))
    mean, std = transition(x, v, 0.3, 0.0, kind, 1.0)
    torch.testing.assert_close(mean, x - 0.3 * v)
    assert not std.any()
    (slope,) = torch.autograd.grad(mean.sum(), x)
    assert torch.equal(slope, torch.ones_like(x))


def test_short_steps_of_ddim_are_those_of_flow_sde():
    for s in (0.9, 0.5, 0.1):
        ddim, std = step("ddim", 0.5, s, s - 1e-5)
        flow, flow_std = step("flow_sde", 0.5 * math.sqrt(2), s, s - 1e-5)
        assert std.item() == pytest.approx(flow_std.item(), rel=1e-3)
        assert ddim.item() - 1 == pytest.approx(flow.item() - 1, rel=1e-3)


def test_ddim_at_eta_above_one_is_refused():
    with pytest.raises(ValueError, match="ddim takes eta up to 1"):
        step("ddim", 1.01)
    with pytest.raises(ValueError, match="ddim takes eta up to 1"):
        ddim_transition(scalar(1.0), scalar(0.5), 0.5, 0.6, 1.01)


def test_step_of_a_variance_preserving_model_is_the_worked_number():
    mean, std = ddim_transition(scalar(1.0), scalar(0.5), 0.5, 0.6, 1.0)
    assert mean.item() == pytest.approx(0.9663457, abs=1e-7)
    assert std.item() == pytest.approx(0.3651484, abs=1e-7)
    assert log_prob(scalar(1.0), mean, std).item() == pytest.approx(0.0842657, abs=1e-7)
    onto_the_image, none = ddim_transition(scalar(1.0), scalar(0.5), 0.5, 1.0, 1.0)
    assert onto_the_image.item() == pytest.approx(0.9142136, abs=1e-7)
    assert none.item() == 0


STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("to_one", [True, False])
def test_step_of_a_variance_preserving_model_is_that_of_diffusers(prediction_type, eta, to_one):
    settings: Any = STABLE_DIFFUSION | {"prediction_type": prediction_type, "set_alpha_to_one": to_one}
    scheduler: Any = DDIMScheduler(**settings)
    scheduler.set_timesteps(20)
    x, products = randn(2, 3, 4, dtype=torch.float32), scheduler.alphas_cumprod
    for t in scheduler.timesteps.tolist():
        before = t - 1000 // 20
        after = products[before] if before >= 0 else scheduler.final_alpha_cumprod
        out, z = (randn(2, 3, 4, seed=seed, dtype=torch.float32) for seed in (t + 1, t + 2))
        mean, std = ddim_transition(x, out, products[t], after, eta, prediction_type)
        x = scheduler.step(out, t, x, eta=eta, variance_noise=z if eta else None).prev_sample
        scale = max(x.abs().max().item(), 1.0)
        torch.testing.assert_close((mean + std * z) / scale, x / scale, rtol=0, atol=1e-6)
        assert std.item() == pytest.approx(eta * scheduler._get_variance(t, before).item() ** 0.5, rel=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_at_eta_one_it_is_the_posterior_of_ddpm(prediction_type):
    scheduler: Any = DDPMScheduler(**STABLE_DIFFUSION, prediction_type=prediction_type)  # pyright: ignore
    scheduler.set_timesteps(50)
    products = scheduler.alphas_cumprod
    for t in scheduler.timesteps[:-1].tolist():
        x, out = (randn(2, 3, seed=seed, dtype=torch.float32) for seed in (t + 1, t + 2))
        drawn = scheduler.step(out, t, x, generator=torch.Generator().manual_seed(t)).prev_sample
        z = torch.randn(2, 3, generator=torch.Generator().manual_seed(t))
        mean, std = ddim_transition(x, out, products[t], products[scheduler.previous_timestep(t)], 1.0, prediction_type)
        scale = max(drawn.abs().max().item(), 1.0)
        torch.testing.assert_close((mean + std * z) / scale, drawn / scale, rtol=0, atol=2e-6)


def test_rows_of_a_variance_preserving_model_may_stand_at_different_steps():
    x, out = randn(3, 2, 2), randn(3, 2, 2, seed=1)
    a, after = torch.tensor([0.1, 0.5, 0.9]).double(), torch.tensor([0.3, 0.6, 1.0]).double()
    mean, std = ddim_transition(x, out, a, after, 0.8)
    for row in range(3):
        alone = ddim_transition(x[row : row + 1], out[row : row + 1], a[row].item(), after[row].item(), 0.8)
        torch.testing.assert_close(mean[row : row + 1], alone[0], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(std[row : row + 1], alone[1], rtol=1e-13, atol=1e-13)
    half, _ = ddim_transition(x.bfloat16(), out.bfloat16(), 0.5, 0.6, 0.8)
    wide, _ = ddim_transition(x.bfloat16().double(), out.bfloat16().double(), 0.5, 0.6, 0.8)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), wide, rtol=1e-6, atol=1e-6)


def test_from_no_signal_at_all_only_a_velocity_tells_the_image():
    x, v = randn(2, 3), randn(2, 3, seed=1)
    mean, std = ddim_transition(x, v, 0.0, 0.36, 1.0, "v_prediction")  # x is the noise, and -v the image
    torch.testing.assert_close(mean, -0.6 * v)
    assert std.item() == pytest.approx(0.8)


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


def marginal_variance(s: float) -> float:
    return (1 - s) ** 2 / 4 + s**2


def relative_errors(kind: Any, eta: float, steps: int) -> dict[float, float]:
    """How far the variance of x_s is from the flow's, exactly, at each level of a sampler that starts from N(0, 1).

    A mean that is a multiple of x turns the variance V into `slope^2 V + std^2`. The last step is the ODE.
    """
    levels = shifted_linear(steps, 1.0).tolist()
    variance, errors = 1.0, {}
    for s, s_next in pairwise(levels):
        kind_now = kind if s_next else "ode"
        velocity = scalar(ideal_velocity(s))
        slope, std = transition(scalar(1.0), velocity, s, s_next, kind_now, eta, sigma_first=levels[1])
        variance = slope.item() ** 2 * variance + std.item() ** 2
        errors[s_next] = variance / marginal_variance(s_next) - 1
    return errors


def worst(kind: Any, eta: float, steps: int) -> float:
    """The largest relative error in the lower half of the levels."""
    return max(abs(error) for s, error in relative_errors(kind, eta, steps).items() if s <= 0.5)


# The error in the lower half is at most `size * steps ** -order`. Flow-SDE's first step adds eta^4 / 4 to the variance
# for any number of steps; later ones forget it, but only as steps^(-eta^2).
KEEPING = [
    ("ode", 0.0, 3.0, 1.0),
    ("flow_sde", 0.7, 0.4, 0.49),
    ("dance_sde", 0.7, 1.2, 1.0),
    ("ddim", 0.7, 4.9, 1.0),
    ("ddim", 1.0, 7.2, 1.0),
    ("dpm_sde", 0.0, 7.2, 1.0),
]


@pytest.mark.parametrize(("kind", "eta", "size", "order"), KEEPING)
def test_sampler_keeps_the_marginal_as_the_steps_grow(kind, eta, size, order):
    errors = [worst(kind, eta, steps) for steps in (100, 400, 1600)]
    assert all(error < size * steps**-order for error, steps in zip(errors, (100, 400, 1600), strict=True))
    assert all(coarse / fine > 0.9 * 4**order for coarse, fine in pairwise(errors))


def test_cps_does_not_keep_the_marginal():
    errors = [worst("cps", 0.8, steps) for steps in (100, 400, 1600)]
    assert min(errors) > 0.3


SAMPLES = 20_000
STANDARD_ERROR = math.sqrt(2 / SAMPLES)  # of the variance of a Gaussian about a known mean, relative


def drawn_variance(kind: Any, eta: float, steps: int) -> dict[float, float]:
    """The variance of x_s over that of the flow, from samples, half-way and at the image."""
    levels = shifted_linear(steps, 1.0).tolist()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 1, generator=generator)
    found = {}
    for s, s_next in pairwise(levels):
        kind_now = kind if s_next else "ode"
        mean, std = transition(x, ideal_velocity(s) * x, s, s_next, kind_now, eta, sigma_first=levels[1])
        x = mean + std * torch.randn(SAMPLES, 1, generator=generator)
        if s_next in (0.5, 0.0):
            found[s_next] = x.double().square().mean().item() / marginal_variance(s_next)
    return found


@pytest.mark.parametrize(("kind", "eta", "size", "order"), KEEPING)
@pytest.mark.parametrize("steps", [100, 400])
def test_drawn_samples_keep_the_marginal(kind, eta, size, order, steps):
    for ratio in drawn_variance(kind, eta, steps).values():
        assert ratio == pytest.approx(1, abs=4 * STANDARD_ERROR + size * steps**-order)


@pytest.mark.parametrize(
    ("kind", "eta"), [("flow_sde", 0.7), ("dance_sde", 0.7), ("cps", 0.8), ("ddim", 0.7), ("dpm_sde", 0.0)]
)
def test_drawn_samples_have_the_variance_of_the_recursion(kind, eta):
    exact = relative_errors(kind, eta, 40)
    for s, ratio in drawn_variance(kind, eta, 40).items():
        assert ratio / (1 + exact[s]) == pytest.approx(1, abs=4 * STANDARD_ERROR)


def test_drawn_samples_of_cps_lose_variance():
    assert drawn_variance("cps", 0.8, 400)[0.0] < 1 - 30 * STANDARD_ERROR


def test_unknown_choices_are_named():
    with pytest.raises(ValueError, match="ode, flow_sde, dance_sde, cps, ddim, dpm_sde, not 'euler'"):
        step("euler", 0.7)
    with pytest.raises(ValueError, match="mean, sum"):
        log_prob(scalar(1.0), scalar(1.0), scalar(1.0), "max")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="epsilon, v_prediction, not 'sample'"):
        ddim_transition(scalar(1.0), scalar(1.0), 0.5, 0.6, 0.0, "sample")  # pyright: ignore[reportArgumentType]
