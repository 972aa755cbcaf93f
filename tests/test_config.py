import dataclasses
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aegpo import config as configuration
from aegpo.algorithms import ALGORITHMS
from aegpo.config import Config, dump_yaml, load_yaml, merge, resolve, reward_label, reward_terms

COUNTS = st.integers(1, 10**6)
POSITIVE = st.floats(1e-30, 1e30)
FRACTIONS = st.floats(0, 1, exclude_max=True)
TEXT = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"))
CHOICES = st.fixed_dictionaries(
    {},
    optional={
        "algorithm": st.sampled_from(sorted(ALGORITHMS)),
        "reward": TEXT,  # yes, 1e3, null, "- a": what YAML would not read as text if it stood bare
        "output_dir": st.sampled_from(["no", "1_000", "2026-01-31", "~", "3e4", "a: b", "é\n#"]),
        "seed": st.integers(0, 2**63 - 1),
        "model": st.fixed_dictionaries(
            {
                "train": st.sampled_from(["lora", "full"]),
                "lora": st.fixed_dictionaries({"targets": st.lists(TEXT, max_size=3), "rank": COUNTS}),
            }
        ),
        "optimizer": st.fixed_dictionaries(
            {"lr": POSITIVE, "betas": st.tuples(FRACTIONS, FRACTIONS), "updates": st.integers(1, 96)}
        ),
        "advantage": st.fixed_dictionaries({"clip": POSITIVE, "eps": FRACTIONS}),
        "sampler": st.fixed_dictionaries({"steps": st.integers(8, 50), "guidance": st.floats(1, 3)}),
    },
)


