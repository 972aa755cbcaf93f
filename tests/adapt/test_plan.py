"""The plan: which signal decides what, and what is remembered of it."""

import numpy as np
import pytest
import torch

from aegpo.adapt import memory as memories
from aegpo.adapt.memory import Memory
from aegpo.adapt.plan import make_plan, policy_noise, remember
from aegpo.config import resolve
from aegpo.math.schedules import sd3
from aegpo.types import Prompt, Signals

PROMPTS = [Prompt(i, str(i), {}) for i in (7, 3, 5, 4)]
LAYER = {"algorithm": "aegpo", "prompts_per_step": 4, "rollouts_per_step": 48, "exploration": {"rule": "entropy_peaks"}}
SIGMAS = sd3(10)


def plan(layer, entropy=None, base=None, memory=None, step=0, prompts=PROMPTS):
    signals = None if entropy is None else Signals(entropy, base)
    return make_plan(resolve(LAYER, layer), prompts, signals, memory or Memory(), SIGMAS, step)


def steps(made):
    return [row.nonzero().flatten().tolist() for row in made.explored]


def moved(*by):
    """Entropies that moved by so much, on average, from curves with a peak of change at steps 5 and 6 of prompt 0."""
    entropy = torch.rand(4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    base = entropy - torch.tensor(by)[:, None]
    base[0, 5] -= 3
    base[0, 6] += 3
    return entropy, base


def test_the_plan_follows_the_signals():
    entropy, base = moved(0.1, -0.4, 0.2, 0.0)
    made = plan({}, entropy, base)
    assert made.rollouts.tolist() == [8, 16, 16, 8]
    assert (
        steps(plan({"algorithm": "aegpo-paper"}, entropy, base))
        == entropy[:, :9].argsort(1, descending=True)[:, :4].sort(1).values.tolist()
    )
    assert steps(plan({"exploration": {"rule": "delta_entropy_peaks", "k": 2}}, entropy, base))[0] == [5, 6]
    assert made.group.tolist() == [0] * 8 + [1] * 16 + [2] * 16 + [3] * 8
    shares = plan({"allocation": {"rule": "proportional"}}, entropy, base).rollouts.tolist()
    assert shares == [7, 26, 13, 2]  # 46 in proportion to .1 .4 .2, and the least for the prompt that did not move


def test_a_relative_move_is_measured_by_the_bases_own_entropy():
    base = torch.tensor([1.0, 4.0, 1.0, 4.0], dtype=torch.float64)[:, None].expand(4, 10)
    entropy = base + torch.tensor([0.2, 0.3, 0.1, -0.1])[:, None]
    assert plan({}, entropy, base).rollouts.tolist() == [16, 16, 8, 8]
    assert plan({"allocation": {"relative": True}}, entropy, base).rollouts.tolist() == [
        16,
        8,
        16,
        8,
    ]  # .2 .075 .1 .025


def test_peaks_keep_their_distance_and_random_steps_are_drawn_anew():
    layer = {"exploration": {"rule": "entropy_peaks", "k": 2, "min_distance": 3}}
    falling = torch.arange(10, 0, -1.0).expand(4, 10)
    assert steps(plan(layer, falling, falling)) == [[0, 3]] * 4
    random = {"allocation": {"rule": "uniform"}, "exploration": {"rule": "random"}}
    drawn = [plan(random | {"seed": seed}, step=step).explored for seed, step in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert [torch.equal(drawn[0], other) for other in drawn[1:]] == [True, False, False]


def test_the_three_readings_of_a_peak():
    shape = torch.tensor([3.5, 3.3, 3.3, 3.3, 3.4, 3.4, 3.5, 3.6, 3.7, 3.8], dtype=torch.float64)
    entropy = shape + torch.zeros(4, 10)
    entropy[0, 2] += 0.05
    entropy[1, 4] += 0.05
    entropy[2, 3] *= 1.8  # by more than the sampler's noise is less there, 0.446, than at step 1, 0.743

    def reading(name):
        return steps(plan({"exploration": {"rule": "entropy_peaks", "k": 1, "reading": name}}, entropy, entropy))

    assert reading("plain") == [[8], [8], [3], [8]]
    assert reading("above_batch")[:3] == [[2], [4], [3]]
    assert reading("times_noise") == [[1], [1], [3], [1]]


def test_the_papers_own_peaks_stay_to_be_had_and_ours_follow_the_ablation():
    """On the curve measured in the embedded world, which is highest late, where noise is small and teaches nothing."""
    measured = [2.26, 2.28, 2.26, 2.26, 2.27, 2.27, 2.28, 2.29, 2.30, 2.31]
    entropy = torch.tensor(measured, dtype=torch.float64).expand(4, 10)
    assert steps(plan({"algorithm": "aegpo-paper"}, entropy, entropy)) == [[1, 6, 7, 8]] * 4
    spread = [0.227, 0.274, 0.254, 0.200, 0.193, 0.143, 0.101, 0.085, 0.076, 0.0]  # measured there too
    memory = Memory(reward_spread=torch.tensor(spread, dtype=torch.float64))
    assert steps(plan({"algorithm": "aegpo"}, entropy, entropy, memory)) == [[0, 1, 2, 3]] * 4
    for name in ("aegpo", "aegpo-paper"):
        config = resolve(LAYER, {"algorithm": name})
        how = config.allocation
        assert (how.rule, how.low, how.high, config.exploration.k) == ("median_split", 8, 16, 4)


def test_every_setting_of_exploration_reaches_the_choice():
    """Two peaks side by side and one apart; the second prompt's curve is the mirror of the first's."""
    curve = torch.tensor([1.0, 5.0, 6.0, 5.5, 1.0, 3.0, 1.0, 1.0, 2.0, 9.0], dtype=torch.float64)
    entropy = torch.stack([curve, 10 - curve, curve, curve])
    peaks = {"rule": "entropy_peaks", "k": 2}

    def chosen(**more):
        return steps(plan({"exploration": peaks | more}, entropy, entropy))

    assert chosen()[:2] == [[2, 3], [0, 4]]
    assert chosen(local_maxima=True)[0] == [2, 5]
    assert chosen(min_distance=3)[0] == [2, 5]
    assert chosen(min_distance=4)[0] == [2, 8]
    assert chosen(per="batch") == [[2, 3]] * 4
    assert chosen(per="batch", k=3) == [[1, 2, 3]] * 4
    assert chosen(until=3)[0] == [1, 2] and chosen(start=3, until=-3)[0] == [3, 5]


def test_policy_noise_is_the_samplers_standard_deviation():
    """Flow-GRPO's `eta sqrt(h s / (1 - s))`, its first s in 1 - s being sigma[1]; and `s' sin(eta pi / 2)` of CPS."""
    s, after = SIGMAS[:-2].numpy(), SIGMAS[1:-1].numpy()
    below = np.where(s == 1, SIGMAS[1], s)
    flow = 0.7 * np.sqrt(s / (1 - below)) * np.sqrt(s - after)
    np.testing.assert_allclose(
        policy_noise(resolve({"algorithm": "aegpo", "sampler": {"eta": 0.7}}), SIGMAS)[:-1], flow, rtol=1e-12
    )
    cps = resolve({"algorithm": "aegpo", "sampler": {"kind": "cps", "eta": 0.6}})
    np.testing.assert_allclose(policy_noise(cps, SIGMAS)[:-1], after * np.sin(0.3 * np.pi), rtol=1e-12)
    assert policy_noise(cps, SIGMAS)[-1] == 0
    layer = {"allocation": {"rule": "uniform"}, "sampler": {"kind": "cps"}, "exploration": {"rule": "policy_noise"}}
    assert steps(plan(layer)) == [[0, 1, 2, 3]] * 4


def test_the_measured_spread_of_reward_is_followed():
    memory = Memory(reward_spread=torch.tensor([0.2, 0.3, 0.1, 0.3, 0.25, 0, 0, 0, 0, 9], dtype=torch.float64))
    layer = {"allocation": {"rule": "uniform"}, "exploration": {"rule": "reward_spread", "k": 3}}
    assert steps(plan(layer, memory=memory)) == [[1, 3, 4]] * 4


def test_reward_variance_takes_the_remembered_spread_and_the_mean_for_prompts_not_yet_seen():
    layer = {"allocation": {"rule": "reward_variance"}, "exploration": {"rule": "window"}}
    memory = Memory()
    assert plan(layer, memory=memory).rollouts.tolist() == [12] * 4
    memory.visit([7, 3], torch.tensor([0.3, 0.1]), smoothing=0.0)
    assert plan(layer, memory=memory).rollouts.tolist() == [18, 6, 12, 12]
    assert memory.signal == pytest.approx({7: 0.3, 3: 0.1})  # a plan adds nothing of its own


def test_smoothing_is_an_exponential_average_over_the_visits_of_each_prompt():
    layer = {"allocation": {"smoothing": 0.75}}
    memory = Memory()
    for by in ((0.4, 0.2, 0.0, 0.1), (0.0, 0.2, 0.3, 0.1)):
        made = plan(layer, *moved(*by), memory=memory)
    assert [memory.signal[p.id] for p in PROMPTS] == pytest.approx([0.3, 0.2, 0.075, 0.1])
    assert made.rollouts.tolist() == [16, 16, 8, 8]
    assert plan({}, *moved(0.0, 0.2, 0.3, 0.1), memory=memory).rollouts.tolist() == [8, 16, 16, 8]


def test_nobody_is_told_apart_before_the_first_update():
    for rule in ("median_split", "proportional", "reward_variance"):
        made = plan({"allocation": {"rule": rule}}, torch.ones(4, 10), torch.ones(4, 10))
        assert made.rollouts.tolist() == [12] * 4


def test_memory_survives_a_checkpoint():
    memory = Memory()
    assert Memory.of(memory.tensors()) == memory
    curves = torch.rand(3, 10, dtype=torch.float64)
    memory.add_base_entropy(dict(zip([(7, 0), (7, 1), (3, 0)], curves, strict=True)))
    memory.visit([3, 2**40], torch.tensor([0.1, 0.2], dtype=torch.float64), 0.5)
    memory.reward_spread = curves[0]
    again = Memory.of(memory.tensors())
    assert again.signal == memory.signal and list(again.base_entropy) == list(memory.base_entropy)
    assert all(torch.equal(again.base_entropy[key], curve) for key, curve in memory.base_entropy.items())
    assert again.reward_spread is not None and torch.equal(again.reward_spread, curves[0])


def test_memory_fills_before_its_oldest_make_room(monkeypatch):
    monkeypatch.setattr(memories, "REMEMBERED", 5)
    memory, sizes = Memory(), []
    for i in range(8):
        memory.add_base_entropy({(i, 0): torch.zeros(2)})
        sizes.append(len(memory.base_entropy))
    assert sizes == [1, 2, 3, 4, 5, 5, 5, 5]
    assert list(memory.base_entropy) == [(i, 0) for i in range(3, 8)]


def test_a_prompt_not_yet_seen_gets_the_mean_of_the_others_of_its_step():
    memory = Memory()
    memory.visit([1, 2, 9], torch.tensor([0.1, 0.3, 50.0]), 0.0)
    assert memory.recall([1, 5, 2]).tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_what_is_only_rounding_moves_nobody():
    base = torch.full((4, 10), 2.3, dtype=torch.float64)
    entropy = base + torch.tensor([0.0, 2e-8, -2e-8, 1e-7], dtype=torch.float64)[:, None]
    for rule in ("median_split", "proportional"):
        assert plan({"allocation": {"rule": rule}}, entropy, base).rollouts.tolist() == [12] * 4
    entropy[3] += 1e-4
    assert plan({"allocation": {"rule": "proportional"}}, entropy, base).rollouts.tolist() == [2, 2, 2, 42]


# ---------------------------------------------------------------- windows that move, and levels that are drawn


def first_steps(layer, training_steps):
    return [steps(plan({"allocation": {"rule": "uniform"}} | layer, step=i))[0] for i in training_steps]


def test_the_fast_window_begins_at_each_of_its_three_places():
    chosen = first_steps({"algorithm": "flow-grpo-fast"}, range(60))
    assert {tuple(one) for one in chosen} == {(0, 1, 2), (1, 2, 3), (2, 3, 4)}


def test_mixgrpos_window_moves_on_and_begins_again():
    layer = {"algorithm": "mix-grpo", "exploration": {"moves_every": 2}}
    chosen = first_steps(layer, range(14))
    assert [one[0] for one in chosen] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 0, 0]
    assert all(one == list(range(one[0], one[0] + 4)) for one in chosen)
    layer = {"algorithm": "mix-grpo", "exploration": {"moves_every": 1, "start": 3, "until": -1, "k": 3}}
    assert [one[0] for one in first_steps(layer, range(5))] == [3, 4, 5, 3, 4]


def test_a_curve_is_the_distribution_that_noise_levels_are_drawn_from():
    """Changes of either sign: each level is as frequent as its size above the least says, and weighs the inverse."""
    change = torch.tensor([0.0, -0.4, 0.1, 0.1, 0.2, 0.0, 0.1, 0.0, 0.1, 7.0], dtype=torch.float64)
    base = torch.ones(4, 10, dtype=torch.float64)
    layer = {"algorithm": "awm", "exploration": {"rule": "delta_entropy_peaks", "k": 2, "start": 1, "until": 7}}
    probability = 2 * (0.8 * change[1:7].abs() / 0.9 + 0.2 / 6)
    counts = torch.zeros(10)
    for step in range(300):
        made = plan(layer, base + change, base, step=step)
        counts += made.explored.sum(0)
        assert made.explored.sum(1).tolist() == [2] * 4
        torch.testing.assert_close(made.weight[0, 1:7], 2 / (6 * probability), rtol=1e-9, atol=0)
    assert counts[[0, 7, 8, 9]].sum() == 0
    frequency = counts[1:7] / 1200
    error = (probability * (1 - probability) / 1200).sqrt()
    assert ((frequency - probability).abs() <= 4 * error + 1e-9).all()
    unweighed = plan(layer | {"exploration": layer["exploration"] | {"importance": False}}, base + change, base)
    assert unweighed.weight.unique().tolist() == [1.0]


def test_without_noise_on_the_way_its_noise_is_that_of_bringing_an_image_back():
    noise = policy_noise(resolve({"algorithm": "awm"}), SIGMAS)
    assert noise.tolist() == [*SIGMAS[:9].tolist(), 0.0]


def test_a_group_of_which_nothing_is_known_keeps_the_spread_it_had():
    config = resolve({"algorithm": "flow-grpo", "allocation": {"rule": "reward_variance"}})
    memory, prompts, group = Memory(), [Prompt(4, "", {}), Prompt(9, "", {})], torch.tensor([0, 0, 1, 1])
    remember(config, prompts, torch.tensor([0.0, 2.0, 1.0, 5.0]), group, memory)
    assert memory.signal == {4: pytest.approx(2**0.5), 9: pytest.approx(8**0.5)}
    remember(config, prompts, torch.tensor([float("nan")] * 2 + [3.0, 3.0]), group, memory)
    assert memory.signal == {4: pytest.approx(2**0.5), 9: 0}
