"""Allocation: the budget is exact, the median splits, ties and odd numbers are settled as documented."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aegpo.adapt.allocation import allocate

finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
few_values = st.sampled_from([0.0, 0.5, 1.0])
signals = st.one_of(st.lists(finite, min_size=1, max_size=64), st.lists(few_values, min_size=1, max_size=64))
rules = st.sampled_from(["uniform", "median_split", "proportional", "reward_variance"])


def usable(values, rule):
    """Shares are in proportion to signals without a sign."""
    return [abs(value) for value in values] if rule in ("proportional", "reward_variance") else values


def split(*values: float, **options) -> list[int]:
    return allocate(torch.tensor(values), "median_split", **options).tolist()


@settings(deadline=None)
@given(signals, rules, st.integers(2, 12), st.integers(0, 12))
def test_default_budget_is_exact(values, rule, low, extra):
    high = low + extra
    counts = allocate(torch.tensor(usable(values, rule)), rule, low, high)
    assert counts.dtype == torch.int64 and counts.shape == (len(values),)
    assert counts.sum().item() == len(values) * (low + high) // 2
    if rule in ("uniform", "median_split"):
        assert low <= counts.min().item() and counts.max().item() <= high


@settings(deadline=None)
@given(signals, rules, st.integers(0, 1000))
def test_any_budget_is_exact_and_nobody_gets_less_than_two(values, rule, beyond):
    total = 2 * len(values) + beyond
    counts = allocate(torch.tensor(usable(values, rule)), rule, total=total)
    assert counts.sum().item() == total and counts.min().item() >= 2


@settings(deadline=None)
@given(signals, st.integers(0, 1000))
def test_more_signal_never_gets_fewer_rollouts(values, beyond):
    counts = split(*values, total=2 * len(values) + beyond)
    ranked = sorted(range(len(values)), key=lambda i: (-torch.tensor(values)[i].item(), i))
    if len(set(torch.tensor(values).tolist())) > 1:
        assert [counts[i] for i in ranked] == sorted(counts, reverse=True)


@settings(deadline=None)
@given(st.lists(finite, min_size=2, max_size=64, unique=True).map(lambda values: values[: len(values) // 2 * 2]))
def test_distinct_signals_above_the_median_get_the_high_number(values):
    signal = torch.tensor(values, dtype=torch.float64)
    expected = torch.where(signal > signal.quantile(0.5), 16, 8)
    assert torch.equal(allocate(signal, "median_split"), expected)


def test_low_and_high_are_those_asked_for():
    assert split(0.3, 0.1, 0.2, 0.9) == [16, 8, 8, 16]
    assert split(0.3, 0.1, 0.2, 0.9, low=4, high=20) == [20, 4, 4, 20]


def test_equal_signals_fall_back_to_the_uniform_split():
    assert split(0.0, 0.0, 0.0, 0.0) == [12, 12, 12, 12]
    assert split(0.7, 0.7, 0.7, total=11) == [4, 4, 3]
    assert split(0.7) == [12]


def test_ties_go_to_the_lowest_index():
    assert split(1.0, 1.0, 2.0, 1.0) == [16, 8, 16, 8]
    assert split(2.0, 1.0, 2.0, 2.0) == [16, 8, 16, 8]


def test_odd_number_of_prompts_spreads_the_middle_among_the_lower():
    assert split(0.1, 0.9, 0.5) == [10, 16, 10]
    assert split(0.1, 0.9, 0.5, 0.7, 0.3) == [9, 16, 10, 16, 9]
    assert split(0.5, 0.5, 0.9) == [10, 10, 16]


def test_own_budget_tops_up_those_with_fewest_and_takes_from_those_with_most():
    assert split(4, 3, 2, 1, total=51) == [16, 16, 10, 9]
    assert split(4, 3, 2, 1, total=66) == [17, 17, 16, 16]
    assert split(4, 3, 2, 1, total=45) == [15, 14, 8, 8]
    assert split(1, 2, 3, 4, total=9) == [2, 2, 2, 3]
    assert split(1, 2, 3, 4, total=8) == [2, 2, 2, 2]


def test_uniform_gives_the_remainder_to_the_first():
    assert allocate(torch.tensor([1.0, 5.0, 2.0]), "uniform", total=11).tolist() == [4, 4, 3]
    assert allocate(torch.tensor([1.0, 5.0, 2.0]), "uniform", low=3, high=4).tolist() == [4, 3, 3]


@pytest.mark.parametrize("rule", ["uniform", "median_split"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_signal_that_is_not_finite_is_named(rule, bad):
    with pytest.raises(ValueError, match=r"delta_entropy\[1\] is") as error:
        allocate(torch.tensor([0.5, bad, 0.1, bad]), rule)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rule", ["uniform", "median_split"])
def test_budget_below_two_each_is_refused(rule):
    with pytest.raises(ValueError, match="7 rollouts are too few for 4 prompts"):
        allocate(torch.arange(4.0), rule, total=7)


@pytest.mark.parametrize(("low", "high"), [(1, 16), (9, 8)])
def test_bounds_out_of_order_are_refused(low, high):
    with pytest.raises(ValueError, match="2 <= low <= high"):
        split(0.1, 0.2, low=low, high=high)


def test_unknown_rule_is_named():
    with pytest.raises(ValueError, match="uniform, median_split"):
        allocate(torch.arange(4.0), "best")  # pyright: ignore[reportArgumentType]


def test_shares_are_in_proportion_with_a_floor_of_two():
    def shares(*values, total):
        return allocate(torch.tensor(values), "proportional", total=total).tolist()

    assert shares(1.0, 2.0, 3.0, 4.0, total=40) == [4, 8, 12, 16]
    assert shares(0.0, 0.0, 1.0, 3.0, total=40) == [2, 2, 9, 27]
    assert shares(1.0, 1.0, 1.0, 1000.0, total=40) == [2, 2, 2, 34]
    assert shares(1.0, 1.0, 2.0, total=10) == [3, 2, 5]  # 2.5 2.5 5: of equal remainders the first
    assert shares(3.0, 2.0, 2.0, total=10) == [4, 3, 3]  # 4.29 2.86 2.86: largest remainders
    assert shares(1e-40, 3e-40, total=8) == [2, 6]
    assert shares(1e38, 3e38, total=8) == [2, 6]
    assert allocate(torch.tensor([5e-324, 1e308], dtype=torch.float64), "proportional", total=9).tolist() == [2, 7]


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6, width=32), min_size=2, max_size=64), st.integers(0, 500))
def test_proportional_shares_are_the_nearest_integers_and_follow_the_signal(values, beyond):
    signal, total = torch.tensor(values, dtype=torch.float64), 2 * len(values) + beyond
    counts = allocate(signal, "proportional", total=total)
    order = signal.argsort(stable=True)
    if signal.min() < signal.max():
        assert (counts[order].diff() >= 0)[signal[order].diff() > 0].all()
        above = counts > 2
        if above.any():  # whoever is above the floor is within one of a share of what they have together
            exact = signal[above] / signal[above].sum() * counts[above].sum()
            assert (counts[above] - exact).abs().max() < 2


def test_neymans_allocation_estimates_the_mean_best():
    """Of all splits of the budget, that in proportion to the spreads has the least variance of the mean of means."""
    spreads = torch.tensor([0.4, 0.1, 0.2, 0.3])
    counts = allocate(spreads, "reward_variance", total=20)
    assert counts.tolist() == [8, 2, 4, 6]
    variance = (spreads**2 / counts).sum()
    for i in range(4):
        for j in range(4):
            other = counts.clone()
            other[i] += 1
            other[j] -= 1
            if i != j and other.min() > 0:
                assert (spreads**2 / other).sum() > variance


def test_negative_signals_have_no_shares():
    with pytest.raises(ValueError, match=r"delta_entropy\[1\] is -0.5; .* must not be negative"):
        allocate(torch.tensor([0.3, -0.5]), "proportional")


@pytest.mark.parametrize("rule", ["uniform", "median_split", "proportional", "reward_variance"])
def test_every_rule_names_what_is_not_a_number_and_serves_one_prompt(rule):
    with pytest.raises(ValueError, match=r"delta_entropy\[2\] is nan"):
        allocate(torch.tensor([0.0, 1.0, float("nan")]), rule)
    assert allocate(torch.tensor([0.7]), rule, total=13).tolist() == [13]
    for prompts in range(1, 65):
        total = 12 * prompts
        assert allocate(torch.zeros(prompts), rule, total=total).tolist() == [12] * prompts
        assert allocate(torch.arange(prompts) / 7, rule, total=total).sum() == total