def complaint(*layers: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as caught:
        resolve(*layers)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def nested(name: str, value: Any) -> dict[str, Any]:
    for key in reversed(name.split(".")):
        value = {key: value}
    return value


# ---------------------------------------------------------------- to YAML and back


@settings(max_examples=100, deadline=None)
@given(CHOICES)
def test_a_dumped_config_is_a_recipe_of_the_same_config(
    tmp_path_factory: pytest.TempPathFactory, layer: dict[str, Any]
):
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    config = resolve(layer)
    path.write_text(dump_yaml(config), encoding="utf-8")
    again = load_yaml(path)
    assert resolve(again) == config
    assert resolve({"algorithm": "flow-grpo"}, again) == config  # complete: nothing is left to what lies below


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"- steps\n", "must hold settings such as 'steps: 100', not a list"),
        (b"steps\n", "must hold settings such as 'steps: 100', not a str"),
        (b"steps: [1\n", "cannot be read: .*line 2"),
        (b"reward: \xe9\n", "cannot be read: it is not UTF-8 text .byte 8"),
        (b"seed: !!python/object:os.system 1\n", "cannot be read: .*could not determine a constructor"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_by_name(content: bytes, expected: str, tmp_path: Path):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^recipe {path} {expected}") as caught:
        load_yaml(path)
    assert "\n" not in str(caught.value)


def test_an_empty_recipe_is_all_defaults_and_a_missing_one_is_refused(tmp_path: Path):
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert resolve(load_yaml(tmp_path / "empty.yaml")) == resolve()
    with pytest.raises(ValueError, match=r"none\.yaml does not exist"):
        load_yaml(tmp_path / "none.yaml")


# ---------------------------------------------------------------- layers


def test_merge_replaces_values_keeps_neighbours_and_changes_nothing_given():
    below, above = {"a": {"b": 1, "c": [1]}, "d": 1}, {"a": {"c": [2]}, "d": {"e": 3}}
    assert merge(below, above) == {"a": {"b": 1, "c": [2]}, "d": {"e": 3}}
    assert (below, above) == ({"a": {"b": 1, "c": [1]}, "d": 1}, {"a": {"c": [2]}, "d": {"e": 3}})


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_the_algorithm_lies_just_under_the_layer_that_names_it(algorithm: str):
    config = resolve({"algorithm": algorithm})
    expected = merge(dataclasses.asdict(Config()), ALGORITHMS[algorithm].choices, {"algorithm": algorithm})
    assert dataclasses.asdict(config) == expected
    recipe = {"algorithm": "aegpo", "optimizer": {"updates": 7, "lr": 1e-2}}
    assert resolve(recipe).optimizer.updates == 7
    named = resolve(recipe, {"algorithm": algorithm, "sampler": {"eta": 0.5}})
    assert named.optimizer.updates == ALGORITHMS[algorithm].choices["optimizer"]["updates"]
    assert named.allocation.rule == ALGORITHMS[algorithm].choices["allocation"]["rule"]
    assert named.optimizer.lr == 1e-2
    assert named.sampler.eta == 0.5


def test_the_named_settings_of_other_tools_exist():
    names = """model.path model.family model.lora.rank prompts.train prompts.eval reward algorithm
        allocation.rule exploration.rule prompts_per_step rollouts_per_step sampler.steps sampler.kind sampler.eta
        steps seed optimizer.lr eval_every save_every output_dir"""
    assert set(names.split()) <= set(configuration.settings())


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ({"stesp": 1}, "stesp is not a setting; did you mean steps?"),
        ({"optimizer": {"lrr": 1}}, "optimizer.lrr is not a setting; did you mean optimizer.lr?"),
        ({"model": {"lora": {"rnak": 1}}}, "model.lora.rnak is not a setting; did you mean model.lora.rank?"),
        ({1: 2}, "1 is not a setting"),
        ({"lr": 1}, "lr is not a setting; did you mean optimizer.lr?"),
        ({"loss": {"eps": 1}}, "loss.eps is not a setting; did you mean advantage.eps or optimizer.eps?"),
        ({"algorithm": "aegop"}, "algorithm: 'aegop' is not one of flow-grpo, flow-grpo-fast, dance-grpo, "),
        ({"algorithm": ["aegpo"]}, "algorithm: ['aegpo'] is not one of flow-grpo, flow-grpo-fast, "),
        (
            {"sampler": {"kind": "euler"}},
            "sampler.kind: input should be 'flow_sde', 'dance_sde', 'cps', 'ddim', 'dpm_sde' or 'ode', got 'euler'",
        ),
        ({"optimizer": None}, "optimizer is a group of settings (lr, decay,"),
        ({"model": {"lora": 3}}, "model.lora is a group of settings (rank, alpha, targets), not 3"),
    ],
)
def test_a_misspelt_name_is_refused_with_the_one_meant(layer: dict[Any, Any], expected: str):
    assert complaint(layer).startswith(expected)


def test_a_wrong_layer_is_refused_even_where_a_later_one_covers_it():
    assert complaint({"optimizer": 3}, {"optimizer": {"lr": 1}}).startswith("optimizer is a group of settings")


def numeric(kind: type) -> list[str]:
    """The dotted names of the settings that hold one number of this kind."""
    found = []
    for name in configuration.settings():
        owner: Any = Config
        *groups, last = name.split(".")
        for group in groups:
            owner = get_type_hints(owner)[group]
        if get_type_hints(owner)[last] is kind:
            found.append(name)
    return found


INTEGERS = numeric(int)
FLOATS = numeric(float)


def test_the_settings_are_sorted_into_kinds_as_expected():
    assert {"steps", "seed", "model.lora.rank", "exploration.k", "prompts_per_step"} <= set(INTEGERS)
    assert {"optimizer.lr", "sampler.eta", "loss.kl", "optimizer.ema"} <= set(FLOATS)


