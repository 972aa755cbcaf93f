import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from aegpo.algorithms import ALGORITHMS
from aegpo.cli import main
from aegpo.config import Config, dump_yaml, load_yaml, resolve, settings
from aegpo.words import RECIPES

PNG = ["--prompt", "a red circle", "--out", "x.png"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, with recipes good and bad and something that looks like a run; it is the working directory."""
    texts = {
        "my.yaml": "steps: 20\n",
        "misspelt.yaml": "optimizer:\n  learning_rat: 0.1\n  lrr: 0.1\n",
        "typed.yaml": "sampler: {steps: ten}\n",
        "number.yaml": "optimizer: 3\n",
        "list.yaml": "- steps\n",
        "broken.yaml": "steps: [1\nseed: 2\n",
        "algorithms.yaml": "algorithm: [aegpo]\n",
        "empty.txt": "\n\n",
        "ring.txt": "a ring\n",
        "zebra.txt": "a ring\na zebra\n",
        "fresh/config.yaml": "steps: 3\n",
        "run/config.yaml": "steps: 3\noutput_dir: where/it/was\noptimizer: {lr: 0.5}\n",
        "run/checkpoint-2/state.json": "{}",
        "run/metrics.jsonl": '{"step": 0}\n',
        "all/config.yaml": "model: {train: full}\n",
        "broken/config.yaml": "steps: x\n",
        "other/notes.txt": "",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.yaml").write_bytes("reward: é\n".encode("latin-1"))
    (tmp_path / "latin.txt").write_bytes("a café\n".encode("latin-1"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Config, dict[str, Any]]]:
    """Stands where a training would start, and remembers what it was asked for."""
    asked: list[tuple[Config, dict[str, Any]]] = []
    build = SimpleNamespace(run=lambda config, **options: asked.append((config, options)))
    monkeypatch.setitem(sys.modules, "aegpo.build", build)
    return asked


def complaint(argv: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a wrong command line gets."""
    before = {(path, path.stat().st_mtime_ns) for path in folder.rglob("*")}
    assert main(argv) == 2
    assert {(path, path.stat().st_mtime_ns) for path in folder.rglob("*")} == before
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("aegpo: ") and err.endswith("\n") and err.count("\n") == 1
    return err.removeprefix("aegpo: ").removesuffix("\n")


def resolved(argv: list[str], capsys: pytest.CaptureFixture[str]) -> Config:
    assert main(["train", *argv, "--dry-run"]) == 0
    return resolve(yaml.safe_load(capsys.readouterr().out))


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        # the command
        ([], "no command given; the commands are train, .*, reward-check, reward-server, world$"),
        (["train", "--reward", "world: 1"], "reward: should be a name, or .*, as in '{pickscore: .*, got 'world: 1'"),
        (["train", "--reward", "[world]"], "reward: should be a name, or .*, as in '{pickscore: .*, got '\\[world\\]'"),
        (
            ["train", "--dry-run", "--reward", "picscore"],
            "reward: 'picscore' is unknown; .*; did you mean pickscore\\?",
        ),
        (["train", "--dry-run", "--reward", "{vlm: {url: x}}"], "reward: vlm needs the setting model"),
        (["trian"], "'trian' is not a command; the commands are train, .*; did you mean train\\?"),
        (["--hlep"], "'--hlep' is not a command; .*; did you mean --help\\?"),
        # the recipe
        (["train", "wrld"], "recipe wrld does not exist; the packaged recipes are .*world.*; did you mean world\\?"),
        (["train", "my.yml"], "recipe my.yml does not exist; .*; did you mean my.yaml\\?"),
        (["train", "run"], "recipe run cannot be read: .*"),
        (["train", "latin.yaml"], "recipe latin.yaml cannot be read: it is not UTF-8 text .byte 8.*"),
        (["train", "broken.yaml"], "recipe broken.yaml cannot be read: .*line 2.*"),
        (["train", "list.yaml"], "recipe list.yaml must hold settings such as 'steps: 100', not a list"),
        (["train", "my.yaml", "other.yaml"], "train: unrecognized arguments: other.yaml"),
        # a setting, in a recipe and on the command line
        (["train", "misspelt.yaml"], "recipe misspelt.yaml: optimizer.learning_rat is not a setting.*"),
        (["train", "typed.yaml"], "recipe typed.yaml: sampler.steps: input should be a valid integer, got 'ten'"),
        (["train", "number.yaml"], "recipe number.yaml: optimizer is a group of settings \\(lr, .*\\), not 3"),
        (["train", "number.yaml", "--optimizer.lr", "1"], "recipe number.yaml: optimizer is a group .*, not 3"),
        (
            ["train", "algorithms.yaml"],
            "recipe algorithms.yaml: algorithm: \\['aegpo'\\] is not one of flow-grpo, .*; .*",
        ),
        (
            ["train", "--optimizer.lrr", "1"],
            "command line: optimizer.lrr is not a setting; did you mean optimizer.lr\\?",
        ),
        (["train", "--stesp"], "command line: stesp is not a setting; did you mean steps\\?"),
        (["train", "--algorithm", "aegop"], "command line: algorithm: 'aegop' is not one of .*; did you mean aegpo\\?"),
        (["train", "my.yaml", "--steps", "2.5"], "command line: steps: input should be a valid integer, got 2.5"),
        (
            ["train", "--optimizer.lr", "fast"],
            "command line: optimizer.lr: input should be a valid number.* got 'fast'",
        ),
        (["train", "--optimizer.lr", "true"], "command line: optimizer.lr: input should be a valid number, got True"),
        (["train", "--steps", "-5"], "command line: steps: input should be greater than or equal to 0, got -5"),
        (["train", "--rollouts-per-step", "8"], "command line: rollouts_per_step: .* groups of one.* at least 16"),
        (
            ["train", "--algorithm", "aegpo", "--exploration.k", "10"],
            "command line: exploration.k: 10 steps .* only 0 to 6 may be; lower it, or raise sampler.steps",
        ),
        (["train", "--optimizer", "3"], "command line: optimizer is a group of settings \\(lr, .*\\), not 3"),
        (
            ["train", "--model.lora.targets", "[to_q"],
            "command line: model.lora.targets: '\\[to_q' is not a YAML value .*",
        ),
        (["train", "--steps"], "command line: steps needs a value"),
        (["train", "--steps", "--dry-run"], "command line: steps needs a value"),
        (["train", "--output-dir="], "command line: output_dir needs a value"),
        # train's own options
        (["train", "--dryrun"], "command line: --dryrun is not an option; did you mean --dry-run\\?"),
        (["train", "--resum", "latest"], "command line: --resum is not an option; did you mean --resume\\?"),
        (["train", "--"], "train: -- is not an option.*"),
        (["train", "--resume"], "train: argument --resume: give 'latest' or a folder such as .*checkpoint-10"),
        (["train", "--resume", "lates"], "train: argument --resume: lates is no folder; give 'latest' or .*"),
        (
            ["train", "--resume", "latest"],
            "--resume latest: runs/latest is not the folder .* no config.yaml; give its --output-dir",
        ),
        (["train", "--resume", "latest", "--output-dir", "b"], "--resume latest: b is not .*: it holds no config.yaml"),
        (["train", "--resume", "other"], "--resume other: . is not the folder of a run: it holds no config.yaml"),
        (["train", "--resume", "run"], "--resume run: a run, not one of .*; --resume latest --output-dir run"),
        (["train", "--resume", "latest", "--overwrite"], "--resume goes on .* --overwrite starts .*; give one of them"),
        (
            ["train", "--resume", "latest", "--output-dir", "run", "--sampler.eta", "much"],
            "command line: sampler.eta: .* got 'much'",
        ),
        # the small commands
        (["sample"], "sample: the following arguments are required: RUN, --prompt, --out"),
        (["sample", "rnu", *PNG], "sample: argument RUN: 'rnu' is not the folder of a run.*; did you mean run\\?"),
        (["sample", "run", "--promt", "x"], "sample: --promt is not an option; did you mean --prompt\\?"),
        (["sample", "run", "--prompt", " ", "--out", "x"], "sample: argument --prompt: must not be empty"),
        (["sample", "run", *PNG, "--seed", "abc"], "sample: argument --seed: must be a whole .* least 0, not 'abc'"),
        (["sample", "run", *PNG, "--seed", "-1"], "sample: argument --seed: must be a whole .* least 0, not '-1'"),
        (["eval"], "eval: the following arguments are required: RUN"),
        (["eval", "run", "--images", "0"], "eval: argument --images: must be a whole number of at least 1, not '0'"),
        (["eval", "run", "--image", "3"], "eval: --image is not an option; did you mean --images\\?"),
        (["eval", "run", "--rewards", "a,,b"], "eval: argument --rewards: must be names with commas .*, not 'a,,b'"),
        (["eval", "run", "--rewards", "a, b,a"], "eval: argument --rewards: a stands twice; give each once"),
        (["eval", "run", "--rewards", "a", "--reward", "b"], "eval: --reward judges by one, .*; give one of them"),
        (["eval", "run", "--out", "x"], "eval: --out says where --rewards writes; without it nothing is written"),
        (["report", "nothing"], "report: argument RUN: 'nothing' is not the folder of a run: it holds no config.yaml"),
        (["report", "run", "more"], "report: unrecognized arguments: more"),
        (["export", "run"], "export: the following arguments are required: --comfyui"),
        (
            ["export", "run", "--comfyui", "x.pt"],
            "export: argument --comfyui: must be a file whose name ends in .safetensors, not 'x.pt'",
        ),
        (["push", "run"], "push: the following arguments are required: USER/NAME"),
        (["push", "run", "name"], "'name' is not a repository on the Hub; give it as USER/NAME"),
        (["train", "--push-to-hub", "a/b/c"], "'a/b/c' cannot be the name of a repository on the Hub: .*"),
        (
            ["train", "--push-to-hb", "a/b"],
            "command line: --push-to-hb is not an option; did you mean --push-to-hub\\?",
        ),
        (["analyze"], "analyze: the following arguments are required: MODEL"),
        (["analyze", "run", "--image", "3"], "command line: --image is not an option; did you mean --images\\?"),
        (["analyze", "run", "--images", "0"], "analyze: argument --images: must be a whole .* least 1, not '0'"),
        (["analyze", "run", "--prob.rows", "3"], "prob is not a setting; did you mean probe.rows\\?"),
        (["analyze", "world", "--probe.layers", "a"], "probe.layers: should be a list, such as \\[a, b\\], got 'a'"),
        (["analyze", "world", "--eval-images", "3"], "eval_images: analyze takes it as --images"),
        (["analyze", "world", "--model.path", "a"], "model.path: analyze takes it as MODEL"),
        (["world"], "world: the following arguments are required: pretrain, OUT"),
        (["world", "pretrian", "out"], "world: argument pretrain: invalid choice: 'pretrian' .*'?pretrain'?.*"),
        (["world", "pretrain", "out", "--steps", "0"], "world: argument --steps: must be a whole .* least 1, not '0'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_that_says_what_would_be_right(
    argv: list[str], expected: str, folder: Path, capsys: pytest.CaptureFixture[str]
):
    assert re.fullmatch(expected, complaint(argv, folder, capsys))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["train", "--output-dir", "run"], "output_dir: run exists; .*--overwrite.*--resume latest.*--output-dir.*"),
        (["train", "--reward", "wrld"], "reward: 'wrld' is unknown; known are aesthetic, .*; did you mean world\\?"),
        (["train", "--prompts.train", "empty.txt"], "prompts.train: empty.txt holds no prompt.*"),
        (["train", "--prompts.train", "latin.txt"], "prompts.train: latin.txt is not UTF-8.*"),
        (["train", "--prompts.eval", "none.txt"], "prompts.eval: none.txt cannot be read: No such file or directory"),
        (["sample", "run", "--prompt", "a zebra", "--out", "x.png"], "--prompt: .* does not know 'zebra' .*"),
        (["sample", "run", "--prompt", "a ring", "--out", "x"], "--out: x is not named as an image; .*ends in .png.*"),
        (["sample", "run", "--prompt", "a ring", "--out", "x.txt"], "--out: x.txt is not named as an image; .*"),
        (["sample", "run", "--prompt", "a ring", "--out", "x.psd"], "--out: x.psd is not named as an image; .*"),
        (["sample", "broken", *PNG], "broken/config.yaml: steps: input should be a valid integer, got 'x'"),
        (["eval", "broken"], "broken/config.yaml: steps: input should be a valid integer, got 'x'"),
        (["eval", "fresh"], "run fresh has no checkpoint yet: its first is written after its first evaluation"),
        (
            ["eval", "run", "--rewards", "world,wrld"],
            "reward: 'wrld' is unknown; known are aesthetic, .*; did you mean world\\?",
        ),
        (["eval", "run", "--rewards", "world,mine.py:score"], "reward: file mine.py does not exist"),
        (["eval", "run", "--rewards", "world"], "checkpoint run/checkpoint-2 is not complete .*manifest.json.*"),
        (
            ["eval", "run", "--rewards", "world", "--prompts", "ring.txt"],
            "--prompts: ring.txt holds one prompt, and intervals over prompts take two at least",
        ),
        (["eval", "fresh", "--rewards", "world"], "run fresh has no checkpoint yet: .*"),
        (["export", "run", "--comfyui", "x.safetensors"], "run run has no weights yet: .*safetensors is missing"),
        (["export", "all", "--comfyui", "x.safetensors"], "run all trained all weights, and export is of a LoRA .*"),
        (["analyze", "fresh"], "run fresh has no checkpoint yet: its first is written after its first evaluation"),
        (["analyze", "broken"], "broken/config.yaml: steps: input should be a valid integer, got 'x'"),
        (["analyze", "run"], "checkpoint run/checkpoint-2 is not complete .*manifest.json.*"),
        (["analyze", "rnu"], "rnu is not the folder of a run .*no config.yaml.*needs --prompts: a .txt .* or a .jsonl"),
        (["analyze", "no/such/run", "--prompts", "ring.txt"], "model.path: no/such/run is neither a folder nor .*"),
        (["analyze", "other", "--prompts", "ring.txt"], "model.path: other holds no diffusers pipeline .*"),
        (["analyze", "world", "--prompts", "empty.txt"], "--prompts: empty.txt holds no prompt; .*"),
        (["analyze", "world", "--prompts", "none.txt"], "--prompts: none.txt cannot be read: No such file.*"),
        (["analyze", "world", "--prompts", "zebra.txt"], "--prompts: zebra.txt: .* does not know 'zebra' .*"),
        (
            ["analyze", "world", "--reward", "wrld"],
            "reward: 'wrld' is unknown; known are aesthetic, .*; did you mean world\\?",
        ),
        (["analyze", "world", "--reward", "mine.py:score"], "reward: file mine.py does not exist"),
        (["analyze", "world", "--out", "my.yaml"], "my.yaml: File exists"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_found_by_the_training_itself_is_one_line_too(
    argv: list[str], expected: str, folder: Path, capsys: pytest.CaptureFixture[str]
):
    assert re.fullmatch(expected, complaint(argv, folder, capsys))


def test_the_same_mistake_gets_the_same_words_in_a_recipe_and_on_the_command_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    (folder / "bad.yaml").write_text("loss: {kl: -1}\n")
    in_recipe = complaint(["train", "bad.yaml"], folder, capsys)
    on_command_line = complaint(["train", "my.yaml", "--loss.kl", "-1"], folder, capsys)
    assert in_recipe.removeprefix("recipe bad.yaml: ") == on_command_line.removeprefix("command line: ")


def test_the_layer_that_is_wrong_is_named_whatever_the_other_holds(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "wide.yaml").write_text(
        "algorithm: flow-grpo\nprompts_per_step: 60\n"
    )  # wrong alone: 96 rollouts are too few for 60 prompts
    assert complaint(["train", "wide.yaml"], folder, capsys).startswith("recipe wide.yaml: rollouts_per_step: 96 ")
    assert resolved(["wide.yaml", "--rollouts_per_step", "120"], capsys).rollouts_per_step == 120
    answer = complaint(["train", "wide.yaml", "--rollouts_per_step", "100"], folder, capsys)
    assert answer.startswith("command line: rollouts_per_step: 100 rollouts for 60 prompts")
    answer = complaint(["train", "wide.yaml", "--rollouts_per_step", "x"], folder, capsys)
    assert answer == "command line: rollouts_per_step: input should be a valid integer, got 'x'"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("two\nlines,  and  spaces"), "two lines, and spaces"),
        (FileNotFoundError(2, "No such file or directory", "me.png"), "me.png: No such file or directory"),
        (PermissionError(13, "Permission denied", "runs"), "runs: Permission denied"),
        (IsADirectoryError(21, "Is a directory", "runs"), "runs: Is a directory"),
    ],
)
def test_an_error_of_the_training_is_one_line(
    error: Exception,
    expected: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def run(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "aegpo.build", SimpleNamespace(run=run))
    assert complaint(["train"], folder, capsys) == expected


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch):
    def run(*_: Any, **__: Any) -> None:
        raise AssertionError("ours")

    monkeypatch.setitem(sys.modules, "aegpo.build", SimpleNamespace(run=run))
    with pytest.raises(AssertionError, match="ours"):
        main(["train"])


