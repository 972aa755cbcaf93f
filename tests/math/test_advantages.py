"""Group advantages against worked numbers, a loop over groups, and invariances."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aegpo.math.advantages import group_advantages


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def rewards_and_groups() -> st.SearchStrategy[list[tuple[float, int]]]:
    reward = st.floats(-100, 100, width=32)
    group = st.sampled_from([-7, 0, 3, 2**53, 2**53 + 1])
    return st.lists(st.tuples(reward, group), min_size=1, max_size=24)


@pytest.mark.parametrize(
    ("ddof", "eps", "expected"),
    [(0, 1e-4, [-1.068988, -0.534494, 0, 1.603482]), (1, 1e-8, [-0.925820, -0.462910, 0, 1.388730])],
)
def test_group_std_is_the_worked_number(ddof, eps, expected):
    got = group_advantages(torch.tensor([1.0, 2, 3, 6]), ids(0, 0, 0, 0), "group", ddof, eps)
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx(expected, abs=1e-6)


def test_global_std_is_the_worked_number():
    got = group_advantages(torch.tensor([1.0, 3, 10, 14]), ids(4, 4, 9, 9), "global")
    assert got.tolist() == pytest.approx([-0.190689, 0.190689, -0.381378, 0.381378], abs=1e-6)


def test_global_unbiased_std_has_one_degree_of_freedom_less_in_all():
    got = group_advantages(torch.tensor([1.0, 3, 10, 14]), ids(4, 4, 9, 9), "global", ddof=1, eps=0)
    assert got[1].item() == pytest.approx(1 / np.std([1, 3, 10, 14], ddof=1), abs=1e-7)


def test_no_std_is_the_distance_to_the_mean():
    got = group_advantages(torch.tensor([1.0, 3, 10, 14]), ids(4, 4, 9, 9), "none")
    assert got.tolist() == [-1, 1, -2, 2]


def test_uneven_interleaved_groups_equal_a_loop_over_them():
    group = np.array([2**53 + 1, -3, 40, -3, 2**53, 2**53 + 1, -3, 2**53, -3, -3])  # two ids that are one in float64
    rewards = np.array([0.3, -1.0, 5.0, 2.0, 0.1, 0.7, 0.25, 0.9, 8.0, -2.5])
    expected = np.zeros(10)
    for one in set(group.tolist()):
        own = rewards[group == one]
        expected[group == one] = (own - own.mean()) / (own.std() + 1e-4)
    got = group_advantages(torch.from_numpy(rewards), torch.from_numpy(group))
    assert got.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert got[2].item() == 0


def test_float32_rewards_are_normalised_in_float64_and_rounded_once():
    rewards = torch.rand(300, generator=torch.Generator().manual_seed(0))
    own = rewards.numpy().astype(np.float64)
    expected = (own - own.mean()) / (own.std() + 1e-4)
    got = group_advantages(rewards, torch.zeros(300, dtype=torch.int64)).numpy().astype(np.float64)
    assert (np.abs(got - expected) <= 2**-24 * 1.0001 * np.abs(expected)).all()


@pytest.mark.parametrize("std", ["group", "global", "none"])
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("value", [0.1, 1 / 3, -7.3e5, 1e-30])
def test_equal_rewards_get_exactly_zero(std, ddof, eps, value):
    rewards = torch.tensor([value] * 7 + [1.0, 2.0, value], dtype=torch.float64)
    got = group_advantages(rewards, ids(5, 5, 5, 5, 5, 5, 5, 8, 8, 1), std, ddof, eps)
    assert got[:7].tolist() == [0] * 7 and got[9].item() == 0
    assert got[7].item() < 0 < got[8].item()


def test_reward_that_differs_in_the_last_bit_is_not_flattened():
    rewards = torch.tensor([0.1, 0.1, np.nextafter(0.1, 1)], dtype=torch.float64)
    got = group_advantages(rewards, ids(0, 0, 0), eps=0)
    assert got.tolist() == pytest.approx([-(0.5**0.5), -(0.5**0.5), 2**0.5], abs=1e-6)


def test_small_differences_on_a_large_offset_survive():
    rewards = torch.tensor([1.0, 2, 3, 6], dtype=torch.float64) + 1e9
    expected = group_advantages(rewards - 1e9, ids(0, 0, 0, 0))
    assert torch.equal(group_advantages(rewards, ids(0, 0, 0, 0)), expected)


def test_advantages_are_clamped_on_both_sides():
    rewards = torch.tensor([0.0] * 40 + [1.0] + [0.0] * 40 + [-1.0])
    group = ids(*[0] * 41, *[1] * 41)
    assert group_advantages(rewards, group)[[40, 81]].tolist() == [5, -5]
    assert group_advantages(rewards, group, clip=2.0)[[40, 81]].tolist() == [2, -2]
    assert group_advantages(rewards, group, eps=0, clip=100.0)[40].item() == pytest.approx(40**0.5, abs=1e-5)


@settings(deadline=None)
@given(rewards_and_groups(), st.randoms(use_true_random=False), st.sampled_from(["group", "global", "none"]))
def test_order_and_names_of_groups_do_not_matter(rows, shuffle, std):
    rewards, group = torch.tensor([r for r, _ in rows]), ids(*[g for _, g in rows])
    order = list(range(len(rows)))
    shuffle.shuffle(order)
    renamed = torch.tensor([{-7: 4, 0: -1, 3: 3, 2**53: 0, 2**53 + 1: 10}[g] for _, g in rows])
    expected = group_advantages(rewards, group, std)
    torch.testing.assert_close(group_advantages(rewards[order], renamed[order], std), expected[order])


@settings(deadline=None)
@given(rewards_and_groups())
def test_advantages_of_a_group_sum_to_zero(rows):
    rewards, group = torch.tensor([r for r, _ in rows]), ids(*[g for _, g in rows])
    got = group_advantages(rewards, group, clip=float("inf")).double()
    for one in group.unique():
        assert got[group == one].sum().item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_reward_that_is_not_finite_is_named(bad):
    with pytest.raises(ValueError, match=r"rewards\[2\]"):
        group_advantages(torch.tensor([1.0, 2.0, bad]), ids(0, 0, 1))


def test_unknown_std_is_named():
    with pytest.raises(ValueError, match="group, global, none"):
        group_advantages(torch.tensor([1.0, 2.0]), ids(0, 0), "batch")  # pyright: ignore[reportArgumentType]


def test_float_group_ids_are_our_own_mistake():
    with pytest.raises(AssertionError, match="int64"):
        group_advantages(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0]))
