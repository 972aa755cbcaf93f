"""Group advantages against worked numbers, a loop over groups, and invariances."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aegpo.math.advantages import best_of, gdpo, group_advantages, node_returns, tree_advantages


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


# Two prompts: one tree of four leaves that splits at depth 0 and depth 2, and one of three leaves that is deeper.
TREE = torch.tensor([[7, 7, 40], [7, 7, 2], [3, 3, 5], [3, 3, 9], [1, 30, 0], [1, 31, 7], [1, 31, 8]])
LEAVES = torch.tensor([1.0, 2, 3, 6, 5, 1, 3])
TREE_GROUP = ids(4, 4, 4, 4, -2, -2, -2)


def test_return_of_a_node_is_the_mean_of_its_leaves():
    expected = [[1.5, 1.5, 1], [1.5, 1.5, 2], [4.5, 4.5, 3], [4.5, 4.5, 6], [3, 5, 5], [3, 2, 1], [3, 2, 3]]
    got = node_returns(LEAVES, TREE)
    assert got.dtype == torch.float64
    assert got.flatten().tolist() == pytest.approx(np.ravel(expected).tolist(), abs=1e-15)


def test_path_log_probabilities_weigh_the_leaves_of_a_node_by_their_softmax():
    log_prob = torch.tensor([[0.0, 1e4, 0], [np.log(3), 1e4, 0], [-1e4, 5, 0], [-1e4, 3, 0]] + [[np.nan] * 3] * 3)
    node = TREE.clone()
    node[4:] = -1
    got = node_returns(LEAVES, node, log_prob)
    second = (3 * np.exp(5) + 6 * np.exp(3)) / (np.exp(5) + np.exp(3))
    expected = [[1.75, 1.5, 1], [1.75, 1.5, 2], [4.5, second, 3], [4.5, second, 6]]
    assert got[:4].flatten().tolist() == pytest.approx(np.ravel(expected).tolist(), abs=1e-9)
    assert not got[4:].any()
    alike = node_returns(LEAVES, TREE, torch.full((7, 3), -2.5))
    torch.testing.assert_close(alike, node_returns(LEAVES, TREE))


def test_returns_equal_a_loop_over_the_nodes():
    generator = torch.Generator().manual_seed(0)
    node = torch.randint(-1, 6, (40, 5), generator=generator)
    rewards = torch.randn(40, generator=generator, dtype=torch.float64)
    log_prob = torch.randn(40, 5, generator=generator)
    plain, weighed = np.zeros((40, 5)), np.zeros((40, 5))
    for depth in range(5):
        for one in range(6):
            own = (node[:, depth] == one).numpy()
            weight = np.exp(log_prob[:, depth].double().numpy()[own])
            plain[own, depth] = rewards.numpy()[own].mean()
            weighed[own, depth] = (weight * rewards.numpy()[own]).sum() / weight.sum()
    large = torch.where(node < 0, -1, node + 2**62)  # too large for a product of ids to hold
    torch.testing.assert_close(node_returns(rewards, large), torch.from_numpy(plain))
    torch.testing.assert_close(node_returns(rewards, large, log_prob), torch.from_numpy(weighed))


def test_advantages_of_a_tree_are_the_worked_numbers():
    """The four leaves (1, 2, 3, 6) have parents of 1.5 and 4.5; a node counts once, so their mean is 3."""
    got = tree_advantages(LEAVES[:4], TREE_GROUP[:4], TREE[:4], ddof=1, eps=1e-8)
    assert got.dtype == torch.float32
    assert got[:, 0].tolist() == pytest.approx([-0.707107, -0.707107, 0.707107, 0.707107], abs=1e-6)
    assert torch.equal(got[:, 1], got[:, 0])
    assert got[:, 2].tolist() == pytest.approx([-0.925820, -0.462910, 0, 1.388730], abs=1e-6)
    assert tree_advantages(LEAVES[:4], TREE_GROUP[:4], TREE[:4])[:, 2].tolist() == pytest.approx(
        [-1.068988, -0.534494, 0, 1.603482], abs=1e-6
    )


def test_nodes_of_unequal_width_count_once_and_only_node_of_its_prompt_gets_zero():
    got = tree_advantages(LEAVES, TREE_GROUP, TREE, "none")
    assert got[4:, 0].tolist() == [0, 0, 0]
    assert got[4:, 1].tolist() == [1.5, -1.5, -1.5]  # of 5 and 2, not of 5, 2 and 2
    assert got[4:, 2].tolist() == [2, -2, 0]
    assert got[:4, 0].tolist() == [-1.5, -1.5, 1.5, 1.5]


def test_global_std_of_a_tree_is_that_of_all_leaves():
    everything = LEAVES.double().std(unbiased=False) + 1e-4
    expected = tree_advantages(LEAVES, TREE_GROUP, TREE, "none").double() / everything
    torch.testing.assert_close(tree_advantages(LEAVES, TREE_GROUP, TREE, "global"), expected.float())


def test_weights_of_a_trees_leaves_reach_its_advantages():
    log_prob = torch.tensor([0.0, np.log(3), 0, 0, 0, 0, 0])[:, None].expand(7, 3)
    got = tree_advantages(LEAVES, TREE_GROUP, TREE, "none", log_prob=log_prob)
    assert got[:4, 0].tolist() == pytest.approx([-1.375, -1.375, 1.375, 1.375], abs=1e-6)


@pytest.mark.parametrize("std", ["group", "global", "none"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_tree_of_leaves_only_is_the_group_advantage_at_every_depth(std, ddof):
    group = ids(2, -9, 2, 2**60, -9, 2, 2**60, 2, 5)
    rewards = torch.randn(9, generator=torch.Generator().manual_seed(1))
    node = torch.arange(9)[:, None].expand(9, 4)
    expected = group_advantages(rewards, group, std, ddof, 1e-6, 0.9)
    got = tree_advantages(rewards, group, node, std, ddof, 1e-6, 0.9)
    torch.testing.assert_close(got, expected[:, None].expand(9, 4), rtol=0, atol=1e-7)
    assert expected.abs().max().item() == pytest.approx(0.9)


@settings(deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from(["group", "global", "none"]))
def test_names_of_nodes_and_the_order_of_leaves_do_not_matter(shuffle, std):
    expected = tree_advantages(LEAVES, TREE_GROUP, TREE, std)
    order = list(range(7))
    shuffle.shuffle(order)
    names = [shuffle.sample([*range(60), 2**61], 61) for _ in range(3)]
    renamed = torch.tensor([[names[depth][TREE[leaf, depth]] for depth in range(3)] for leaf in order])
    got = tree_advantages(LEAVES[order], TREE_GROUP[order] + 3, renamed, std)
    torch.testing.assert_close(got, expected[order], rtol=0, atol=1e-6)


def test_leaf_that_is_under_no_node_neither_gets_nor_gives():
    node = TREE.clone()
    node[[1, 4], 2] = -1
    got = tree_advantages(LEAVES, TREE_GROUP, node)
    assert got[[1, 4], 2].tolist() == [0, 0]
    assert torch.equal(got[:, :2], tree_advantages(LEAVES, TREE_GROUP, TREE)[:, :2])
    rest = [0, 2, 3, 5, 6]
    torch.testing.assert_close(got[rest, 2], group_advantages(LEAVES[rest], TREE_GROUP[rest]))
    nowhere = torch.full((7, 2), -1)
    assert torch.equal(tree_advantages(LEAVES, TREE_GROUP, nowhere), torch.zeros(7, 2))


@pytest.mark.parametrize("std", ["group", "global", "none"])
@pytest.mark.parametrize("eps", [0.0, 1e-4])
def test_nodes_of_equal_returns_get_exactly_zero(std, eps):
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.3, 0.7, 0.9])
    got = tree_advantages(rewards, TREE_GROUP, TREE, std, eps=eps)
    assert not got[:4].any()
    assert got[4:, 1:].all()


@pytest.mark.parametrize("weighed", [False, True])
def test_equal_rewards_get_exactly_zero_however_many_leaves_a_node_has(weighed):
    """A mean of equal numbers is that number to the bit: else, without eps, rounding would become advantages of 1."""
    node = torch.arange(11).repeat_interleave(torch.arange(1, 12))[:, None]
    log_prob = torch.randn(66, 1, generator=torch.Generator().manual_seed(0)) if weighed else None
    for value in (0.1, 1 / 3, 0.7, -7.3e5):
        rewards = torch.full((66,), value, dtype=torch.float64)
        assert torch.equal(node_returns(rewards, node, log_prob), rewards[:, None])
        assert not tree_advantages(rewards, torch.zeros(66).long(), node, eps=0, log_prob=log_prob).any()


def test_node_of_two_prompts_is_our_own_mistake():
    with pytest.raises(AssertionError, match="one group"):
        tree_advantages(LEAVES, ids(4, 4, 4, 4, 4, -2, -2), TREE)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_reward_of_a_tree_that_is_not_finite_is_named(bad):
    rewards = LEAVES.clone()
    rewards[3] = bad
    for function in (
        node_returns,
        lambda r, n: tree_advantages(r, TREE_GROUP, n),
        lambda r, _: best_of(r, r.long(), 2),
    ):
        with pytest.raises(ValueError, match=r"rewards\[3\]"):
            function(rewards, TREE)


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (2, [0, 1, 0, 0, 1, 1, 0, 1, 1, 1]),
        (3, [0, 1, 1, 0, 1, 1, 1, 1, 1, 1]),
        (4, [0, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        (5, [1] * 10),
        (99, [1] * 10),
    ],
)
def test_best_of_keeps_the_top_and_the_bottom(keep, expected):
    """Groups of (2, 9, 5, 1, 0), (3, 3) and (7, 8, 4); of an odd number one more is kept from the top."""
    rewards = torch.tensor([2.0, 9, 5, 1, 3, 3, 7, 0, 8, 4])
    group = ids(6, 6, 6, 6, 1, 1, 2**60, 6, 2**60, 2**60)
    got = best_of(rewards, group, keep)
    assert got.dtype == torch.bool
    assert got.int().tolist() == expected


def test_best_of_breaks_ties_by_position_and_never_keeps_fewer():
    assert best_of(torch.zeros(7), ids(0, 0, 0, 0, 0, 0, 0), 5).tolist() == [True] * 3 + [False] * 2 + [True] * 2
    assert best_of(torch.tensor([1.0, 0, 1, 0, 1]), ids(3, 3, 3, 3, 3), 2).tolist() == [True, False, False, True, False]


@settings(deadline=None)
@given(rewards_and_groups(), st.integers(2, 9))
def test_best_of_is_a_sorted_list_cut_at_both_ends(rows, keep):
    rewards, group = torch.tensor([r for r, _ in rows]), ids(*[g for _, g in rows])
    kept = set()
    for one in {g for _, g in rows}:
        own = sorted((i for i, (_, g) in enumerate(rows) if g == one), key=lambda i: (-rows[i][0], i))
        kept |= set(own if len(own) <= keep else own[: -(-keep // 2)] + own[len(own) - keep // 2 :])
    assert best_of(rewards, group, keep).nonzero().flatten().tolist() == sorted(kept)


def test_best_of_one_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        best_of(torch.tensor([1.0, 2.0]), ids(0, 0), 1)


def test_several_rewards_are_normalised_before_they_are_summed():
    """Worked by hand: groups (1, 3) and (0, 6, 0), whose stds are 1 and sqrt(8); the second reward is constant."""
    rewards = torch.tensor([[1.0, 5, 10], [0, 5, 2], [6, 5, 2], [3, 5, 30], [0, 5, 2]])
    group = ids(8, -1, -1, 8, -1)
    one, ten, root = 1 / (1 + 1e-4), 10 / (10 + 1e-4), 8**0.5 + 1e-4
    summed = np.array([-2 * one - 0.5 * ten, -2 * 2 / root, 2 * 4 / root, 2 * one + 0.5 * ten, -2 * 2 / root])
    expected = summed / (summed.std() + 1e-4)
    got = gdpo(rewards, group, torch.tensor([2.0, 7.0, 0.5]))
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert got.square().mean().item() == pytest.approx(1, abs=2e-4)


def test_group_in_which_no_reward_varies_gets_exactly_zero_from_several():
    rewards = torch.tensor([[0.1, 3.3], [0.1, 3.3], [0.1, 3.3], [1.0, 2.0], [0.2, 5.0], [0.4, 5.1]])
    got = gdpo(rewards, ids(5, 5, 5, 2, 2, 2), torch.tensor([1.0, 0.3]))
    assert got[:3].tolist() == [0, 0, 0] and got[3:].all()
    assert not gdpo(rewards[:3], ids(5, 5, 5), torch.tensor([1.0, 0.3])).any()


def test_size_of_one_reward_does_not_matter_to_several():
    rewards = torch.randn(12, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    group = torch.arange(12) % 5
    expected = gdpo(rewards, group, torch.tensor([1.0, 2.0]), eps=0)
    scaled = gdpo(rewards * torch.tensor([1000.0, 1e-3]).double() + 5, group, torch.tensor([1.0, 2.0]), eps=0)
    torch.testing.assert_close(scaled, expected, rtol=0, atol=1e-6)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(gdpo(rewards[order], group[order], torch.tensor([1.0, 2.0]), eps=0), expected[order])


def test_one_of_several_rewards_that_is_not_finite_is_named():
    with pytest.raises(ValueError, match=r"rewards\[1, 0\] is nan"):
        gdpo(torch.tensor([[1.0, 2.0], [float("nan"), 1.0]]), ids(0, 0), torch.ones(2))
