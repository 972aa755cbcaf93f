"""Schedules against worked numbers and diffusers."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from aegpo.math.schedules import flux, sd3, shifted_linear


def of_diffusers(scheduler: Any, **settings: Any) -> torch.Tensor:
    scheduler.set_timesteps(**settings)
    return scheduler.sigmas.double()


def test_sd3_is_the_worked_schedule():
    expected = [1, 0.960129, 0.913349, 0.857692, 0.790368, 0.707278, 0.602151, 0.464876, 0.278049, 0.008929, 0]
    assert sd3(10).tolist() == pytest.approx(expected, abs=5e-7)


def test_flux_is_the_worked_schedule():
    expected = [1, 0.903736, 0.789705, 0.652489, 0.484218, 0.273003, 0]
    assert flux(6, tokens=1024).tolist() == pytest.approx(expected, abs=5e-7)


def test_shifted_linear_is_the_worked_schedule():
    assert shifted_linear(4, 3.0).tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0], abs=1e-15)
    assert shifted_linear(4, 1.0).tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0], abs=1e-15)


@pytest.mark.parametrize("steps", [1, 2, 10, 28, 40])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.5])
def test_sd3_is_the_schedule_of_diffusers(steps, shift):
    theirs = of_diffusers(FlowMatchEulerDiscreteScheduler(shift=shift), num_inference_steps=steps)
    torch.testing.assert_close(sd3(steps, shift), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 6, 28])
@pytest.mark.parametrize(("tokens", "mu"), [(256, 0.5), (1024, 0.63), (4096, 1.15)])
def test_flux_is_the_dynamic_shift_of_diffusers(steps, tokens, mu):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    theirs = of_diffusers(scheduler, sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    torch.testing.assert_close(flux(steps, tokens), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 3, 10, 25])
def test_schedules_fall_from_exactly_one_to_exactly_zero(steps):
    schedules = [shifted_linear(steps, shift) for shift in (0.1, 1.0, 3.0, math.exp(0.63), 7.3)]
    for sigmas in [*schedules, sd3(steps), sd3(steps, 1.7), flux(steps, 700)]:
        assert sigmas.dtype == torch.float64 and len(sigmas) == steps + 1
        assert sigmas[0] == 1 and sigmas[-1] == 0
        assert (sigmas.diff() < 0).all()


@pytest.mark.parametrize("schedule", [lambda: sd3(0), lambda: flux(0, 1024), lambda: shifted_linear(0, 3.0)])
def test_no_steps_are_refused(schedule):
    with pytest.raises(ValueError, match="at least 1 step, not 0"):
        schedule()
