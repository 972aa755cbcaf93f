"""Noiseless solvers against worked numbers, diffusers and the order at which they converge."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from aegpo.math.solvers import dpmpp_2m, euler
from aegpo.math.transitions import transition


def scalar(value: float) -> torch.Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_second_order_step_is_the_worked_number():
    got, x0_hat = dpmpp_2m(scalar(1.0), scalar(0.5), 0.5, 0.4, scalar(0.7), 0.6)
    assert got.item() == pytest.approx(0.955, abs=1e-12)
    assert x0_hat.item() == 0.75


def test_second_order_step_is_the_papers_formula():
    x, v, before = randn(3, 4)
    s_prev, s, s_next = 0.8, 0.55, 0.2
    rise_prev, rise = (math.log((1 - b) / b) - math.log((1 - a) / a) for a, b in ((s_prev, s), (s, s_next)))
    now = x - s * v
    d = (now - before) / (rise_prev / rise)
    expected = s_next / s * x - (1 - s_next) * (math.exp(-rise) - 1) * (now + d / 2)
    got, _ = dpmpp_2m(x[None], v[None], s, s_next, before[None], s_prev)
    torch.testing.assert_close(got[0], expected, rtol=1e-12, atol=1e-12)


def test_euler_is_the_ode_and_the_step_of_diffusers():
    assert euler(scalar(1.0), scalar(0.5), 0.5, 0.4).item() == pytest.approx(0.95, abs=1e-15)
    x, v = randn(4, 3), randn(4, 3, seed=1)
    s, s_next = torch.tensor([1.0, 0.9, 0.5, 0.2]).double(), torch.tensor([0.9, 0.5, 0.1, 0.0]).double()
    torch.testing.assert_close(euler(x, v, s, s_next), transition(x, v, s, s_next, "ode", 0.0)[0])
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    theirs = ours = randn(2, 4, dtype=torch.float32)
    for i, (one, after) in enumerate(pairwise(scheduler.sigmas.tolist())):
        theirs = scheduler.step((theirs + one).sin(), scheduler.timesteps[i], theirs).prev_sample
        ours = euler(ours, (ours + one).sin(), one, after)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("levels", [[1.0, 0.9, 0.75, 0.5, 0.0], [0.97, 0.8, 0.79, 0.3, 0.1, 0.0]])
def test_second_order_trajectory_is_that_of_diffusers(levels):
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    settings: Any = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"} | flow
    scheduler: Any = DPMSolverMultistepScheduler(**settings)
    scheduler.sigmas, scheduler.timesteps = torch.tensor(levels), torch.arange(len(levels) - 1)
    scheduler.num_inference_steps = len(levels) - 1  # all that set_timesteps would do, on this grid
    theirs = ours = randn(2, 3, 4, dtype=torch.float32)
    before = at = None
    corrected = 0
    for i, (s, s_next) in enumerate(pairwise(levels)):
        theirs = scheduler.step((theirs + s).sin(), scheduler.timesteps[i], theirs).prev_sample
        v = (ours + s).sin()
        first = euler(ours, v, s, s_next)
        ours, before = dpmpp_2m(ours, v, s, s_next, before, at)
        at = s
        corrected += not torch.equal(ours, first)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert corrected == len(levels) - 3 - (levels[0] == 1)  # all but the first, that after pure noise, and the last


def gaussian_flow(solver: str, steps: int, start: float = 0.9, end: float = 0.1) -> float:
    """Where x = 1 arrives on the flow of x0 ~ N(0, 1/4), in error: exactly, it scales with the standard deviation."""

    def deviation(s: float) -> float:
        return math.sqrt((1 - s) ** 2 / 4 + s**2)

    levels = torch.linspace(start, end, steps + 1, dtype=torch.float64).tolist()
    x, before, at = scalar(1.0), None, None
    for s, s_next in pairwise(levels):
        v = (s - (1 - s) / 4) / deviation(s) ** 2 * x
        if solver == "euler":
            x = euler(x, v, s, s_next)
        else:
            x, before = dpmpp_2m(x, v, s, s_next, before, at)
            at = s
    return abs(x.item() - deviation(end) / deviation(start))


@pytest.mark.parametrize(("solver", "ratio"), [("euler", 2), ("dpmpp_2m", 4)])
def test_halving_the_step_divides_the_error_by_two_to_the_order(solver, ratio):
    errors = [gaussian_flow(solver, steps) for steps in (40, 80, 160, 320)]
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(ratio, rel=0.1)


def test_second_order_needs_fewer_steps():
    assert gaussian_flow("dpmpp_2m", 20) < gaussian_flow("euler", 100)


def test_rows_at_different_steps_equal_the_rows_alone():
    """A row of order 1 is marked by its level before, and what stands in its `x0_prev` is not looked at."""
    x, v, before = randn(6, 2, 3), randn(6, 2, 3, seed=1), randn(6, 2, 3, seed=2)
    before[1], before[4] = math.nan, math.inf
    s_prev = torch.tensor([0.9, 0.0, 1.0, 0.6, 0.5, 0.7]).double()
    s = torch.tensor([0.8, 1.0, 0.9, 0.4, 0.5, 0.6]).double()
    s_next = torch.tensor([0.7, 0.9, 0.5, 0.0, 0.2, 0.1]).double()
    got, x0_hat = dpmpp_2m(x, v, s, s_next, before, s_prev)
    for row, order in enumerate([2, 1, 1, 1, 1, 2]):
        one = slice(row, row + 1)
        previous = (before[one], s_prev[row].item()) if order == 2 else ()
        alone, alone_hat = dpmpp_2m(x[one], v[one], s[row].item(), s_next[row].item(), *previous)
        torch.testing.assert_close(got[one], alone, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(x0_hat[one], alone_hat, rtol=1e-13, atol=1e-13)
        first = euler(x[one], v[one], s[row].item(), s_next[row].item())
        assert torch.equal(alone, first) == (order == 1)


@pytest.mark.parametrize(
    "levels", [(0.9, 1.0, 0.5), (1.0, 0.9, 0.5), (1.0, 0.9, 0.0), (0.9, 0.5, 0.0), (1.0, 1.0, 0.0)]
)
def test_order_one_at_the_ends_is_euler_with_its_gradients(levels):
    x, v, before = (randn(2, 3, seed=seed).requires_grad_() for seed in range(3))
    s_prev, s, s_next = (torch.tensor([level, level]).double().requires_grad_() for level in levels)
    inputs = (x, v, s, s_next, before, s_prev)
    got, _ = dpmpp_2m(x, v, s, s_next, before, s_prev)
    plain = euler(x, v, s, s_next)
    assert torch.equal(got, plain)
    slopes = torch.autograd.grad(got.sum(), inputs)
    expected = torch.autograd.grad(plain.sum(), inputs[:4])
    for slope, wanted in zip(slopes, (*expected, *(torch.zeros_like(t) for t in inputs[4:])), strict=True):
        torch.testing.assert_close(slope, wanted)


def test_half_precision_is_widened_before_the_arithmetic():
    x, v, before = (randn(2, 4, seed=seed).bfloat16() for seed in range(3))
    got, x0_hat = dpmpp_2m(x, v, 0.5, 0.4, before, 0.7)
    wide, wide_hat = dpmpp_2m(x.double(), v.double(), 0.5, 0.4, before.double(), 0.7)
    assert got.dtype == x0_hat.dtype == torch.float32
    torch.testing.assert_close(got.double(), wide, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x0_hat.double(), wide_hat, rtol=1e-6, atol=1e-6)
