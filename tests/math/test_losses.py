"""The clipped surrogate against worked numbers and closed-form gradients."""

import math

import pytest
import torch

from aegpo.math.losses import clipped_surrogate


def at_ratio(ratio: float, advantage: float, low: float, high: float) -> tuple[float, float]:
    """Loss and its derivative by the log-probability."""
    now = torch.tensor([math.log(ratio) - 1.3], dtype=torch.float64, requires_grad=True)
    before, advantages = torch.tensor([-1.3], dtype=torch.float64), torch.tensor([float(advantage)])
    loss = clipped_surrogate(now, before, advantages, low, high)
    loss.sum().backward()
    assert now.grad is not None
    return loss.item(), now.grad.item()


@pytest.mark.parametrize(
    ("advantage", "ratio", "expected", "slope"),
    [(2, 1.1, -2.0002, 0.0), (2, 0.9, -1.8, -1.8), (-2, 1.1, 2.2, 2.2), (-2, 0.9, 1.9998, 0.0)],
)
def test_loss_is_the_worked_number_and_flat_past_the_clip(advantage, ratio, expected, slope):
    loss, gradient = at_ratio(ratio, advantage, 1e-4, 1e-4)
    assert loss == pytest.approx(expected, abs=1e-7)
    assert gradient == pytest.approx(slope, abs=1e-7)


def test_the_two_clips_are_on_their_own_sides():
    assert at_ratio(1.5, 1.0, 0.1, 0.3)[0] == pytest.approx(-1.3)
    assert at_ratio(0.5, -1.0, 0.1, 0.3)[0] == pytest.approx(0.9)


def test_rows_do_not_mix():
    now, before = torch.tensor([0.0, math.log(2)]), torch.zeros(2)
    loss = clipped_surrogate(now, before, torch.tensor([3.0, -1.0]), 0.2, 0.2)
    torch.testing.assert_close(loss, torch.tensor([-3.0, 2.0]))


def test_gradient_flows_through_the_new_log_prob_only():
    now = torch.tensor([-0.7, 0.3], requires_grad=True)
    advantage = torch.tensor([1.5, -2.5], requires_grad=True)
    clipped_surrogate(now, now, advantage, 1e-4, 1e-4).sum().backward()
    assert now.grad is not None and now.grad.tolist() == [-1.5, 2.5]
    assert advantage.grad is None
