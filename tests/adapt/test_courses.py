"""A rollout's way: trees against BranchGRPO's own numbers, dealt steps, merged steps, and fewer steps at the end."""

import math

import pytest
import torch

from aegpo.adapt.courses import lay_out
from aegpo.config import resolve
from aegpo.math.schedules import sd3
from aegpo.types import Plan, Prompt


def ways(explored, rollouts, layer=None, step=0):
    """The courses of prompts that explore these steps."""
    table = torch.tensor(explored, dtype=torch.bool)
    config = resolve({"algorithm": "flow-grpo", "sampler": {"steps": table.shape[1]}}, layer or {})
    plan = Plan(torch.tensor(rollouts), table, torch.ones(table.shape, dtype=torch.float64))
    prompts = [Prompt(7 + i, "", {}) for i in range(len(rollouts))]
    return lay_out(plan, config, prompts, sd3(table.shape[1]), step)


def at(steps, *explored):
    return [i in explored for i in range(steps)]


TREE = {"sampler": {"shared_noise": True}, "exploration": {"branch": "tree", "k": 1}}
EACH = {"sampler": {"shared_noise": True}, "exploration": {"branch": "each", "k": 1}}


def test_a_tree_of_sixteen_leaves_has_branchgrpos_own_nodes_and_edges():
    """203 network evaluations and 218 edges for N = 20 and partings at 0, 3, 6 and 9 (arXiv 2509.06040)."""
    made = ways([at(20, 0, 3, 6, 9)], [16], TREE)
    assert sum(len(made.node[:, t].unique()) for t in range(20)) == 203
    assert sum(len(made.node[:, t + 1].unique()) for t in range(20)) == 218
    assert [len(made.node[:, t].unique()) for t in (0, 1, 3, 4, 7, 10, 20)] == [1, 2, 2, 4, 8, 16, 16]
    assert made.noisy[:, :19].all() and not made.noisy[:, 19].any()
    trained = sum(len(made.children[:, t].unique()) for t in range(19))
    assert trained == 218 - 16  # the step onto sigma = 0 takes no noise and is never trained


@pytest.mark.parametrize("leaves", [2, 3, 5, 12, 13, 16, 24, 40])
def test_a_tree_of_any_size_ends_with_every_leaf_alone_and_parts_in_two_at_least(leaves):
    made = ways([at(10, 0, 2, 4, 6), at(10, 1, 3, 5, 8)], [leaves, 4], TREE)
    for group, partings in ((slice(0, leaves), (0, 2, 4, 6)), (slice(leaves, leaves + 4), (1, 3, 5, 8))):
        node = made.node[group]
        first = node[0, 0].item()
        assert (node[:, 0] == first).all()
        assert node[:, 10].tolist() == list(range(first, first + len(node)))
        for t in range(10):
            for parent in node[:, t].unique():
                members = node[:, t] == parent
                children = node[members, t + 1].unique()
                assert parent in children  # a node is named after its first leaf
                if t not in partings:
                    assert len(children) == 1
                elif members.sum() > 1:
                    assert len(children) >= 2
                    sizes = [(node[:, t + 1] == child).sum().item() for child in children]
                    assert max(sizes) - min(sizes) <= 1


def test_steps_are_dealt_so_that_none_is_explored_alone_and_all_get_their_turn():
    made = ways([at(10, 1, 4, 5), at(10, 0, 2, 3, 6, 7, 8)], [7, 4], EACH)
    assert made.noisy.sum(1).tolist() == [1] * 11
    assert made.noisy[:7].sum(0).tolist() == [0, 3, 0, 0, 2, 2, 0, 0, 0, 0]
    assert made.leaves[:7].tolist() == [1, 4, 5, 1, 4, 5, 1]
    turns = [ways([at(10, 0, 2, 3, 6, 7, 8)], [4], EACH, step).noisy.sum(0) for step in range(3)]
    assert all(sorted(turn.tolist()) == [0] * 8 + [2, 2] for turn in turns)  # four rollouts: two steps, two each
    assert sum(turns).tolist() == [2, 0, 2, 2, 0, 0, 2, 2, 2, 0]


def test_a_merged_step_is_the_shortest_with_enough_entropy():
    """Flow-SDE's std of a step from s to s' is eta sqrt(s (s - s') / (1 - s)), by hand, from the second step on."""
    sigmas = sd3(10).tolist()
    made = ways([at(10, 2, 3, 6)], [2], {"exploration": {"merge": 0.9}})
    expected = {}
    for step in (2, 6):
        s = sigmas[step]
        there = next(
            t
            for t in range(step + 1, 10)
            if t == 9 or math.log(2 * math.pi * math.e * 0.49 * s * (s - sigmas[t]) / (1 - s)) / 2 >= 0.9
        )
        expected[step] = there
    assert expected == {2: 4, 6: 9}
    assert {step: made.lands[0, step].item() for step in (2, 6)} == expected
    assert made.lands[0].tolist() == [1, 2, 4, 0, 5, 6, 9, 0, 0, 10]  # 3 is within the step from 2
    assert made.noisy[0].nonzero().flatten().tolist() == [2, 6]
    assert made.children[0].tolist() == [-1, -1, 0, -1, -1, -1, 0, -1, -1, -1]


