"""Losses against worked numbers, closed-form gradients and other ways to write them."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from aegpo.math import losses
from aegpo.math.losses import (
    clipped_surrogate,
    dgpo,
    dpo,
    guard_log_ratio,
    masked_surrogate,
    matching_error,
    matching_log_prob,
    nft,
    ram,
    velocity_kl,
)
from aegpo.math.transitions import log_prob


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slope(loss: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    """Gradient of the sum of the rows."""
    at = at.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(at).sum(), at)[0]


class Noised:
    """Five images noised to as many levels, and velocities of three policies there."""

    x0, noise, v, v_old, v_ref = randn(5, 5, 2, 3, 3)
    t = doubles(1.0, 0.9, 0.5, 0.2, 0.01)
    x_t = x0 + t[:, None, None, None] * (noise - x0)
    truth = noise - x0
    advantage = doubles(1.5, -0.7, 0.0, 9.0, -9.0)


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


@pytest.mark.parametrize("shape", ["rows", "one", "number"])
def test_guards_ratio_is_the_mean_of_noise_times_shift(shape):
    """With x' = mu_old + tau z it is mean(z d), which is linear in z: no bias, for any shift."""
    z, shift, mean_old = randn(3, 4, 2, 5)
    std = {"rows": doubles(0.1, 0.5, 1.0, 3.0)[:, None, None], "one": doubles(0.3)[:, None, None]}.get(
        shape, doubles(2)[0]
    )
    mean, drawn = mean_old + shift, mean_old + std * z
    now, before = log_prob(drawn, mean, std), log_prob(drawn, mean_old, std)
    got = guard_log_ratio(now, before, mean, mean_old, std)
    torch.testing.assert_close(got, (z * shift).mean((1, 2)), rtol=1e-10, atol=1e-12)
    bias = -shift.square().mean((1, 2)) / (2 * std.flatten())
    torch.testing.assert_close((now - before) * std.flatten(), got + bias, rtol=1e-10, atol=1e-12)
    gradient = slope(lambda m: guard_log_ratio(log_prob(drawn, m, std), before, m, mean_old, std), mean)
    torch.testing.assert_close(gradient, z / 10, rtol=1e-10, atol=1e-12)


def test_guards_ratio_has_mean_zero_where_the_plain_one_has_not():
    size, std, shift = 16, 0.4, 0.3 * randn(16, seed=5)
    drawn = std * randn(20_000, size, seed=6)
    mean, mean_old, spread = shift.expand_as(drawn), torch.zeros_like(drawn), doubles(std)[:, None]
    now, before = log_prob(drawn, mean, spread), log_prob(drawn, mean_old, spread)
    guarded = guard_log_ratio(now, before, mean, mean_old, spread)
    assert guarded.mean().item() == pytest.approx(0, abs=4 * guarded.std().item() / math.sqrt(20_000))
    plain, error = (now - before).mean().item(), (now - before).std().item() / math.sqrt(20_000)
    assert plain == pytest.approx(-shift.square().mean().item() / (2 * std**2), abs=4 * error)
    assert plain < -20 * error


@pytest.mark.parametrize(
    ("advantage", "ratio", "divergence", "expected", "gradient"),
    [
        (2.0, 1.1, 0.9e-5, -2.2, -2.2),  # inside the region
        (2.0, 1.1, 1e-5, 0.0, 0.0),  # at its edge, and further out
        (2.0, 0.9, 1e-5, -1.8, -1.8),  # outside, but on the way back
        (-2.0, 0.9, 1.0, 0.0, 0.0),
        (-2.0, 1.1, 1.0, 2.2, 2.2),
        (2.0, 1.0, 1.0, -2.0, -2.0),  # has not moved
        (0.0, 1.1, 1.0, 0.0, 0.0),
        (2.0, math.inf, 1.0, 0.0, 0.0),
    ],
)
def test_masked_surrogate_is_the_worked_number_and_flat_outside_the_region(
    advantage, ratio, divergence, expected, gradient
):
    now, before = doubles(math.log(ratio) - 1.3), doubles(-1.3)

    def loss(log_prob: torch.Tensor) -> torch.Tensor:
        return masked_surrogate(log_prob, before, doubles(advantage), doubles(divergence), 1e-5)

    assert loss(now).item() == pytest.approx(expected, abs=1e-12)
    assert slope(loss, now).item() == pytest.approx(gradient, abs=1e-12)


