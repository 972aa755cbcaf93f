"""Every algorithm, from its name to a trained policy on the embedded world; alone, and with AEGPO's two levers."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from aegpo import build, models, world
from aegpo.algorithms import ALGORITHMS, PAPERS, PLAIN
from aegpo.config import dump_yaml, needs_velocity, resolve
from aegpo.data import load_prompts
from aegpo.display import Display
from aegpo.dry_run import arithmetic
from aegpo.report import write_model_card
from aegpo.rewards.panel import load_panel
from aegpo.train import train

DOCS = Path(__file__).parents[1] / "docs" / "algorithms.md"
SMALL = {
    "steps": 2,
    "prompts_per_step": 2,
    "rollouts_per_step": 16,
    "allocation": {"low": 5, "high": 11},
    "sampler": {"steps": 6},
    "optimizer": {"micro_batch": 16},
    "model": {"lora": {"rank": 4}},
    "eval_every": 0,
    "eval_images": 1,
}


@pytest.fixture
def small(tmp_path):
    """Settings of a short run of an algorithm, by a reward that no two pictures share."""
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in world.held_out()[::72]))
    (tmp_path / "train.txt").write_text("a red circle\ntwo squares\n")
    (tmp_path / "bright.py").write_text("def score(images, prompts):\n    return images.mean((1, 2, 3)) / 255\n")

    def settings(algorithm, name="run", **changes):
        own = {
            "prompts": {"train": str(tmp_path / "train.txt"), "eval": str(tmp_path / "eval.jsonl")},
            "reward": f"{tmp_path / 'bright.py'}:score",
            "output_dir": str(tmp_path / name),
        }
        room = {"sampler": {"steps": 8}} if algorithm == "branch-grpo" else {}  # for four branchings, two steps apart
        return resolve({"algorithm": algorithm}, SMALL, room, own, changes)

    return settings


def run(config):
    """The loop alone: `build.run` without the trials and the report."""
    folder = Path(config.output_dir)
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_yaml(config))
    prompts, held_out = (load_prompts(getattr(config.prompts, split), split) for split in ("train", "eval"))
    reward, model = load_panel(config), models.load(config.model, config.seed)
    train(config, model, prompts, held_out, reward, folder, Display(config.steps, Console(quiet=True)))


def metrics(config, without=("seconds",)):
    lines = Path(config.output_dir, "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in without} for line in lines]


def weights(config, step):
    return load_file(Path(config.output_dir, f"checkpoint-{step}", "weights.safetensors"))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_it_trains_begins_at_ratio_one_and_costs_no_more_than_the_dry_run_says(small, algorithm):
    own = small(algorithm)
    said = {what: number for what, _, number in arithmetic(own)}
    run(own)
    before, *lines = metrics(own)
    for line in lines:
        assert 0 < line["rows"] <= said["rows"]
        assert sum(line["allocation"]) == 16
        assert line["explored_steps"][-1] == 0
        if line["ratio/mean"] is not None:
            assert line["ratio/first_error"] < 1e-6
        assert (line["ratio/mean"] is None) == (own.loss.kind not in ("clip", "guard", "dppo"))
    spent = lines[-1]["forwards"] - 2 * before["forwards"]  # an evaluation stands at either end
    assert spent <= said["evaluations in all"] + said["base probes in all"]
    begin = {name: p.detach() for name, p in models.load(own.model).trainable.items()}
    assert any((weights(own, 2)[name] != begin[name]).any() for name in begin)
    assert re.search(ALGORITHMS[algorithm].paper, write_model_card(Path(own.output_dir)).read_text())


RATIOS = [
    name for name, algorithm in ALGORITHMS.items() if algorithm.choices["loss"]["kind"] in ("clip", "guard", "dppo")
]


@pytest.mark.parametrize("algorithm", RATIOS)
def test_its_first_ratio_is_exactly_one_in_the_same_batch_shape(small, algorithm):
    one = {"micro_batch": 1, "updates": 1}
    own = small(algorithm, steps=1, rollouts_per_step=6, allocation={"low": 2, "high": 4}, optimizer=one)
    run(own)
    step = metrics(own)[1]
    assert step["rows"] > 0 and step["ratio/first_error"] == 0 and step["ratio/mean"] == 1


HOSTS = [name for name in ALGORITHMS if not name.startswith("aegpo")]
EACH_KIND = [
    "flow-grpo",
    "tempflow-grpo",
    "branch-grpo",
    "mix-grpo-flash",
    "awm",
]  # of rollout: what a curve is laid on


@pytest.mark.parametrize(
    ("rule", "algorithm"),
    [("entropy_peaks", host) for host in HOSTS] + [("reward_spread", host) for host in EACH_KIND],
)
def test_aegpos_levers_work_on_it(small, algorithm, rule):
    """Unequal groups from the second step on, and each prompt's own steps, or levels drawn from its own curve."""
    own = small(
        algorithm,
        allocation={"rule": "median_split", "low": 5, "high": 11},
        exploration={"rule": rule, "k": 2, "min_distance": 1, "moves": "none"},
        optimizer={"lr": 1e-2, "micro_batch": 16},
    )
    run(own)
    _, first, second = metrics(own)
    assert first["allocation"] == [8, 8] and sorted(second["allocation"]) == [5, 11]
    assert first["rows"] > 0 and second["rows"] > 0
    if own.exploration.branch == "none":
        assert sum(second["explored_steps"]) == 2 * 16