def test_a_step_that_no_merging_makes_noisy_enough_ends_before_the_image():
    made = ways([at(6, 1)], [2], {"exploration": {"merge": 9.0}})
    assert made.lands[0].tolist() == [1, 5, 0, 0, 0, 6]


@pytest.mark.parametrize("start", range(6))
@pytest.mark.parametrize("compress", [0.1, 0.4, 0.5, 1.0])
def test_wherever_the_window_is_fewer_steps_after_it_still_land_on_zero(start, compress):
    steps = 10
    made = ways([at(steps, start, start + 1, start + 2)], [2], {"sampler": {"solver": "dpm2m", "compress": compress}})
    path, place = [0], 0
    while place < steps:
        place = made.lands[0, place].item()
        path.append(place)
    assert path[-1] == steps and path == sorted(set(path))
    left = steps - (start + 3)
    assert path[: start + 4] == list(range(start + 4))
    assert len(path) - 1 - (start + 3) == max(1, int(left * compress))
    visited = (made.lands[0] > 0).nonzero().flatten().tolist()
    assert visited == path[:-1]


def test_a_share_of_the_steps_is_trained_another_for_each_rollout_and_each_time():
    """DanceGRPO's int((N - 1) f) of a random permutation (arXiv 2505.07818)."""
    made = ways([at(10, *range(9))], [40], {"exploration": {"share": 0.6}})
    assert made.explored.sum(1).tolist() == [9] * 40
    assert made.trained.sum(1).tolist() == [5] * 40
    assert not (made.trained & ~made.explored).any()
    assert len({tuple(row) for row in made.trained.tolist()}) > 30
    assert (made.trained.sum(0)[:9] > 0).all()
    again, later = (ways([at(10, *range(9))], [40], {"exploration": {"share": 0.6}}, step) for step in (0, 1))
    assert torch.equal(made.trained, again.trained) and not torch.equal(made.trained, later.trained)


def test_the_share_is_a_rollouts_own_in_any_company():
    layer = {"exploration": {"share": 0.6}}
    table = [at(10, *range(9))] * 3
    everyone, alone = ways(table, [4, 5, 6], layer), ways(table[:1], [4], layer)
    assert torch.equal(everyone.trained[:4], alone.trained)
    assert not torch.equal(everyone.trained[4:8], alone.trained)  # another prompt
    assert not torch.equal(ways(table[:1], [4], layer | {"seed": 1}).trained, alone.trained)


def test_a_tree_keeps_its_noise_to_the_steps_that_may_explore():
    made = ways([at(8, 2, 4)], [4], {**TREE, "exploration": {"branch": "tree", "k": 1, "start": 2, "until": -1}})
    assert made.noisy[0].nonzero().flatten().tolist() == [2, 3, 4, 5]
    assert [len(made.node[:, t].unique()) for t in range(9)] == [1, 1, 1, 2, 2, 4, 4, 4, 4]
    assert made.leaves.tolist() == [2] * 4


def test_the_steps_left_out_are_of_those_that_may_explore():
    layer = {"exploration": {"skip": 2, "start": 2}}
    trained = [ways([at(6, 2, 3, 4)], [2], layer, step).trained[0] for step in range(3)]
    assert [row.nonzero().flatten().tolist() for row in trained] == [[4], [2], [4]]


def test_the_steps_left_out_slide_by_one_and_spare_none_for_ever():
    layer = {"exploration": {"skip": 3}}
    trained = [ways([at(6, *range(5))], [2], layer, step).trained[0] for step in range(4)]
    left = [(~row).nonzero().flatten().tolist() for row in trained]
    assert left == [[0, 1, 2, 5], [1, 2, 3, 5], [2, 3, 4, 5], [0, 1, 2, 5]]


def test_without_noise_the_levels_are_trained_and_nothing_is_noisy():
    made = ways([at(5, 0, 2), at(5, 3)], [2, 3], {"sampler": {"kind": "ode"}})
    assert not made.noisy.any()
    assert made.leaves.tolist() == [5] * 5
    assert made.lands.tolist() == [[1, 2, 3, 4, 5]] * 5
    assert made.trained[:, [0, 2, 3]].tolist() == [[True, True, False]] * 2 + [[False, False, True]] * 3
    assert made.children[1].tolist() == [1, -1, 1, -1, -1]