@pytest.mark.parametrize(
    ("argv", "holds", "expected"),
    [
        (
            [],
            ["config.yaml", "checkpoint-0"],
            "stopped; to go on: aegpo train --resume latest --output-dir 'my runs/a'",
        ),
        ([], ["config.yaml"], "stopped before its first checkpoint; start it again with --overwrite"),
        ([], [], "stopped before its first checkpoint; start it again"),
        (  # what stands there is still the run that was to be overwritten
            ["--seed", "7", "--overwrite"],
            ["config.yaml", "checkpoint-0"],
            "stopped before its first checkpoint; start it again with --overwrite",
        ),
        (
            ["--seed", "7", "--resume", "latest"],
            ["config.yaml", "checkpoint-0"],
            "stopped; to go on: aegpo train --resume latest --output-dir 'my runs/a'",
        ),
    ],
    ids=["begun", "no checkpoint", "nothing", "overwriting", "resumed"],
)
def test_an_interrupted_training_says_how_to_go_on(
    argv: list[str],
    holds: list[str],
    expected: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def run(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "aegpo.build", SimpleNamespace(run=run))
    run_folder = folder / "my runs" / "a"
    run_folder.mkdir(parents=True)
    if "config.yaml" in holds:
        (run_folder / "config.yaml").write_text(dump_yaml(resolve({"output_dir": "my runs/a", "steps": 20})))
    if "checkpoint-0" in holds:
        (run_folder / "checkpoint-0").mkdir()
    recipe = [] if "--resume" in argv else ["my.yaml"]
    assert main(["train", *recipe, *argv, "--output-dir", "my runs/a"]) == 130
    assert capsys.readouterr().err == f"aegpo: {expected}\n"


# ---------------------------------------------------------------- settings


def test_command_line_over_recipe_over_algorithm_over_default(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "three.yaml").write_text("algorithm: flow-grpo\noptimizer: {updates: 3}\n")
    assert Config().optimizer.updates == 1
    assert resolved(["my.yaml", "--algorithm", "flow-grpo"], capsys).optimizer.updates == 2
    recipe = resolved(["three.yaml"], capsys)
    assert recipe.optimizer.updates == 3
    both = resolved(["three.yaml", "--optimizer.updates", "4"], capsys)
    assert both.optimizer.updates == 4
    assert both.loss.kl == recipe.loss.kl == 0.04  # the algorithm's, which neither layer above it names
    assert both.optimizer.lr == 3e-4  # the default's, which none names


def test_values_are_read_as_yaml_and_text_as_it_stands(capsys: pytest.CaptureFixture[str]):
    argv = ["--steps", "20", "--optimizer.lr", "3e-5", "--model.lora.targets", "[to_q,to_k]", "--sampler.guidance=2.5"]
    argv += ["--optimizer.betas", "[0.5, 0.75]", "--prompts-per-step=6", "--output-dir", "2026-01-31"]
    argv += ["--reward", "my reward.py:score", "--optimizer.eps", "1.0e-6", "--model.path", "007", "--steps", "21"]
    config = resolved(argv, capsys)
    assert config.steps == 21
    assert config.optimizer.lr == 3e-5
    assert config.optimizer.eps == 1e-6
    assert config.model.lora.targets == ("to_q", "to_k")
    assert config.sampler.guidance == 2.5
    assert config.optimizer.betas == (0.5, 0.75)
    assert config.prompts_per_step == 6
    assert config.output_dir == "2026-01-31"
    assert config.reward == "my reward.py:score"
    assert config.model.path == "007"


def test_the_recipe_may_stand_anywhere_among_the_options(capsys: pytest.CaptureFixture[str]):
    first = resolved(["my.yaml", "--seed", "5"], capsys)
    assert first == resolved(["--seed", "5", "my.yaml"], capsys)
    assert (first.steps, first.seed) == (20, 5)


def test_without_a_recipe_the_packaged_world_is_taken(trained: list[tuple[Config, dict[str, Any]]]):
    assert main(["train"]) == 0
    assert trained == [(resolve(load_yaml(RECIPES / "world.yaml")), {"resume": None, "overwrite": False})]


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_packaged_recipe_resolves_by_name(recipe: Path, capsys: pytest.CaptureFixture[str]):
    assert resolved([recipe.stem], capsys) == resolve(load_yaml(recipe))


@pytest.mark.parametrize("resume", [["--resume", "latest", "--output-dir", "run"], ["--resume", "run/checkpoint-2"]])
def test_a_resumed_run_takes_its_own_config_and_stays_in_its_folder(
    resume: list[str], trained: list[tuple[Config, dict[str, Any]]]
):
    assert main(["train", *resume, "--steps=9"]) == 0
    [(config, options)] = trained
    assert config == resolve({"steps": 9, "optimizer": {"lr": 0.5}, "output_dir": "run"})
    assert options == {"resume": resume[1], "overwrite": False}


def test_the_worlds_recipe_is_not_laid_under_another_model(capsys: pytest.CaptureFixture[str]):
    world = resolve(load_yaml(RECIPES / "world.yaml"))
    assert resolved(["--model.path", "somebody/sd3"], capsys) == resolve({"model": {"path": "somebody/sd3"}})
    assert resolved(["--model.path", "world"], capsys) == resolved(["--model.resolution", "0"], capsys) == world
    both = resolved(["world", "--model.path", "somebody/sd3"], capsys)
    assert (both.sampler, both.optimizer, both.model.path) == (world.sampler, world.optimizer, "somebody/sd3")


def test_a_run_is_resumed_from_the_default_folder_and_by_its_recipe(
    folder: Path, trained: list[tuple[Config, dict[str, Any]]]
):
    (folder / "runs").mkdir()
    (folder / "run").rename("runs/latest")
    assert main(["train", "--resume", "latest"]) == 0
    assert main(["train", "my.yaml", "--resume", "latest"]) == 0
    own, by_recipe = (config for config, _ in trained)
    assert (own.steps, own.optimizer.lr, own.output_dir) == (3, 0.5, "runs/latest")
    assert (by_recipe.steps, by_recipe.optimizer.lr, by_recipe.output_dir) == (20, 3e-4, "runs/latest")


def test_overwrite_is_passed_on(trained: list[tuple[Config, dict[str, Any]]]):
    assert main(["train", "my.yaml", "--overwrite"]) == 0
    assert [options for _, options in trained] == [{"resume": None, "overwrite": True}]


def test_report_says_where_it_wrote_the_report(capsys: pytest.CaptureFixture[str]):
    assert main(["report", "run"]) == 0
    assert capsys.readouterr().out == f"{Path('run/report.html')}\n"
    assert "<html" in Path("run/report.html").read_text()


# ---------------------------------------------------------------- dry run

GUIDED = {  # 50 rollouts x 3 explored of 8 steps, everything twice, and a fourth pass for the KL
    "algorithm": "aegpo",
    "steps": 7,
    "prompts_per_step": 4,
    "rollouts_per_step": 50,
    "sampler": {"steps": 8, "guidance": 4.5},
    "exploration": {"rule": "entropy_peaks", "k": 3},
    "loss": {"kl": 0.04},
    "optimizer": {"updates": 4, "micro_batch": 37},  # 150 rows as 38 + 38 + 37 + 37
}
PLAIN = {  # no probe: uniform, and all steps but the last
    "algorithm": "flow-grpo",
    "steps": 10,
    "prompts_per_step": 6,
    "rollouts_per_step": 24,
    "sampler": {"steps": 5},
    "loss": {"kl": 0},
}
PROBED = {"algorithm": "flow-grpo", "steps": 3, "exploration": {"rule": "delta_entropy_peaks", "k": 2}}
SPLIT = {
    "algorithm": "flow-grpo",
    "steps": 1,
    "allocation": {"rule": "median_split"},
    "exploration": {"rule": "window"},
}
MATCHED = PROBED | {"sampler": {"kind": "ode"}}  # a fifth pass, for the log-probability before the update
SHARED = {  # every rollout begins on a trunk of one step at least; the spread is measured at steps 0, 10 and 20
    "algorithm": "flow-grpo",
    "steps": 25,
    "sampler": {"shared_noise": True},
    "exploration": {"rule": "reward_spread", "k": 2},
    "loss": {"kl": 0},
}
PAIRS = {"algorithm": "online-dpo", "steps": 1}  # two of each group are trained
PRUNED = {"algorithm": "branch-grpo", "steps": 1, "advantage": {"best_of": 4}, "exploration": {"skip": 3}}
GROUPED = {"algorithm": "dgpo", "steps": 1, "optimizer": {"micro_batch": 4}}  # but twelve rows stay together
ROWS = ("rollouts", "trained steps", "rows", "optimizer updates", "micro-batches")
COSTS = ("sampling evaluations", "trunk evaluations", "training evaluations", "evaluations a step")
BESIDES = ("base probe", "spread of reward", "evaluations in all", "base probes in all")


@pytest.mark.parametrize(
    ("recipe", "rows", "costs", "besides"),
    [  # of a group a quarter begins on the probe: there each saves a step at least; under ode one, which saves all
        (GUIDED, (50, 3, 150, 4, 6), (2 * (400 - 10), 64, 1200, 2044), (64, 0, 14_308, 448)),
        (PLAIN, (24, 4, 96, 2, 2), (120, 0, 288, 408), (0, 0, 4_080, 0)),
        (PROBED, (96, 2, 192, 2, 4), (960 - 18, 80, 768, 1790), (80, 0, 5_370, 240)),
        (MATCHED, (96, 2, 192, 2, 4), (960 - 80, 80, 960, 1920), (80, 0, 5_760, 240)),
        (SPLIT, (96, 4, 384, 2, 8), (960 - 18, 80, 1536, 2558), (80, 0, 2_558, 80)),
        (SHARED, (96, 2, 192, 2, 4), (960 - 96, 8, 576, 1448), (0, 3 * 4 * (6 * 45 + 9), 36_200 + 3_348, 0)),
        (PAIRS, (96, 4, 64, 2, 2), (960, 0, 256, 1216), (0, 0, 1_216, 0)),
        (PRUNED, (96, 6, 192, 2, 4), (960 - 96, 8, 576, 1448), (0, 0, 1_448, 0)),
        (GROUPED, (96, 4, 384, 2, 32), (960, 0, 1536, 2496), (0, 0, 2_496, 0)),
    ],
    ids=["guided", "plain", "probed", "matched", "split", "shared", "pairs", "pruned", "grouped"],
)
def test_the_dry_run_counts_what_a_step_costs(
    recipe: dict[str, Any], rows: tuple[int, ...], costs: tuple[int, ...], besides: tuple[int, ...]
):
    from aegpo.dry_run import arithmetic

    expected = dict(zip((*ROWS, *COSTS, *BESIDES), (*rows, *costs, *besides), strict=True))
    assert {what: number for what, _, number in arithmetic(resolve(recipe))} == expected


def test_the_dry_run_prints_what_it_counts(folder: Path, capsys: pytest.CaptureFixture[str]):
    from aegpo.dry_run import arithmetic

    (folder / "recipe.yaml").write_text(yaml.safe_dump(GUIDED))
    printed = dry_run(["recipe.yaml"], capsys)
    numbers = {what: int(text.split()[-1].replace(",", "")) for what, text in printed.items() if "memory" not in what}
    assert numbers == {what: number for what, _, number in arithmetic(resolve(GUIDED))}


def dry_run(argv: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, str]:
    """The comments that a dry run prints, by what they are of."""
    assert main(["train", *argv, "--dry-run"]) == code
    return {line[2:25].strip(): line[25:].strip() for line in capsys.readouterr().out.splitlines() if line[:1] == "#"}


FLUX = Path(__file__).parents[1] / "models" / "configs" / "flux1-dev"
SMALL_FLUX = ["--model.path", str(FLUX), "--model.resolution", "256", "--optimizer.micro-batch", "1"]


def test_the_dry_run_says_what_memory_a_run_takes_and_counts_guidance_as_an_input_once(capsys):
    guided = [*SMALL_FLUX, "--algorithm", "flow-grpo", "--sampler.guidance", "3.5"]
    said = dry_run([*guided, "--model.gradient-checkpointing", "true"], capsys)
    assert (
        said["memory: weights"].startswith("11,901,408,320 of the network") and "22.32 GiB" in said["memory: weights"]
    )
    assert said["memory: total"].startswith(
        "at most, during encoding: weights, trained, reward, text encoders"
    )  # 9.1 of these
    assert said["memory: fits GPUs of"] == "40 GB, 48 GB, 80 GB, 141 GB, 6% left free"
    assert said["sampling evaluations"].split()[-1] == "960" and "x 2" not in said["sampling evaluations"]
    unread = dry_run([*guided, "--model.path", "nobody/nothing"], capsys)
    assert unread["sampling evaluations"].split()[-1] == "1,920"
    assert unread["memory"] == "not estimated: the config files of nobody/nothing cannot be read here"


def test_a_dry_run_is_refused_where_the_gpu_is_too_small(capsys, monkeypatch: pytest.MonkeyPatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=2**27))
    assert main(["train", "--dry-run"]) == 2
    out, err = capsys.readouterr()
    assert "# memory: total" in out
    assert err.startswith("aegpo: the GPU here has 0.1 GiB, but this run would take ") and err.count("\n") == 1
    assert "for activations; what lowers it: model.gradient_checkpointing true, optimizer.micro_batch 48, " in err


