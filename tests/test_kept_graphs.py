"""What is drawn with its graph, and pulled back once the reward is known, is the update that computes it anew."""

import weakref
from dataclasses import asdict

import pytest
import torch

import aegpo.train
from aegpo import models, rewards
from aegpo.adapt.memory import Memory
from aegpo.adapt.plan import make_plan
from aegpo.config import needs_probe, resolve
from aegpo.data import load_prompts
from aegpo.rewards.panel import alone
from aegpo.rollout import collect, shared_trunk
from aegpo.signals import probe
from aegpo.train import credit, update

HOSTS = [
    "flow-grpo",
    "dance-grpo",
    "branch-grpo",
    "tempflow-grpo",
    "grpo-guard",
    "flow-dppo",
    "aegpo-paper",
    "awm",
    "ram",
    "dgpo",
]


class Silent:
    def begin(self, what, total): ...

    def advance(self, count): ...

    def step(self, metrics): ...


def step_of(algorithm, keep, **optimizer):
    """A config of three prompts and nine rollouts, or of a tree's fourteen."""
    return resolve(
        {
            "algorithm": algorithm,
            "prompts_per_step": 3,
            "rollouts_per_step": 9,
            "sampler": {"steps": 6},
            "allocation": {"low": 2, "high": 4},
            "exploration": {"k": 2, "until": 0},
            "advantage": {"best_of": 0},
            "optimizer": {
                "updates": 1,
                "behaviour": 0.0,
                "keep_graphs": keep,
                "lr": 1e-4,
                "micro_batch": 4,
                **optimizer,
            },
        }
    )


def gradient_of(model, config, scores):
    """Gradient, evaluations of drawing and of the update, and what the update reports; the weights stay as they are."""
    before = [p.detach().clone() for p in model.trainable.values()]
    batch = load_prompts("world", "train")[:3]
    conditions, memory, trunk, signals = model.encode([p.text for p in batch]), Memory(), None, None
    if needs_probe(config):
        signals, trunk = probe(model, batch, conditions, config, 0, memory)
    plan = make_plan(config, batch, signals, memory, model.sigmas(config.sampler.steps), 0)
    if config.sampler.shared_noise:
        trunk = shared_trunk(model, batch, conditions, plan, config, 0, 0)
    start = model.forwards
    drawn = collect(model, batch, conditions, plan, config, 0, trunk)
    drew = model.forwards - start
    advantage, taught = credit(config, scores[: len(drawn.group)], drawn.group, drawn.courses)
    rows = drawn.transitions.judged(advantage, taught)
    optimizer = torch.optim.SGD(model.trainable.values(), lr=0.0)
    learned = update(config, model, optimizer, rows, conditions, 0, Silent(), drawn.kept)
    found = torch.cat([p.grad.flatten() for p in model.trainable.values()])
    assert all(torch.equal(p, was) for p, was in zip(model.trainable.values(), before, strict=True))
    return found, drew, model.forwards - start - drew, learned, drawn


SCORES = torch.tensor([0.1, 0.9, 0.4, 0.5, 0.5, 0.5, 0.3, 0.8, 0.2])


@pytest.mark.parametrize("algorithm", HOSTS)
def test_the_gradient_is_the_same(moved_policy, algorithm):
    plain, _, _, about, _ = gradient_of(moved_policy, step_of(algorithm, False, max_grad_norm=1e9), SCORES)
    kept, _, _, learned, _ = gradient_of(moved_policy, step_of(algorithm, True, max_grad_norm=1e9), SCORES)
    assert plain.abs().max() > 1e-4
    assert (kept - plain).abs().max() <= 1e-5 * plain.abs().max()
    assert learned["rows"] == about["rows"]
    for name in ("loss", "grad_norm", "ratio/mean"):
        if about[name] is not None:
            assert learned[name] == pytest.approx(about[name], rel=1e-4, abs=1e-7), name
    if learned["ratio/first_error"] is not None:
        assert learned["ratio/first_error"] == 0  # it is one and the same prediction


@pytest.mark.parametrize("algorithm", ["flow-grpo", "awm"])
def test_a_trained_row_costs_one_evaluation_less_and_an_equal_group_no_way_back(moved_policy, algorithm):
    """The middle prompt's rewards are all equal: the forwards of its rows are paid, its way back is not."""
    _, drew, updated, learned, drawn = gradient_of(moved_policy, step_of(algorithm, False), SCORES)
    _, kept_drew, kept_updated, _, kept = gradient_of(moved_policy, step_of(algorithm, True), SCORES)
    explored = len(drawn.transitions)
    assert kept_drew == drew  # the explored rows' own evaluations among them
    assert updated == 4 * learned["rows"]  # one of them the base's, which both look at
    reached = sum(len(part) for part in kept.kept if _reached(part, kept, drawn))
    assert kept_updated == 2 * reached + learned["rows"]
    assert sum(len(part) for part in kept.kept) == explored


def _reached(part, kept, drawn):
    at = 0
    for other in kept.kept:
        if other is part:
            break
        at += len(other)
    own = (kept.transitions.graph >= at) & (kept.transitions.graph < at + len(part))
    return bool((kept.transitions.prompt[own] != 1).any())


def test_only_what_is_trained_is_kept_and_no_forward_is_larger_than_a_micro_batch(moved_policy):
    """DanceGRPO trains 60 % of its noisy steps: 3 of 5."""
    config = step_of("dance-grpo", True)
    assert config.exploration.share == 0.6
    drawn = gradient_of(moved_policy, config, SCORES)[4]
    assert sum(len(part) for part in drawn.kept) == len(drawn.transitions) == 9 * 3
    assert max(len(part) for part in drawn.kept) <= 4
    assert sorted(drawn.transitions.graph.tolist()) == list(range(9 * 3))


def test_no_graph_outlives_its_step(tmp_path, monkeypatch):
    """Rewards that are all equal leave every graph unused, and still none is there when the step is over."""
    (tmp_path / "flat.py").write_text("def score(images, prompts):\n    return [0.5] * len(images)\n")
    drawn, alive = [], []

    def watched(*given, **named):
        found = collect(*given, **named)
        drawn.extend(weakref.ref(part) for part in found.kept)
        return found

    class Watcher(Silent):
        def step(self, metrics):
            alive.append([ref() is not None for ref in drawn])

    monkeypatch.setattr(aegpo.train, "collect", watched)
    layer = {"steps": 1, "eval_images": 1, "eval_every": 0, "output_dir": str(tmp_path / "run"), "save_every": 9}
    config = resolve(asdict(step_of("flow-grpo", True)), layer)
    prompts = load_prompts("world", "train")[:3]
    reward = alone(rewards.load(f"{tmp_path / 'flat.py'}:score"))
    (tmp_path / "run").mkdir()
    aegpo.train.train(config, models.load(config.model), prompts, prompts[:1], reward, tmp_path / "run", Watcher())
    assert len(drawn) > 5 and alive[-1] == [False] * len(drawn)


def test_only_one_update_of_the_weights_that_draw():
    for optimizer in ({"updates": 2}, {"updates": 1, "behaviour": 0.5}):
        with pytest.raises(ValueError, match=r"optimizer\.keep_graphs"):
            resolve({"optimizer": {"keep_graphs": True, **optimizer}})