@pytest.mark.parametrize("algorithm", ["diffusion-nft", "branch-grpo", "mix-grpo-flash", "e-grpo", "dgpo"])
def test_stopped_and_resumed_it_is_the_same_run_to_the_bit(small, algorithm):
    ways = {"steps": 3, "optimizer": {"lr": 1e-2, "behaviour_ramp": 0.4, "micro_batch": 16}}
    whole, cut = small(algorithm, "whole", **ways, checkpoints_total_limit=9), small(algorithm, "cut", **ways)
    run(whole)
    shutil.copytree(whole.output_dir, cut.output_dir, ignore=shutil.ignore_patterns("checkpoint-[23]"))
    lines = Path(whole.output_dir, "metrics.jsonl").read_text().splitlines(keepends=True)
    Path(cut.output_dir, "metrics.jsonl").write_text("".join(lines[:3]))
    build.fit(cut, resume=str(Path(cut.output_dir, "checkpoint-1")))
    assert metrics(whole) == metrics(cut)
    for file in sorted(Path(whole.output_dir, "checkpoint-3").glob("*.safetensors")):
        assert file.read_bytes() == Path(cut.output_dir, "checkpoint-3", file.name).read_bytes(), file.name


def test_the_policy_that_draws_follows_the_trained_one_as_in_nft(small):
    """old <- d old + (1 - d) new with d = min(ramp n, most), by hand from the weights of each step."""
    own = small(
        "diffusion-nft",
        steps=3,
        checkpoints_total_limit=9,
        optimizer={"lr": 1e-2, "behaviour": 0.5, "behaviour_ramp": 0.2, "micro_batch": 16},
    )
    build.fit(own)
    old = {name: p.detach().clone() for name, p in models.load(own.model).trainable.items()}
    for step, decay in ((1, 0.2), (2, 0.4), (3, 0.5)):
        saved = load_file(Path(own.output_dir, f"checkpoint-{step}", "behaviour.safetensors"))
        for name, new in weights(own, step).items():
            old[name] = decay * old[name] + (1 - decay) * new
            torch.testing.assert_close(saved[name], old[name], rtol=1e-5, atol=1e-7)
    assert any((saved[name] != new).any() for name, new in weights(own, 3).items())


def test_with_a_policy_of_their_own_to_draw_them_rollouts_are_not_the_trained_ones(small):
    """The second step's rollouts are drawn by the average: with all of its weight on the old, the first ones again."""
    faster = {"lr": 3e-2, "micro_batch": 16}
    still = small("diffusion-nft", "still", optimizer=faster | {"behaviour": 0.999999, "behaviour_ramp": 0.999999})
    moving = small("diffusion-nft", "moving", optimizer=faster | {"behaviour": 0.0})
    build.fit(still)
    build.fit(moving)
    base = models.load(still.model)
    saved = load_file(Path(still.output_dir, "checkpoint-1", "behaviour.safetensors"))
    for name, parameter in base.trainable.items():
        torch.testing.assert_close(saved[name], parameter.detach(), rtol=1e-4, atol=1e-5)
    assert metrics(still)[1]["reward/mean"] == metrics(moving)[1]["reward/mean"]
    assert metrics(still)[2]["reward/mean"] != metrics(moving)[2]["reward/mean"]
    assert needs_velocity(still)


# ---------------------------------------------------------------- the table itself


def names(table, prefix=""):
    return {
        name
        for key, value in table.items()
        for name in (names(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key})
    }


def test_naming_an_algorithm_settles_every_choice_that_another_could_have_made():
    plain = names(PLAIN)
    for name, algorithm in ALGORITHMS.items():
        assert names(algorithm.choices) - plain <= {"loss.max_kl"}, name
        assert plain <= names(algorithm.choices), name
        assert algorithm.paper in PAPERS


def test_aegpo_is_flow_grpo_but_for_what_its_section_says():
    ours, host = ALGORITHMS["aegpo"].choices, ALGORITHMS["flow-grpo"].choices
    other = {
        f"{part}.{key}": value for part in ours for key, value in ours[part].items() if value != host[part].get(key)
    }
    assert other == {
        "allocation.rule": "median_split",
        "exploration.rule": "reward_spread",
        "sampler.solver": "dpm2m",
        "sampler.compress": 0.5,
        "loss.kl": 0.0,
        "optimizer.updates": 1,
        "optimizer.ema": 0.0,
    }


def test_the_default_is_ours_and_what_it_is_said_to_be():
    config = resolve()
    assert config.algorithm == "aegpo-fast"
    assert (config.sampler.kind, config.sampler.solver, config.sampler.guidance) == ("ode", "dpm2m", 1)
    assert (config.allocation.rule, config.probe.queries, config.probe.keys) == ("median_split", "image", "text")
    assert (config.exploration.rule, config.exploration.k, config.optimizer.updates) == ("random", 1, 1)
    assert (config.loss.kind, config.loss.beta, config.loss.reference_guidance, config.loss.kl) == ("ram", 1, 3, 0)


def test_nothing_in_the_loop_names_an_algorithm():
    loop = Path(build.__file__).with_name("train.py").read_text().lower()
    loop = re.sub(r"from aegpo|`aegpo\.", "", loop)
    words = {*ALGORITHMS, "grpo", "nft", "dpo", "dppo", "guard", "flow", "dance", "mix", "branch", "tempflow"}
    assert sorted(word for word in words if re.search(rf"{word}\b", loop)) == []


def test_every_algorithm_has_its_section_and_its_paper_in_the_docs():
    text = DOCS.read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### `?([a-z-]+)`?.*?\n((?:.|\n)*?)(?=^##|\Z)", text, re.MULTILINE))
    assert sorted(set(ALGORITHMS) - set(sections)) == []
    for name, algorithm in ALGORITHMS.items():
        assert algorithm.paper in sections[name] or algorithm.paper in text.split(f"### {name}")[-1][:200], name