@pytest.mark.parametrize(("rollouts", "said"), [(64, True), (65, False), (127, False), (128, True)])
def test_the_dry_run_says_when_a_split_is_none(rollouts: int, said: bool):
    from aegpo.dry_run import arithmetic

    [(_, about, _), *_] = arithmetic(resolve({"algorithm": "aegpo", "rollouts_per_step": rollouts}))
    assert ("all alike: so many leave median_split no choice" in about) == said


def test_what_the_dry_run_prints_is_a_recipe_of_the_same_run(folder: Path, capsys: pytest.CaptureFixture[str]):
    before = sorted(folder.rglob("*"))
    assert main(["train", "my.yaml", "--loss.kl", "0.01", "--dry-run"]) == 0
    assert sorted(folder.rglob("*")) == before
    (folder / "again.yaml").write_text(capsys.readouterr().out)
    assert resolved(["again.yaml"], capsys) == resolve({"steps": 20, "loss": {"kl": 0.01}})


# ---------------------------------------------------------------- help, and how fast it comes


def test_the_help_of_train_lists_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert not stop.value.code
    page = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    entries = {text.split()[0]: text for text in page.split(" --") if text.strip()}
    for name in settings():
        default: Any = Config()
        for key in name.split("."):
            default = getattr(default, key)
        shown = f"'[{', '.join(map(str, default))}]'" if isinstance(default, tuple) else default
        assert f"(default: {shown})" in entries[name]
    assert {name for name in entries if "." in name} <= set(settings())  # and no option that the command line refuses
    assert "Classifier-free guidance" in entries["sampler.guidance"]
    assert set(ALGORITHMS) <= set(re.findall(r"[a-z-]+", entries["algorithm"]))
    assert {"dry-run", "resume", "overwrite", "push-to-hub"} <= set(entries)