@pytest.mark.parametrize("value", [True, 2.5, 4.0, "8", "many", None, [8], -1])
@pytest.mark.parametrize("name", INTEGERS)
def test_a_count_is_a_whole_number_and_not_negative(name: str, value: Any):
    if (name, value) == ("exploration.until", -1):  # counts from the end
        assert resolve(nested(name, value)).exploration.until == -1
        return
    assert complaint(nested(name, value)).startswith(f"{name}: input should be ")
    assert complaint(nested(name, value)).endswith(f", got {value!r}")


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [True, "fast", None, [0.1], float("nan"), float("inf"), -0.5])
def test_a_number_is_finite_and_not_negative(name: str, value: Any):
    assert complaint(nested(name, value)).startswith(f"{name}: input should be ")
    assert complaint(nested(name, value)).endswith(f", got {value!r}")


@pytest.mark.parametrize("name", ["model.path", "output_dir", "prompts.train"])
@pytest.mark.parametrize("value", [5, True, None, ["world"]])
def test_text_is_text(name: str, value: Any):
    assert complaint(nested(name, value)) == f"{name}: input should be a valid string, got {value!r}"


@pytest.mark.parametrize(
    ("name", "refused", "allowed"),
    [
        ("steps", -1, 0),
        ("prompts_per_step", 0, 6),
        ("rollouts_per_step", 1, 64),
        ("eval_every", -1, 0),
        ("save_every", 0, 1),
        ("allocation.low", 1, 2),
        ("sampler.steps", 1, 5),
        ("optimizer.micro_batch", 0, 1),
        ("optimizer.lr", 0, 1e-12),
        ("optimizer.ema", 1, 0.999),
        ("optimizer.weight_decay", -1e-9, 0),
        ("optimizer.betas", [0.9, 1.0], [0, 0]),
        ("optimizer.betas", [0.9], [0.9, 0.99]),
    ],
)
def test_the_edge_of_a_range(name: str, refused: Any, allowed: Any):
    assert complaint(nested(name, refused)).startswith(f"{name}")
    resolve(nested(name, allowed))