def test_matching_error_is_the_loss_of_pretraining():
    n = Noised
    got = matching_error(n.v, n.x_t, n.x0, n.t)
    torch.testing.assert_close(got, (n.v - n.truth).square().mean((1, 2, 3)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(slope(lambda v: matching_error(v, n.x_t, n.x0, n.t), n.v), 2 * (n.v - n.truth) / 18)
    one = matching_error(doubles(0.5)[None], doubles(1.0)[None], doubles(0.6)[None], doubles(0.5))
    assert one.item() == pytest.approx(0.09, abs=1e-12)  # .8 is true


@pytest.mark.parametrize(
    ("weighting", "expected", "gradient"),
    [
        ("uniform", [-0.0016, -16.0], [-1.0, -1.0]),
        ("t", [-0.0008, -4.0], [-0.5, -0.25]),
        ("t2", [-0.0004, -1.0], [-0.25, -0.0625]),
        ("huber", [-0.5 * (0.04 - 1e-5), -0.25 * (4 - 1e-5)], [-0.5 / 0.08, -0.25 / 8]),
        ("ghuber", [-2 * (0.2 - 10**-2.5), -(2 - 10**-2.5)], [-0.5 / 0.008, -0.25 / 8]),
    ],
)
def test_weighed_matching_error_is_the_worked_number(weighting, expected, gradient):
    error, t = doubles(0.0016, 16.0), doubles(0.5, 0.25)
    assert matching_log_prob(error, t, weighting).tolist() == pytest.approx(expected, rel=1e-6)
    assert slope(lambda d: matching_log_prob(d, t, weighting), error).tolist() == pytest.approx(gradient, rel=1e-6)
    assert matching_log_prob(doubles(0.0), doubles(0.7), weighting).item() == pytest.approx(0, abs=1e-15)


def test_unknown_weighting_is_named():
    with pytest.raises(ValueError, match="uniform, t, t2, huber, ghuber, not 'square'"):
        matching_log_prob(doubles(1.0), doubles(1.0), "square")  # pyright: ignore[reportArgumentType]


def test_velocity_distance_is_by_hand_and_moves_the_policy_only():
    n = Noised
    assert velocity_kl(doubles(1, 2)[None], doubles(3, -2)[None]).item() == 10
    torch.testing.assert_close(slope(lambda v: velocity_kl(v, n.v_ref), n.v), (n.v - n.v_ref) / 9)


def test_nft_of_numbers_is_worked_by_hand():
    def rows(*values: float) -> torch.Tensor:
        return doubles(*values)[:, None]

    out = nft(
        rows(0.5, 0.5), rows(0.3, 0.3), rows(-1, -1), rows(1, 1), rows(0.6, 0.6), doubles(0.5, 0.5), doubles(2, -9), 0.2
    )
    # v+ = .34, v- = .26: the images .83 and .87 are .23 and .27 off; of A = 2 the share .7 is good, of -9 nothing
    expected = [5 * (0.7 * 0.23 + 0.3 * 0.27) / 0.2 + 1e-4 * 2.25, 5 * 0.27 / 0.2 + 1e-4 * 2.25]
    assert out.rows.tolist() == pytest.approx(expected, abs=1e-12)
    assert out.value.item() == pytest.approx(sum(expected) / 2, abs=1e-12)
    assert {name: values.tolist() for name, values in out.metrics.items()} == {
        "r": pytest.approx([0.7, 0.0]),
        "positive": pytest.approx([0.23, 0.23]),
        "negative": pytest.approx([0.27, 0.27]),
        "kl": pytest.approx([2.25, 2.25]),
    }


def test_nft_normalises_each_row_by_its_own_error_over_its_elements():
    n = Noised
    out = nft(n.v, n.v_old, n.v_ref, n.x_t, n.x0, n.t, n.advantage, 0.3, 2.0, 0.1)
    for i in range(5):
        off = [n.t[i] * (n.truth[i] - v) for v in (0.3 * n.v[i] + 0.7 * n.v_old[i], 1.3 * n.v_old[i] - 0.3 * n.v[i])]
        positive, negative = (((o**2).mean() / o.abs().mean()).item() for o in off)
        r = min(max(n.advantage[i].item() / 2, -1), 1) / 2 + 0.5
        distance = ((n.v[i] - n.v_ref[i]) ** 2).mean().item()
        expected = 2 * (r * positive + (1 - r) * negative) / 0.3 + 0.1 * distance
        assert out.rows[i].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_gradient_of_nft_at_the_old_policy_is_that_of_matching_times_a_closed_form(beta):
    n = Noised

    def loss(v: torch.Tensor) -> torch.Tensor:
        return nft(v, n.v_old, None, n.x_t, n.x0, n.t, n.advantage, beta, kl=0).rows

    r = (n.advantage / 5).clamp(-1, 1) / 2 + 0.5
    size = (n.t[:, None, None, None] * (n.v_old - n.truth)).abs().mean((1, 2, 3))
    factor = 5 * (2 * r - 1) * n.t**2 / size
    matching = slope(lambda v: matching_error(v, n.x_t, n.x0, n.t), n.v_old)
    got = slope(loss, n.v_old)
    torch.testing.assert_close(got, factor[:, None, None, None] * matching, rtol=1e-8, atol=1e-10)
    assert got[2].abs().max().item() < 1e-12  # A = 0 teaches nothing
    pull = (-got * (n.truth - n.v_old)).sum((1, 2, 3))
    assert pull.sign().tolist() == n.advantage.sign().where(n.advantage != 0, pull.sign()).tolist()


@pytest.mark.parametrize(("off", "expected"), [(1e-3, 1e-3), (1e-5, 1e-5), (1e-6, 1e-7)])
def test_nft_divides_by_no_less_than_its_floor(off, expected):
    """An error of so much at t = 1 is squared and divided by itself, or by 1e-5 where it is smaller."""
    v, zero = doubles(off)[:, None], doubles(0.0)[:, None]
    out = nft(v, v, None, zero, zero, doubles(1.0), doubles(5.0), 1.0, kl=0)
    assert out.metrics["positive"].item() == pytest.approx(expected, rel=1e-9)
    assert out.metrics["negative"].item() == pytest.approx(expected, rel=1e-9)


def test_nft_is_finite_where_the_image_is_met_exactly():
    n = Noised
    got = slope(lambda v: nft(v, n.truth, n.v_ref, n.x_t, n.x0, n.t, n.advantage, 0.1).rows, n.truth)
    assert got.isfinite().all()
    out = nft(n.truth, n.truth, n.v_ref, n.x_t, n.x0, n.t, n.advantage, 0.1, kl=0)
    assert out.rows.abs().max().item() < 1e-9


def test_weight_on_the_distance_of_nft_without_a_reference_is_our_own_mistake():
    n = Noised
    with pytest.raises(AssertionError, match="reference"):
        nft(n.v, n.v_old, None, n.x_t, n.x0, n.t, n.advantage, 0.1)


def test_gradient_of_ram_is_that_of_anchored_weighted_matching():
    n = Noised
    got = slope(lambda v: ram(v, n.v_ref, n.x_t, n.x0, n.t, n.advantage, 0.7), n.v)
    plain = slope(lambda v: velocity_kl(v, n.v_ref) + 0.7 * n.advantage * matching_error(v, n.x_t, n.x0, n.t), n.v)
    torch.testing.assert_close(got, plain, rtol=1e-9, atol=1e-10)


def test_ram_of_numbers_is_worked_by_hand():
    """.8 is true, so the target is .2 + .5 * 2 * (.8 - .5) = .5 for the first and .2 - .3 = -.1 for the second."""
    v, v_ref, x_t, x0 = (doubles(value, value)[:, None] for value in (0.5, 0.2, 1.0, 0.6))
    got = ram(v, v_ref, x_t, x0, doubles(0.5, 0.5), doubles(2, -2), 0.5)
    assert got.tolist() == pytest.approx([0.0, 0.36], abs=1e-12)


def test_dgpo_is_the_worked_number():
    error, ref, advantage = doubles(0.5, 0.4), doubles(0.6, 0.3), doubles(1, -1)
    rows = dgpo(error, ref, advantage, torch.tensor([7, 7]), 10.0)
    assert rows.mean().item() == pytest.approx(0.0134471, abs=1e-7)
    assert rows.tolist() == pytest.approx([0.5 / (1 + math.e), -0.4 / (1 + math.e)], abs=1e-12)  # S = -1


def test_gradient_of_dgpo_is_that_of_a_preference_between_uneven_units():
    unit = torch.tensor([2**60, -4, 2**60, 9, -4, 2**60])
    error, ref, advantage = randn(3, 6).abs()
    advantage = advantage * doubles(1, -1, -1, 1, 1, 1)
    got = slope(lambda d: dgpo(d, ref, advantage, unit, 3.0), error)

    def preference(d: torch.Tensor) -> torch.Tensor:
        units = [unit == one for one in (2**60, -4, 9)]
        total = [own.sum() * F.softplus((3.0 * advantage * (d - ref))[own].mean()) for own in units]
        return torch.stack(total) / 3.0

    torch.testing.assert_close(got, slope(preference, error), rtol=1e-12, atol=1e-12)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    rows = dgpo(error, ref, advantage, unit, 3.0)
    torch.testing.assert_close(dgpo(error[order], ref[order], advantage[order], unit[order], 3.0), rows[order])


def test_dpo_is_the_worked_number_and_ln_2_at_the_reference():
    rows = dpo(doubles(0.5, 0.6), doubles(0.6, 0.6), doubles(0.7, 0.9), doubles(0.6, 0.9), 100.0)
    assert rows.tolist() == pytest.approx([4.53989e-5, math.log(2)], rel=1e-6)


def test_dpo_lowers_the_winners_error_and_raises_the_losers():
    zero = doubles(0.0)
    assert slope(lambda d: dpo(d, zero, zero, zero, 100.0), zero).item() == pytest.approx(25)
    assert slope(lambda d: dpo(zero, zero, d, zero, 100.0), zero).item() == pytest.approx(-25)
    assert dpo(doubles(30), zero, zero, zero, 100.0).item() == pytest.approx(1500)  # no overflow


def everything() -> dict[str, tuple[Callable[..., Any], dict[str, Any], set[str]]]:
    """Each loss, its inputs, and which of them are the current policy's."""
    n, rows = Noised, {name: randn(5, seed=i) for i, name in enumerate(("a", "b", "c", "d"))}
    image = {"x_t": n.x_t, "x0": n.x0, "t": n.t}
    ratio = {"log_prob": rows["a"], "log_prob_old": rows["b"]}
    clip: dict[str, Any] = {"clip_low": 9.0, "clip_high": 9.0}
    steps = {"mean": n.v, "mean_old": n.v_old, "std": n.t[:, None, None, None]}
    errors = {"error_w": rows["a"], "error_w_ref": rows["b"], "error_l": rows["c"], "error_l_ref": rows["d"]}
    policies = {"v": n.v, "v_old": n.v_old, "v_ref": n.v_ref}
    unit = {"unit": torch.tensor([1, 1, 2, 2, 2])}
    group = {"error": rows["a"], "error_ref": rows["b"], "advantage": n.advantage}
    return {
        "clipped_surrogate": (clipped_surrogate, {**ratio, "advantage": n.advantage, **clip}, {"log_prob"}),
        "guard_log_ratio": (guard_log_ratio, {**ratio, **steps}, {"log_prob", "mean"}),
        "masked_surrogate": (
            masked_surrogate,
            {**ratio, "advantage": n.advantage, "divergence": rows["c"], "limit": 9.0},
            {"log_prob"},
        ),
        "velocity_kl": (velocity_kl, {"v": n.v, "v_ref": n.v_ref}, {"v"}),
        "matching_error": (matching_error, {"v": n.v, **image}, {"v"}),
        "matching_log_prob": (matching_log_prob, {"error": rows["a"].abs(), "t": n.t}, {"error"}),
        "nft": (lambda **k: nft(**k).rows, {**policies, **image, "advantage": n.advantage, "beta": 0.5}, {"v"}),
        "ram": (ram, {"v": n.v, "v_ref": n.v_ref, **image, "advantage": n.advantage, "weight": 0.3}, {"v"}),
        "dgpo": (dgpo, {**group, **unit, "beta": 2.0}, {"error"}),
        "dpo": (dpo, {**errors, "beta": 2.0}, {"error_w", "error_l"}),
    }


def test_every_loss_is_looked_at():
    public = {name for name, one in vars(losses).items() if getattr(one, "__module__", "") == losses.__name__}
    assert {name for name in public if not name.startswith("_")} == set(everything())


@pytest.mark.parametrize("name", everything())
def test_gradient_flows_through_the_current_policy_only(name):
    loss, inputs, current = everything()[name]
    leaves = {key: value.clone() for key, value in inputs.items() if isinstance(value, torch.Tensor)}
    for value in leaves.values():
        value.requires_grad_(value.is_floating_point())
    loss(**inputs | leaves).sum().backward()
    assert {key for key, value in leaves.items() if value.grad is not None} == current
    assert all(leaves[key].grad.abs().max() > 0 for key in current)


@pytest.mark.parametrize("name", everything())
def test_a_row_is_the_same_alone(name):
    loss, inputs, _ = everything()[name]
    whole, some = loss(**inputs), slice(2, 5)  # the rows of one unit
    alone = {key: value[some] if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
    assert whole.shape == (5,)
    torch.testing.assert_close(loss(**alone), whole[some], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", everything())
def test_column_where_a_row_belongs_is_refused(name):
    """(5, 1) against (5,) would quietly become (5, 5), and (1,) would be everyone's."""
    loss, inputs, _ = everything()[name]
    vectors = [key for key, value in inputs.items() if isinstance(value, torch.Tensor) and value.ndim == 1]
    for key in vectors:
        for wrong in (inputs[key][:, None], inputs[key][:1]):
            with pytest.raises(AssertionError):
                loss(**inputs | {key: wrong})
    latents = [key for key, value in inputs.items() if isinstance(value, torch.Tensor) and value.ndim == 4]
    for key in latents:
        if key != "std":
            with pytest.raises(AssertionError):
                loss(**inputs | {key: inputs[key][:1]})


@pytest.mark.parametrize("name", ["velocity_kl", "matching_error", "nft", "ram"])
def test_half_precision_is_widened_before_the_arithmetic(name):
    loss, inputs, _ = everything()[name]
    wide = {
        key: value.bfloat16().double() if torch.is_tensor(value) and value.ndim > 1 else value
        for key, value in inputs.items()
    }
    narrow = {
        key: value.bfloat16() if torch.is_tensor(value) and value.ndim > 1 else value for key, value in inputs.items()
    }
    got = loss(**narrow)
    torch.testing.assert_close(got.double(), loss(**wide), rtol=1e-4, atol=1e-4)


def test_one_number_a_row_is_a_latent_of_one_element():
    n = Noised
    rows = [each[:, 0, 0, 0] for each in (n.v, n.v_old, n.v_ref, n.x_t, n.x0)]
    columns = [row[:, None] for row in rows]
    for v, v_old, v_ref, x_t, x0 in (rows, columns):
        error = (v - (x_t - x0) / n.t.reshape(-1, *[1] * (v.ndim - 1))).square().reshape(-1)
        torch.testing.assert_close(matching_error(v, x_t, x0, n.t), error)
        torch.testing.assert_close(velocity_kl(v, v_ref), (v - v_ref).square().reshape(-1))
        found = guard_log_ratio(n.advantage, n.t, v, v_old, n.t.reshape(-1, *[1] * (v.ndim - 1)))
        torch.testing.assert_close(found, n.t * (n.advantage - n.t) + (v - v_old).square().reshape(-1) / (2 * n.t))
    assert torch.equal(nft(*rows, n.t, n.advantage, 0.3).rows, nft(*columns, n.t, n.advantage, 0.3).rows)
    flat, upright = (ram(v, v_ref, x_t, x0, n.t, n.advantage, 2.0) for v, _, v_ref, x_t, x0 in (rows, columns))
    assert torch.equal(flat, upright)