@pytest.mark.parametrize("command", ["sample", "eval", "report", "export", "push", "analyze", "world"])
def test_every_small_command_has_a_help_page(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert not stop.value.code
    assert f"usage: aegpo {command}" in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert f"aegpo {command} " in capsys.readouterr().out


def imported(argv: list[str]) -> set[str]:
    """The packages that a fresh interpreter holds after a command."""
    program = "import sys; from aegpo.cli import main; code = main(sys.argv[1:]); print(*sys.modules); sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True)
    assert done.returncode in (0, 2)
    return {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}


HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "scipy", "matplotlib", "PIL"}


def test_help_imports_the_standard_library_only():
    assert not imported(["--help"]) & (HEAVY | {"pydantic", "tyro", "yaml", "rich"})


@pytest.mark.parametrize("argv", [["train", "--stesp"], ["sample", "nothing", *PNG]])
def test_a_refusal_imports_nothing_heavy(argv: list[str]):
    assert not imported(argv) & HEAVY


def test_the_installed_command_answers_at_once():
    script = Path(sys.executable).with_name("aegpo")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([script, "--help"], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stderr) == (0, "")
    assert 'aegpo sample RUN --prompt "a red circle above a blue square" --out x.png' in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.25


def test_the_module_refuses_in_one_line_and_exits_with_2():
    done = subprocess.run([sys.executable, "-m", "aegpo.cli", "train", "--sed", "1"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "aegpo: command line: sed is not a setting; did you mean seed?\n"


def test_a_reader_that_leaves_early_is_no_error():
    end, start = os.pipe()
    os.close(end)
    with os.fdopen(start, "wb") as pipe:
        command = [sys.executable, "-m", "aegpo.cli", "train", "--help"]
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_more_processes_than_rollouts_are_refused_before_any_begins(capsys):
    assert main(["train", "--processes", "99"]) == 2
    assert capsys.readouterr().err == (
        "aegpo: --processes: 99 cannot share the 96 rollouts of a step; start fewer, or raise rollouts_per_step\n"
    )


@pytest.mark.parametrize("cluster", ["127.0.0.1:9", "ray://127.0.0.1:9"])
def test_a_cluster_that_is_not_there_is_said_at_once(tmp_path, capsys, cluster):
    assert main(["train", "--cluster", cluster, "--output-dir", str(tmp_path / "new")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"aegpo: --cluster: there is no Ray at {cluster}: ")