def test_a_learning_rate_as_yaml_reads_it_without_a_dot_is_a_number(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("optimizer: {lr: 3e-4}\n")
    assert load_yaml(tmp_path / "a.yaml") == {"optimizer": {"lr": "3e-4"}}  # YAML 1.1
    assert resolve(load_yaml(tmp_path / "a.yaml")).optimizer.lr == 0.0003


def test_groups_of_one_are_refused_and_groups_of_two_are_not():
    said = complaint({"prompts_per_step": 8, "rollouts_per_step": 15})
    assert said.startswith("rollouts_per_step: 15 rollouts for 8 prompts leave groups of one")
    assert said.endswith("at least 16")
    assert resolve({"algorithm": "flow-grpo", "rollouts_per_step": 16}).rollouts_per_step == 16


def test_a_budget_that_the_median_split_cannot_keep_is_refused():
    said = complaint({"prompts_per_step": 4})
    assert said == (
        "rollouts_per_step: 96 rollouts cannot be split into 8 to 16 for each of 4 prompts; ask for 32 to 64"
    )
    for rollouts in (32, 64):
        assert resolve({"prompts_per_step": 4, "rollouts_per_step": rollouts}).rollouts_per_step == rollouts
    for rollouts in (31, 65):
        assert "cannot be split" in complaint({"prompts_per_step": 4, "rollouts_per_step": rollouts})


@pytest.mark.parametrize("rule", ["window", "random", "entropy_peaks", "delta_entropy_peaks"])
def test_all_steps_but_the_last_can_be_explored(rule: str):
    layer = {"sampler": {"steps": 6}, "exploration": {"rule": rule, "k": 5}}
    assert resolve(layer).exploration.k == 5
    said = complaint(layer, {"exploration": {"k": 6}})
    assert said == (
        "exploration.k: 6 steps to explore, but of steps 0 to 5 only 0 to 4 may be; lower it, or raise sampler.steps"
    )


@pytest.mark.parametrize(
    ("start", "until", "may"),
    [
        (0, 0, range(9)),
        (0, 5, range(5)),
        (2, 5, range(2, 5)),
        (0, -1, range(8)),
        (3, -4, range(3, 5)),
        (1, 40, range(1, 9)),
    ],
)
def test_steps_may_be_kept_from_exploring_at_either_end(start: int, until: int, may: range):
    config = resolve({"algorithm": "flow-grpo", "exploration": {"start": start, "until": until}})
    assert configuration.explorable(config) == may


@pytest.mark.parametrize(("start", "until"), [(9, 0), (3, 3), (0, -9), (5, -4)])
def test_a_range_without_a_step_is_refused(start: int, until: int):
    assert complaint({"algorithm": "flow-grpo", "exploration": {"start": start, "until": until}}) == (
        f"exploration.start: of steps 0 to 8, none from {start} on may explore under exploration.until {until}; "
        "lower the one or raise the other"
    )


def test_k_is_ignored_where_all_steps_explore():
    assert resolve({"sampler": {"steps": 2}, "exploration": {"rule": "all", "k": 40}}).sampler.steps == 2


@pytest.mark.parametrize("rule", ["window", "random", "entropy_peaks", "delta_entropy_peaks"])
def test_peaks_must_fit_with_their_distance(rule: str):
    layer = {"sampler": {"steps": 7}, "exploration": {"rule": rule, "k": 3, "min_distance": 2}}
    assert resolve(layer).exploration.min_distance == 2  # steps 0, 2 and 4 of 0..5
    said = complaint(layer, {"exploration": {"min_distance": 3}})  # 0, 3 and 6, but 6 is the last of all
    assert said == (
        "exploration.min_distance: 3 steps to explore do not fit 3 apart into steps 0 to 5; "
        "lower it or exploration.k, or raise sampler.steps"
    )
    assert resolve(layer, {"exploration": {"min_distance": 3, "rule": "all"}}).exploration.k == 3


def test_low_above_high_is_refused_where_it_is_used():
    layer = {"allocation": {"rule": "median_split", "low": 17, "high": 16}}
    assert complaint(layer) == "allocation.low: 17 is above allocation.high, 16"
    assert resolve(layer, {"allocation": {"rule": "uniform"}}).allocation.low == 17


@pytest.mark.parametrize("name", configuration.settings())
def test_a_config_is_frozen(name: str):
    owner: Any = resolve()
    *groups, last = name.split(".")
    for group in groups:
        owner = getattr(owner, group)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(owner, last, getattr(owner, last))


def test_every_choice_of_a_rule_is_accepted():
    for group in ("allocation", "exploration"):
        for rule in get_args(get_type_hints(get_type_hints(Config)[group])["rule"]):
            assert getattr(resolve({group: {"rule": rule}}), group).rule == rule


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ({"algorithm": "dgpo", "exploration": {"share": 0.5}}, "exploration.share: dgpo compares"),
        ({"algorithm": "online-dpo", "exploration": {"share": 0.5}}, "exploration.share: dpo compares"),
        ({"algorithm": "online-dpo", "advantage": {"best_of": 4}}, "advantage.best_of: dpo compares"),
        ({"algorithm": "flow-grpo", "advantage": {"best_of": 1}}, "advantage.best_of: one rollout alone"),
        ({"algorithm": "e-grpo", "sampler": {"kind": "cps"}}, "exploration.merge: a longer step of cps"),
        ({"algorithm": "e-grpo", "sampler": {"kind": "dpm_sde"}}, "exploration.merge: a longer step of dpm_sde"),
        ({"algorithm": "branch-grpo", "exploration": {"merge": 0.5}}, "exploration.merge: a tree is noisy"),
        ({"algorithm": "branch-grpo", "sampler": {"shared_noise": False}}, "exploration.branch: tree lets"),
        ({"algorithm": "grpo-guard", "loss": {"score": "squared"}}, "loss.score: guard needs"),
        ({"algorithm": "flow-dppo", "loss": {"score": "squared"}}, "loss.score: dppo needs"),
        ({"algorithm": "flow-grpo", "loss": {"kind": "nft"}}, "loss.kind: nft is of finished images"),
        ({"algorithm": "awm", "loss": {"kind": "guard"}}, "loss.kind: rollouts of sampler.kind ode"),
        ({"algorithm": "awm", "sampler": {"compress": 0.5}}, "sampler.compress: rollouts of sampler.kind ode"),
        ({"algorithm": "aegpo-fast", "sampler": {"guidance": 4.5}}, "loss.reference_guidance: 3.0, up to which aegpo"),
        ({"algorithm": "awm", "loss": {"kl": 0, "reference_guidance": 2}}, "loss.reference_guidance: clip without"),
        (
            {"algorithm": "online-dpo", "optimizer": {"updates": 1, "keep_graphs": True}},
            "optimizer.keep_graphs: advantage.best_of",
        ),
        (
            {"algorithm": "awm", "optimizer": {"keep_graphs": True}},
            "optimizer.keep_graphs: the graphs are of the weights",
        ),
        ({"algorithm": "ddpo", "sampler": {"eta": 1.2}}, "sampler.eta: 1.2 is above 1"),
        ({"algorithm": "flow-grpo", "exploration": {"start": 3, "until": 5, "skip": 2}}, "exploration.skip: 2 steps"),
        ({"algorithm": "flow-grpo", "exploration": {"skip": 9}}, "exploration.skip: 9 steps"),
    ],
)
def test_choices_that_contradict_one_another_are_refused_and_their_neighbours_are_not(
    layer: dict[str, Any], expected: str
):
    assert complaint(layer).startswith(expected)
    resolve({"algorithm": layer["algorithm"]})


