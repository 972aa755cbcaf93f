"""Exploration: peaks against numpy and brute force, fallbacks, spacing, the last step, invariances."""

from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import find_peaks

from aegpo.adapt.exploration import draw_levels, explore, window_start

PEAKS = ("entropy_peaks", "delta_entropy_peaks", "policy_noise", "reward_spread")
RULES = ("all", "window", "random", *PEAKS)
H = [3.51, 3.34, 3.33, 3.35, 3.38, 3.43, 3.49, 3.57, 3.64, 9.0]
DELTA = [-0.049, -0.064, -0.052, -0.039, -0.030, -0.024, -0.019, -0.017, -0.014, -9.0]


def steps(*values: float, rule: Any = "entropy_peaks", **options: Any) -> list[int]:
    """The explored steps of one prompt."""
    mask = explore(torch.tensor([values]), rule, **options)
    assert mask.dtype == torch.bool and mask.shape == (1, len(values))
    return mask[0].nonzero().flatten().tolist()


def noise(prompts: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(prompts, length, generator=torch.Generator().manual_seed(seed))


def test_peaks_of_measured_curves():
    assert steps(*H) == [0, 6, 7, 8]
    assert steps(*DELTA, rule="delta_entropy_peaks") == [0, 1, 2, 3]
    assert steps(*DELTA, rule="entropy_peaks") == [5, 6, 7, 8]


@pytest.mark.parametrize("k", [1, 4, 9])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("rule", PEAKS)
def test_peaks_are_the_highest_values(k, last, rule):
    entropy = noise(20, 10)
    mask = explore(entropy, rule, k, last=last).numpy()
    signal = np.abs(entropy.numpy()) if rule == "delta_entropy_peaks" else entropy.numpy()
    expected = np.zeros_like(mask)
    np.put_along_axis(expected, np.argsort(-signal[:, : 10 if last else 9], axis=1)[:, :k], True, axis=1)
    assert (mask == expected).all()


@pytest.mark.parametrize("rule", RULES)
def test_last_step_is_explored_only_when_asked_for(rule):
    entropy = noise(8, 6)
    entropy[:, -1] = 50.0
    assert not explore(entropy, rule, 5)[:, -1].any()
    assert explore(entropy, rule, 6, last=True).all()
    assert explore(entropy, rule, 5)[:, :-1].all()


def test_all_is_every_step_and_ignores_k():
    assert steps(1.0, 2.0, 3.0, rule="all", k=40) == [0, 1]
    assert steps(1.0, 2.0, 3.0, rule="all", last=True) == [0, 1, 2]


def test_window_begins_where_it_is_told():
    assert steps(*H, rule="window", k=3) == [0, 1, 2]
    assert steps(*H, rule="window", k=3, start=6) == [6, 7, 8]
    assert steps(*H, rule="window", k=3, start=7, last=True) == [7, 8, 9]


@pytest.mark.parametrize("rule", ["entropy_peaks", "delta_entropy_peaks"])
def test_flat_signal_takes_the_first_steps(rule):
    assert steps(*[0.0] * 10, rule=rule) == [0, 1, 2, 3]
    assert steps(*[-2.5] * 10, rule=rule, k=3) == [0, 1, 2]
    assert steps(*[0.0] * 10, rule=rule, k=3, min_distance=3) == [0, 3, 6]


def test_ties_go_to_the_earliest_step():
    assert steps(1.0, 3.0, 2.0, 2.0, 3.0, 2.0, 0.0, k=3) == [1, 2, 4]


def test_delta_of_some_prompts_may_be_flat():
    delta = torch.tensor([[0.0] * 6, [0, 0, -1, 0.5, 0, 0]])
    mask = explore(delta, "delta_entropy_peaks", 2)
    assert mask.tolist() == [[True, True] + [False] * 4, [False, False, True, True, False, False]]


def test_spaced_peaks_are_greedy():
    assert steps(0, 5, 6, 5, 0, 1, 0, 4, 9, 0, k=3, min_distance=2) == [2, 5, 8]
    assert steps(0, 5, 6, 5, 0, 1, 0, 4, 9, 0, k=3, min_distance=2, last=True) == [2, 5, 8]
    assert steps(0, 5, 6, 5, 0, 1, 0, 4, 9, 9, k=2, min_distance=3) == [2, 8]


def test_spaced_peak_that_leaves_no_room_is_passed_over():
    assert steps(0, 1, 0, 9, 0, 1, 0, 0, k=4, min_distance=2) == [0, 2, 4, 6]
    assert steps(0, 9, 0, 0, 9, 0, 0, 9, 0, 0, k=4, min_distance=2) == [1, 4, 6, 8]


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_spaced_peaks_are_the_first_in_order_of_height_of_all_that_fit(seed, length, k, distance, last):
    """Greedy with room kept: of all sets of k spaced steps, the one whose sorted heights come first."""
    signal = noise(1, length + 1, seed)[0].tolist()
    available = length + 1 if last else length
    fitting = [
        chosen for chosen in combinations(range(available), k) if all(b - a >= distance for a, b in pairwise(chosen))
    ]
    if fitting:
        best = max(fitting, key=lambda chosen: sorted((signal[i] for i in chosen), reverse=True))
        assert steps(*signal, k=k, min_distance=distance, last=last) == list(best)
    else:
        with pytest.raises(ValueError, match=f"{k} steps, {distance} apart, do not fit into {available} steps"):
            steps(*signal, k=k, min_distance=distance, last=last)


@pytest.mark.parametrize("rule", ["all", "window", "entropy_peaks", "delta_entropy_peaks"])
@pytest.mark.parametrize("distance", [1, 2])
def test_permuting_the_prompts_permutes_the_rows(rule, distance):
    entropy, order = noise(12, 10), torch.randperm(12, generator=torch.Generator().manual_seed(1))
    expected = explore(entropy, rule, min_distance=distance)[order]
    assert torch.equal(explore(entropy[order], rule, min_distance=distance), expected)


def test_random_is_keyed_by_its_seed_and_differs_between_prompts():
    entropy = noise(200, 10)
    mask = explore(entropy, "random", 4, seed=3)
    assert torch.equal(mask, explore(torch.zeros(200, 10), "random", 4, seed=3))
    assert not torch.equal(mask, explore(entropy, "random", 4, seed=4))
    assert (mask.sum(1) == 4).all() and len(mask.unique(dim=0)) > 60


def test_random_explores_every_step_equally_often():
    prompts = 2000
    share = explore(torch.zeros(prompts, 10), "random", 4).double().mean(0)[:9]
    error = (4 / 9 * 5 / 9 / prompts) ** 0.5
    assert ((share - 4 / 9).abs() < 4 * error).all()


@pytest.mark.parametrize("rule", ["window", "random", "entropy_peaks", "delta_entropy_peaks"])
def test_more_steps_than_there_are_is_refused(rule):
    with pytest.raises(ValueError, match="into 4 steps") as error:
        explore(noise(2, 5), rule, 5)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("start", [-1, 7])
def test_window_outside_the_trajectory_is_refused(start):
    with pytest.raises(ValueError, match="does not fit into 9 steps"):
        steps(*H, rule="window", k=3, start=start)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_signal_that_is_not_finite_is_named(bad):
    entropy = noise(3, 5)
    entropy[1, 4] = bad
    with pytest.raises(ValueError, match=r"entropy\[1, 4\] is"):
        explore(entropy, "entropy_peaks")


def test_unknown_rule_is_named():
    with pytest.raises(ValueError, match="all, window, random, entropy_peaks, delta_entropy_peaks"):
        steps(*H, rule="peaks")


def test_local_maxima_come_before_steps_that_are_merely_high():
    curve = (5.0, 1.0, 3.0, 2.9, 2.8, 1.0, 2.0, 1.0, 1.5, 9.0)
    assert steps(*curve, k=3) == [0, 2, 3]
    assert steps(*curve, k=3, local_maxima=True) == [0, 2, 6]
    assert steps(*curve, k=4, local_maxima=True) == [0, 2, 6, 8]
    assert steps(*curve, k=5, local_maxima=True) == [0, 2, 3, 6, 8]  # where they are too few, the next highest


@pytest.mark.parametrize("seed", range(20))
def test_local_maxima_are_scipys(seed):
    """scipy's peaks of the curve between two walls lower than all of it; ties make plateaus."""
    curve = np.random.default_rng(seed).integers(0, 4, 12).astype(float)
    peaks, plateaus = find_peaks(np.concatenate([[-1], curve, [-1]]), plateau_size=1)
    first = (plateaus["left_edges"] - 1).tolist()
    assert len(peaks) == len(first)
    chosen = steps(*curve, k=len(first), local_maxima=True, last=True)
    assert chosen == first


def test_the_last_step_is_no_neighbour():
    """A curve that rises to its end has its peak at the last step that may be chosen."""
    assert steps(3.0, 1.0, 2.0, 4.0, k=2, local_maxima=True) == [0, 2]


@pytest.mark.parametrize("rule", PEAKS)
def test_a_batch_follows_its_mean_curve(rule):
    entropy = noise(6, 10)
    mask = explore(entropy, rule, 3, per="batch")
    mean = (entropy.abs() if rule == "delta_entropy_peaks" else entropy).mean(0)
    assert torch.equal(mask, explore(mean[None], "entropy_peaks", 3).expand(6, -1))


# ---------------------------------------------------------------- levels drawn from a curve


CURVE = torch.tensor([[3.0, 1.0, 2.0, 1.0, 1.5, 1.1], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)


def probabilities(k):
    """By hand: a fifth shared alike, the rest by height above the lowest, times k, at most 1."""
    share = torch.tensor([2.0, 0.0, 1.0, 0.0, 0.5, 0.1], dtype=torch.float64) / 3.6
    return k * (0.8 * share + 0.2 / 6)


def test_k_levels_are_drawn_each_with_its_own_probability_and_the_loss_is_kept():
    k, draws = 2, 4000
    wanted = probabilities(k)
    assert wanted.max() < 1
    chosen, weights = zip(*(draw_levels(CURVE, k, seed) for seed in range(draws)), strict=True)
    assert all(row.sum(1).tolist() == [k, k] for row in chosen)
    drawn = torch.stack(chosen).double()
    for prompt, expected in enumerate((wanted, torch.full((6,), k / 6, dtype=torch.float64))):
        error = (expected * (1 - expected) / draws).sqrt()
        assert ((drawn[:, prompt].mean(0) - expected).abs() < 4 * error).all()
        torch.testing.assert_close(weights[0][prompt], k / (6 * expected))
    loss = torch.tensor([5.0, -1.0, 0.3, 2.0, 8.0, 1.0], dtype=torch.float64)
    sums = (drawn * torch.stack(weights) * loss).sum(2)
    for prompt in (0, 1):
        error = sums[:, prompt].std() / draws**0.5
        assert abs(sums[:, prompt].mean() - k / 6 * loss.sum()) < 4 * error


def test_a_level_that_is_worth_more_than_one_draw_is_drawn_once_every_time():
    peaked = torch.tensor([[0.0, 100.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    for seed in range(50):
        chosen, weight = draw_levels(peaked, 3, seed)
        assert chosen[0, 1] and chosen.sum() == 3
    assert weight[0, 1].item() == pytest.approx(3 / 5)  # k / (N pi) with pi = 1
    probability = 3 / (5 * weight[0])
    assert probability.sum().item() == pytest.approx(3)
    assert probability[3] > probability[0] > 0
    everything, _ = draw_levels(peaked, 5, 0)
    assert everything.all()


def test_equal_levels_weigh_one_and_no_weight_leaves_its_bounds():
    _, weight = draw_levels(torch.full((3, 7), 2.5), 4, 0)
    torch.testing.assert_close(weight, torch.ones(3, 7, dtype=torch.float64))
    curves = torch.rand(200, 9, generator=torch.Generator().manual_seed(0)) ** 8
    _, weight = draw_levels(curves, 2, 1)
    assert weight.max() <= 1 / 0.2 + 1e-9
    _, plain = draw_levels(curves, 2, 1, importance=False)
    assert (plain == 1).all()


# ---------------------------------------------------------------- a window that moves


def starts(moves, steps, first=0, last=6, every=25):
    return [window_start(moves, step, first, last, every, seed=step) for step in range(steps)]


def test_a_window_moves_one_step_every_so_often_and_starts_over():
    assert starts("none", 3, first=2) == [2, 2, 2]
    assert starts("progressive", 200) == ([c for c in range(7) for _ in range(25)] * 2)[:200]
    assert starts("progressive", 8, first=3, last=4, every=2) == [3, 3, 4, 4] * 2


def test_late_places_get_less_training_under_mixgrpos_two_decays():
    """int(I (1 - c/M) + max(1, I // 4) c/M), and ceil(I e^(-.1 max(0, c - 13))), by hand (arXiv 2507.21802)."""
    linear = starts("linear", 8 + 6 + 5 + 3, last=3, every=8)
    assert linear == [0] * 8 + [1] * 6 + [2] * 5 + [3] * 3
    exponential = starts("exponential", 14 * 5 + 5 + 5 + 4, last=16, every=5)
    assert [exponential.count(c) for c in (0, 13, 14, 15, 16)] == [5, 5, 5, 5, 4]
    assert window_start("exponential", 14 * 5 + 5 + 5 + 4, 0, 16, 5) == 0


def test_a_random_window_is_anywhere_alike():
    drawn = starts("random", 3000, first=1, last=5)
    counts = [drawn.count(c) for c in range(1, 6)]
    assert sum(counts) == 3000
    assert max(abs(count - 600) for count in counts) < 4 * (3000 * 0.2 * 0.8) ** 0.5


def test_windows_keep_their_distance_and_ranges_their_ends():
    flat = torch.zeros(1, 10)
    assert explore(flat, "window", k=4, min_distance=2)[0].nonzero().flatten().tolist() == [0, 2, 4, 6]
    assert explore(flat, "window", k=3, start=2, until=5)[0].nonzero().flatten().tolist() == [2, 3, 4]
    assert explore(flat, "all", start=1, until=4)[0].nonzero().flatten().tolist() == [1, 2, 3]
    rising = torch.arange(10.0)[None]
    assert explore(rising, "entropy_peaks", k=2, start=1, until=5)[0].nonzero().flatten().tolist() == [3, 4]
    with pytest.raises(ValueError, match="4 steps, 3 apart, from step 0 on does not fit into 9 steps"):
        explore(flat, "window", k=4, min_distance=3)