# ---------------------------------------------------------------- rewards


def test_rewards_by_name_and_weight():
    several = resolve(
        {"reward": {"pickscore": 1, "ocr": {"weight": 0.5, "folder": "x"}, "jpeg_size": -0.25, "world": 0}}
    )
    assert reward_terms(several.reward) == {
        "pickscore": (1.0, {}),
        "ocr": (0.5, {"folder": "x"}),
        "jpeg_size": (-0.25, {}),
        "world": (0.0, {}),
    }
    assert reward_label(several.reward) == "pickscore + 0.5 ocr - 0.25 jpeg_size"
    assert reward_terms("world") == {"world": (1.0, {})}
    assert reward_terms({"vlm": {"model": "m"}}) == {"vlm": (1.0, {"model": "m"})}
    assert resolve({"reward": {"ocr": 1}}, {"reward": "world"}).reward == "world"
    assert resolve({"reward": {"ocr": 1, "vlm": 2}}, {"reward": {"world": 1}}).reward == {"world": 1}
    assert reward_terms({"ocr": "1e-3"}) == {"ocr": (0.001, {})}  # as YAML reads 1e-3


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (5, "reward: should be a name, or weights by name, as in {pickscore: 1, ocr: 0.5}, got 5"),
        (["ocr"], "reward: should be a name, or weights by name, as in {pickscore: 1, ocr: 0.5}, got ['ocr']"),
        ({"ocr": "much"}, "reward: ocr: should be a weight, as in {ocr: 0.5}, or settings with a `weight` among them"),
        ({"ocr": True}, "reward: ocr: should be a weight, as in {ocr: 0.5}, or settings with a `weight` among them"),
        ({"ocr": float("nan")}, "reward: ocr: should be a weight"),
        ({"ocr": {1: 2}}, "reward: ocr: a setting's name should be text, got 1"),
        ({"ocr": {"weight": None}}, "reward: ocr: should be a weight"),
        ({"ocr": 0}, "reward: none has a weight other than 0, so nothing would be learned from; give one of them 1"),
        ({}, "reward: none has a weight other than 0"),
    ],
)
def test_rewards_that_cannot_be_read(reward: Any, expected: str):
    assert complaint({"reward": reward}).startswith(expected)
