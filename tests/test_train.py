"""The loop end to end on the embedded world: what must be exactly the same, and what must survive."""

import ast
import contextlib
import hashlib
import json
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from aegpo import build, checkpoint, evaluation, logbook, models, train, use, world
from aegpo.adapt.courses import lay_out
from aegpo.adapt.memory import Memory
from aegpo.cli import main
from aegpo.config import Config, dump_yaml, load_yaml, ratio_tolerance, resolve
from aegpo.dry_run import arithmetic
from aegpo.objective import objective
from aegpo.rewards import Reward
from aegpo.rewards.panel import alone
from aegpo.rollout import draw, shared_trunk
from aegpo.train import deal, learning_rate, update
from aegpo.types import Judgement, Plan, Prompt, Rollouts, Signals, Transitions, Verdict
from tests.small import SMALL

FEW = "few"  # three training prompts, so that a run of three steps visits them again


@pytest.fixture(autouse=True)
def few_held_out_prompts(tmp_path):
    rows = world.held_out()[::24]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def config(tmp_path, name="run", **changes):
    layer = {"prompts": {"eval": str(tmp_path / "few.jsonl")}, "output_dir": str(tmp_path / name)}
    if changes.get("prompts") == {"train": FEW}:
        (tmp_path / "train.txt").write_text("a red circle\ntwo squares\na ring below a cross\n")
        changes = changes | {"prompts": {"train": str(tmp_path / "train.txt")}}
    return resolve(SMALL, layer, changes)


def brightness(tmp_path):
    """A reward that no two pictures share."""
    (tmp_path / "bright.py").write_text("def score(images, prompts):\n    return images.mean((1, 2, 3)) / 255\n")
    return f"{tmp_path / 'bright.py'}:score"


def metrics(run, without=("seconds",)):
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in without} for line in lines]


@pytest.mark.parametrize(
    "changes",
    [
        {
            "algorithm": "aegpo",
            "allocation": {"low": 3, "high": 7},
            "exploration": {"k": 2, "until": 3},
            "sampler": {"steps": 10},
        },
        {
            "algorithm": "aegpo-paper",
            "allocation": {"low": 3, "high": 7},
            "exploration": {"rule": "delta_entropy_peaks", "k": 2},
            "sampler": {"guidance": 2.0},
        },
        {"algorithm": "flow-grpo"},
        {"model": {"train": "full"}, "optimizer": {"ema": 0.5, "ema_every": 1}},
        {"sampler": {"kind": "ode"}, "loss": {"kl": 0.3}, "exploration": {"rule": "entropy_peaks", "k": 2}},
        {
            "sampler": {"kind": "cps", "shared_noise": True},
            "allocation": {"rule": "reward_variance", "smoothing": 0.5},
            "exploration": {"rule": "reward_spread"},
            "prompts": {"train": FEW},
        },
        {
            "sampler": {"shared_noise": True},
            "allocation": {"rule": "proportional", "smoothing": 0.9},
            "probe": {"noises": 2},
            "prompts": {"train": FEW},
        },
    ],
    ids=["aegpo", "guided-paper", "flow-grpo", "full-ema", "matching", "rewards-decide", "smoothed"],
)
def test_a_run_that_was_resumed_is_the_same_to_the_bit(tmp_path, changes):
    """From the first checkpoint of a copy that was stopped in its third step."""
    build.fit(config(tmp_path, "one", **changes, checkpoints_total_limit=9))
    one, cut = tmp_path / "one", tmp_path / "cut"
    shutil.copytree(one, cut, ignore=shutil.ignore_patterns("checkpoint-[23]"))
    lines = (one / "metrics.jsonl").read_text().splitlines(keepends=True)
    (cut / "metrics.jsonl").write_text("".join(lines[:3]))
    build.fit(config(tmp_path, "cut", **changes), resume=str(cut / "checkpoint-1"))
    assert metrics(one) == metrics(cut)
    for file in sorted(p.name for p in (one / "checkpoint-3").glob("*.safetensors")):
        assert (one / "checkpoint-3" / file).read_bytes() == (cut / "checkpoint-3" / file).read_bytes(), file


@pytest.mark.parametrize(
    "changes", [{}, {"sampler": {"kind": "ode"}, "model": {"train": "full"}}], ids=["sampled", "matching-full"]
)
def test_two_runs_are_the_same_to_the_bit(tmp_path, changes):
    for name in ("one", "two"):
        build.fit(config(tmp_path, name, **changes, steps=1, reward=brightness(tmp_path)))
    assert metrics(tmp_path / "one") == metrics(tmp_path / "two")
    one, two = (tmp_path / name / "checkpoint-1" for name in ("one", "two"))
    for file in sorted(p.name for p in one.glob("*.safetensors")):
        assert (one / file).read_bytes() == (two / file).read_bytes(), file


def test_another_seed_is_another_run(tmp_path):
    build.fit(config(tmp_path, "one", steps=1))
    build.fit(config(tmp_path, "two", steps=1, seed=1))
    assert metrics(tmp_path / "one")[-1]["reward/mean"] != metrics(tmp_path / "two")[-1]["reward/mean"]


def test_a_whole_run_by_the_command_line_and_what_it_leaves(tmp_path, capsys):
    recipe = tmp_path / "small.yaml"
    recipe.write_text(json.dumps(SMALL))
    run = tmp_path / "run"
    assert main(["train", str(recipe), "--prompts.eval", str(tmp_path / "few.jsonl"), "--output-dir", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "report:" in printed
    assert "before" in printed

    lines = metrics(run)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert [("eval/reward_mean" in line) for line in lines] == [True, False, True, True]
    assert all(sum(line["allocation"]) == 10 == line["rollouts"] for line in lines[1:])
    assert lines[1]["allocation"] == [5, 5]  # entropy has not moved before the first update
    assert all(sorted(line["allocation"]) == [3, 7] for line in lines[2:])
    assert all(sum(line["explored_steps"]) == 20 and line["explored_steps"][-1] == 0 for line in lines[1:])
    assert all(line["ratio/first_error"] < 1e-5 for line in lines[1:])
    assert resolve(load_yaml(run / "config.yaml")) == resolve(
        SMALL, {"prompts": {"eval": str(tmp_path / "few.jsonl")}, "output_dir": str(run)}
    )
    for name in ("env.json", "README.md", "report.html", "samples/step-000000.png", "samples/step-000003.png"):
        assert (run / name).stat().st_size > 0
    assert sorted(p.name for p in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]

    # forwards: by hand from the arithmetic of a step
    held, probe, base = 6 * 4, 2 * 4, 2 * 4
    step = probe + base + 10 * 4
    rows = sum(line["rows"] for line in lines[1:]) * 3
    on_trunk = 3 * held + 3 * step + rows - lines[3]["forwards"]  # 2 first rollouts a step share 1 to 3 steps with it
    assert lines[0]["forwards"] == held
    assert 3 * 2 * 1 <= on_trunk <= 3 * 2 * 3

    # the commands that read a run
    assert main(["eval", str(run)]) == 0
    value = float(capsys.readouterr().out.split()[1])
    assert value == pytest.approx(lines[3]["eval/reward_mean"], abs=1e-3)
    assert main(["report", str(run)]) == 0

    # diffusers loads the weights, and draws the very picture that `aegpo sample` draws
    out = tmp_path / "x.png"
    prompt = "a red circle above a blue square"
    assert main(["sample", str(run), "--prompt", prompt, "--out", str(out), "--seed", "5"]) == 0
    pipe = StableDiffusion3Pipeline.from_pretrained(world.path(), text_encoder_3=None, tokenizer_3=None).to(
        torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "max_sequence_length": 0, "output_type": "np"}
    plain = pipe(prompt, generator=torch.Generator().manual_seed(5), **options).images[0]
    pipe.load_lora_weights(run)
    assert pipe.get_active_adapters()
    tuned = pipe(prompt, generator=torch.Generator().manual_seed(5), **options).images[0]
    assert (np.rint(tuned * 255) == np.asarray(Image.open(out))).all()
    assert (plain != tuned).any()
    drawn, prompt = drawn_by_the_card(run, seed=5)
    assert main(["sample", str(run), "--prompt", prompt, "--out", str(out), "--seed", "5"]) == 0
    assert (drawn == np.asarray(Image.open(out))).all()

    # an existing run is never overwritten by chance
    capsys.readouterr()
    assert main(["train", str(recipe), "--output-dir", str(run)]) == 2
    assert "exists" in capsys.readouterr().err
    assert metrics(run) == lines


@pytest.mark.parametrize(
    "changes",
    [
        {"sampler": {"kind": "ode", "guidance": 2.0}, "loss": {"kl": 0.3}},
        {"sampler": {"kind": "cps"}, "algorithm": "flow-grpo"},
        {"sampler": {"kind": "cps", "shared_noise": True}, "algorithm": "flow-grpo"},
        {"sampler": {"kind": "cps", "shared_noise": True}, "exploration": {"rule": "window"}},
        {"allocation": {"rule": "proportional"}, "exploration": {"rule": "policy_noise"}},
        {"algorithm": "flow-grpo", "exploration": {"rule": "reward_spread", "k": 3}, "sampler": {"guidance": 2.0}},
        {"algorithm": "flow-grpo", "optimizer": {"updates": 1, "keep_graphs": True}, "loss": {"reference_guidance": 2}},
        {
            "algorithm": "flow-grpo",
            "sampler": {"shared_noise": True},
            "optimizer": {"updates": 1, "keep_graphs": True},
        },
        {
            "algorithm": "awm",
            "optimizer": {"updates": 1, "keep_graphs": True},
            "sampler": {"guidance": 2.0},
            "exploration": {"k": 2},
        },
        {"algorithm": "aegpo-fast", "allocation": {"low": 3, "high": 7}},
        {
            "algorithm": "aegpo",
            "allocation": {"low": 3, "high": 7},
            "exploration": {"k": 2},
            "sampler": {"shared_noise": True, "compress": 1.0},
            "optimizer": {"updates": 1, "keep_graphs": True},
        },
        {"algorithm": "awm", "advantage": {"best_of": 2}, "exploration": {"k": 2}},
    ],
    ids=[
        *("matching", "flow-grpo", "shared", "shared-aegpo", "proportional", "reward-spread"),
        *("kept", "kept-shared", "kept-matching", "fast", "kept-spread", "best-of"),
    ],
)
def test_a_run_costs_what_the_dry_run_says(tmp_path, changes):
    own = config(tmp_path, steps=1, reward=brightness(tmp_path), **changes)  # a reward that leaves no row out
    said = {what: number for what, _, number in arithmetic(own)}
    build.fit(own)
    before, after = (
        line["forwards"] for line in metrics(tmp_path / "run")
    )  # `before` is an evaluation, one more follows
    assert after - 2 * before == said["evaluations in all"] + said["base probes in all"]


def drawn_by_the_card(run, seed):
    """The picture that the model card's own lines draw, in the folder of the card, and the prompt they draw."""
    code = re.search(r"```python\n(.*?)```", (run / "README.md").read_text(), re.DOTALL)
    assert code
    torch.manual_seed(seed)
    names = {}
    with contextlib.chdir(run):
        exec(code[1], names)
    return np.asarray(names["image"]), ast.literal_eval(re.search("prompt=('.*?')", code[1])[1])


def test_the_card_of_a_fully_trained_run_draws_what_sample_draws(tmp_path):
    build.run(config(tmp_path, steps=1, model={"train": "full"}, sampler={"guidance": 3.0}, eval_steps=7))
    assert "num_inference_steps=7" in (tmp_path / "run" / "README.md").read_text()  # an evaluation's, not a rollout's 4
    drawn, prompt = drawn_by_the_card(tmp_path / "run", seed=5)
    assert prompt in metrics(tmp_path / "run")[1]["prompts"]
    use.sample(tmp_path / "run", prompt, tmp_path / "x.png", 5)
    assert (drawn == np.asarray(Image.open(tmp_path / "x.png"))).all()


def test_a_users_own_prompts_reward_and_pipeline(tmp_path):
    (tmp_path / "mine.txt").write_text("a red circle\ntwo squares\na ring\n")
    pipe = StableDiffusion3Pipeline.from_pretrained(world.path(), text_encoder_3=None, tokenizer_3=None)
    pipe.save_pretrained(tmp_path / "pipeline")
    own = config(
        tmp_path,
        steps=1,
        model={"path": str(tmp_path / "pipeline")},
        prompts={"train": str(tmp_path / "mine.txt"), "eval": str(tmp_path / "mine.txt")},
        reward=brightness(tmp_path),
    )
    build.fit(own)
    last = metrics(tmp_path / "run")[-1]
    assert 0.3 < last["eval/reward_mean"] < 1
    assert "eval/pass_rate" not in last
    assert set(last["prompts"]) < {"a red circle", "two squares", "a ring"}


def test_a_reward_that_draws_says_the_same_in_a_run_that_was_resumed(tmp_path):
    """From the generators of Python, numpy and torch; the steps before are not drawn again."""
    (tmp_path / "dice.py").write_text(
        "import random\nimport numpy as np\nimport torch\n"
        "def score(images, prompts):\n"
        "    return [random.random() + np.random.rand() + float(torch.rand(())) for _ in images]\n"
    )
    own = config(tmp_path, reward=f"{tmp_path}/dice.py:score", steps=2, eval_every=0, eval_images=1)
    build.run(own)
    before = metrics(tmp_path / "run")
    build.run(own, resume=str(tmp_path / "run" / "checkpoint-1"))
    assert metrics(tmp_path / "run") == before
    assert before[1]["reward/mean"] != before[2]["reward/mean"]


def damaged(folder, name):
    """Break one file of a checkpoint in one of three ways."""
    file, how = folder / name.removeprefix("no ").removeprefix("half "), name.partition(" ")[0]
    match how:
        case "no":
            file.unlink()
        case "half":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        case _:
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, capsys, monkeypatch):
    build.run(config(tmp_path, steps=2, eval_every=0, checkpoints_total_limit=9))
    run = tmp_path / "run"
    last, before = run / "checkpoint-2", metrics(run)
    shutil.copytree(last, tmp_path / "whole")
    for name, said in {
        "weights.safetensors": "is damaged: weights.safetensors is not what was written",
        "half optimizer.safetensors": "is damaged: optimizer.safetensors is not what was written",
        "no memory.safetensors": "is not complete (memory.safetensors is missing)",
        "no manifest.json": "is not complete (manifest.json is missing)",
        "half manifest.json": "is damaged: manifest.json: ",
    }.items():
        damaged(last, name)
        with pytest.raises(ValueError) as error:
            checkpoint.verify(last)
        assert str(error.value).startswith(f"checkpoint {last} {said}")
        assert str(error.value).endswith(f"; the one before is {run}/checkpoint-1")
        found, [wrong] = checkpoint.newest_whole(run)
        assert found == run / "checkpoint-1" and wrong.startswith(f"checkpoint-2 {said}")
        shutil.rmtree(last)
        shutil.copytree(tmp_path / "whole", last)
    damaged(last, "weights.safetensors")
    for name in (".checkpoint-2.partial", ".checkpoint-0.old"):  # what a kill leaves
        shutil.copytree(tmp_path / "whole", run / name)
    capsys.readouterr()
    assert main(["train", "--resume", "latest", "--output-dir", str(run)]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == f"{last} is damaged: weights.safetensors is not what was written; going on from checkpoint-1"
    assert second == f"going on from {run}/checkpoint-1"
    assert metrics(run) == before and checkpoint.newest_whole(run) == (last, [])
    assert not list(run.glob(".checkpoint-*"))

    monkeypatch.delattr(build, "load")  # what follows is said before the model is loaded
    damaged(last, "weights.safetensors")
    (run / "checkpoint-1").rename(run / "checkpoint-3")
    files = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=r"checkpoint-3 is damaged: it was written as checkpoint-1; .* is .*-0$"):
        build.run(config(tmp_path, eval_every=0), resume=str(run / "checkpoint-3"))
    assert files == {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    damaged(run / "checkpoint-0", "no weights.safetensors")
    with pytest.raises(ValueError, match=r"^--resume: .*/run holds no whole checkpoint to go on from: ") as error:
        build.run(config(tmp_path, eval_every=0), resume="latest")
    assert all(f"checkpoint-{step} is " in str(error.value) for step in (3, 2, 0))


def test_weights_cut_short_leave_the_old_ones(tmp_path):
    (tmp_path / "weights").write_text("old")

    def cut_short(folder):
        (folder / "weights").write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        logbook.put(tmp_path, cut_short)
    assert (tmp_path / "weights").read_text() == "old"
    logbook.put(tmp_path, lambda folder: (folder / "weights").write_text("new"))
    assert (tmp_path / "weights").read_text() == "new"
    assert not (tmp_path / ".weights").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": "clipscore9"}, "reward: 'clipscore9' is unknown"),
        ({"prompts": {"train": "missing.txt"}}, "prompts.train: missing.txt cannot be read"),
        ({"prompts_per_step": 700, "rollouts_per_step": 3500}, "a step takes 700 prompts"),
        ({"model": {"path": "no/such/pipeline"}}, "model.path: no/such/pipeline"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        build.fit(config(tmp_path, **changes))
    assert not (tmp_path / "run").exists()


def test_a_prompt_that_the_embedded_model_cannot_read(tmp_path):
    (tmp_path / "mine.txt").write_text("a red circle\na purple elephant\n")
    with pytest.raises(ValueError, match="does not know 'elephant' in 'a purple elephant'"):
        build.fit(config(tmp_path, prompts={"train": str(tmp_path / "mine.txt")}))


def test_a_prompt_that_the_worlds_judge_cannot_read(tmp_path):
    (tmp_path / "mine.txt").write_text("a ring\nshow red\n")
    with pytest.raises(ValueError, match="one to four of these shapes"):
        build.fit(config(tmp_path, prompts={"eval": str(tmp_path / "mine.txt")}))
    assert not (tmp_path / "run").exists()


def test_a_reward_is_tried_on_black_and_on_white_before_anything_is_written(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def score(images, prompts):\n    return [1 / int(255 - i.mean()) for i in images]\n"
    )
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        build.fit(config(tmp_path, reward=f"{tmp_path}/mine.py:score"))
    (tmp_path / "mine.py").write_text(
        "def score(images, prompts, metadata):\n    return [row['mine'] for row in metadata]\n"
    )
    (tmp_path / "mine.jsonl").write_text('{"prompt": "a ring", "mine": 1}\n{"prompt": "a cross", "mine": 2}\n')
    with pytest.raises(ValueError, match=r"KeyError: 'mine' \(tried on a prompt of prompts.eval: .*few.jsonl\)"):
        files = {"train": str(tmp_path / "mine.jsonl"), "eval": str(tmp_path / "few.jsonl")}
        build.fit(config(tmp_path, reward=f"{tmp_path}/mine.py:score", prompts=files))
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine.py").write_text("def score(images, prompts):\n    return images.mean((1, 2, 3)) / images.std()\n")
    build.fit(config(tmp_path, steps=0, reward=f"{tmp_path}/mine.py:score"))  # one alone would have no spread


def test_a_reward_that_fails_midway_loses_no_step(tmp_path, capsys):
    """Asked for the sixth time, after two trials, an evaluation and steps 1 and 2, it judges step 2's evaluation."""
    failing = "calls = []\ndef score(images, prompts):\n    calls.append(1)\n    1 / (6 - len(calls))\n"
    answer = "    return images.mean((1, 2, 3)) / 255\n"
    (tmp_path / "mine.py").write_text(failing + answer)
    (tmp_path / "small.yaml").write_text(json.dumps(SMALL | {"reward": f"{tmp_path}/mine.py:score"}))
    run = tmp_path / "run"
    words = ["train", str(tmp_path / "small.yaml"), "--prompts.eval", str(tmp_path / "few.jsonl"), "--output-dir"]
    assert main([*words, str(run)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"aegpo: reward {tmp_path}/mine.py:score failed at mine.py, line 4: ZeroDivision")
    assert error.endswith(f"; to go on from the newest checkpoint: aegpo train --resume latest --output-dir {run}\n")
    assert error.count("\n") == 1
    assert [line["step"] for line in metrics(run)] == [0, 1]
    (tmp_path / "mine.py").write_text("def score(images, prompts):\n" + answer)
    assert main(["train", "--resume", "latest", "--output-dir", str(run)]) == 0
    assert [line["step"] for line in metrics(run)] == [0, 1, 2, 3]


def test_a_run_that_could_learn_nothing_says_so(tmp_path, capsys):
    (tmp_path / "same.py").write_text("def score(images, prompts):\n    return [0.5] * len(images)\n")
    said = "nothing was learned: in no step did any prompt's rewards differ"
    build.run(config(tmp_path, steps=2, reward=f"{tmp_path}/same.py:score"))
    assert said in capsys.readouterr().out
    build.run(config(tmp_path, "other", steps=1, reward=brightness(tmp_path)))
    build.run(config(tmp_path, "none", steps=0))
    assert said not in capsys.readouterr().out


def test_eval_tries_the_reward_first(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def score(images, prompts):\n    return images.mean((1, 2, 3))\n")
    build.fit(config(tmp_path, steps=0, reward=f"{tmp_path}/mine.py:score"))
    (tmp_path / "mine.py").write_text("def score(images, prompts):\n    return images.missing\n")
    monkeypatch.delattr(build, "load")  # the model is not even loaded
    with pytest.raises(ValueError, match=r"mine.py, line 2: AttributeError: .*tried on a prompt of prompts.eval"):
        use.evaluate(tmp_path / "run")


def test_eval_draws_as_many_images_as_it_is_asked_for(tmp_path):
    (tmp_path / "mine.py").write_text("def score(images, prompts):\n    return [len(images)] * len(images)\n")
    build.fit(config(tmp_path, steps=0, reward=f"{tmp_path}/mine.py:score"))
    assert use.evaluate(tmp_path / "run")["eval/reward_mean"] == 6
    assert use.evaluate(tmp_path / "run", images=3)["eval/reward_mean"] == 18


def test_eval_judges_by_another_reward_if_it_is_asked_to(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def score(images, prompts):\n    return [0.125] * len(images)\n")
    build.fit(config(tmp_path, steps=0))
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), "--reward", f"{tmp_path}/mine.py:score"]) == 0
    assert re.search(r"^eval/reward_mean +0\.1250$", capsys.readouterr().out, re.MULTILINE)


def test_an_evaluation_judges_each_picture_by_its_own_prompt_and_each_task_by_its_own_pictures():
    held_out = [
        Prompt(0, "a ring", {"task": "one", "value": 0.25}),
        Prompt(1, "two squares", {"task": "two", "value": 0.75}),
    ]
    model, settings, seen = models.load(Config().model), Config(eval_images=2), []

    def reward(images, prompts, metadata):
        seen.append((images, prompts))
        score = np.array([row["value"] for row in metadata], np.float32)
        return Judgement(score, score > 0.5)

    assert evaluation.evaluate(settings, model, held_out, alone(Reward("own", reward))) == {
        "eval/reward_mean": 0.5,
        "eval/pass_rate": 0.5,
        "eval/reward/one": 0.25,
        "eval/pass_rate/one": 0.0,
        "eval/reward/two": 0.75,
        "eval/pass_rate/two": 1.0,
    }
    [(images, prompts)] = seen
    assert prompts == ["a ring", "a ring", "two squares", "two squares"]
    for part, prompt in ((images[:2], held_out[:1]), (images[2:], held_out[1:])):
        assert np.abs(part.astype(int) - draw(model, prompt, settings)).max() <= 1


def test_overwrite_replaces_a_run_and_nothing_else(tmp_path):
    target = tmp_path / "run"
    target.mkdir()
    (target / "thesis.doc").write_text("years of work")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"holds thesis.doc, which is not a run's; it is not overwritten"):
            build.fit(config(tmp_path), overwrite=True)
        (target / "config.yaml").write_text("steps: 1")
    assert (target / "thesis.doc").read_text() == "years of work"


# ---------------------------------------------------------------- plan and update


def test_a_step_is_described_by_hand():
    explored = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0]]).bool()
    plan = Plan(torch.tensor([2, 3, 2]), explored, torch.ones(3, 3, dtype=torch.float64))
    base = torch.full((3, 3), 2.0, dtype=torch.float64)
    signals = Signals(base + torch.tensor([[1.0], [-2.0], [-2.0]]), base)
    scores, advantage = torch.tensor([1.0, 1, 0, 3, 3, 2, 2]), torch.tensor([0.0, 0, -1, 0, 1, 0, 0])
    plain = resolve({"algorithm": "aegpo", "sampler": {"steps": 3}, "exploration": {"rule": "window", "k": 1}})
    courses = lay_out(plan, plain, [Prompt(i, "", {}) for i in range(3)], torch.tensor([1.0, 0.7, 0.4, 0]), 0)
    rollouts = Rollouts(np.zeros((7, 1, 1, 3), np.uint8), plan.group, courses, None)
    verdict = alone(Reward("own", lambda *asked: Judgement(scores.numpy()))).judge(
        np.zeros((7, 1, 1, 3), np.uint8), [Prompt(i, "", {}) for i in plan.group.tolist()]
    )
    assert logbook.describe(plan, rollouts, signals, verdict, advantage[:, None] * courses.explored) == {
        "reward/mean": pytest.approx(12 / 7),
        "reward/std": pytest.approx(np.std([1, 1, 0, 3, 3, 2, 2])),
        "dropped_groups": 0,
        "allocation": [2, 3, 2],
        "explored_steps": [5, 5, 0],
        "zero_advantage_groups": 2,
        "entropy": [1.0] * 3,
        "delta_entropy": [-1.0] * 3,
        "entropy/mean": 1.0,
        "delta_entropy/mean": pytest.approx(5 / 3),
    }


class Quiet:
    def begin(self, what, total): ...

    def advance(self, count): ...

    def step(self, metrics): ...


@pytest.fixture(scope="module")
def rows():
    model = models.load(Config().model)
    conditions = model.encode(["a ring", "a red cross"])
    count = 12
    generator = torch.Generator().manual_seed(0)

    def normal():
        return torch.randn(count, 4, 8, 8, generator=generator)

    return conditions, Transitions(
        x=normal(),
        x_next=normal(),
        step=torch.arange(count) % 9,
        until=torch.arange(count) % 9 + 1,
        prompt=torch.arange(count) % 2,
        rollout=torch.arange(count),
        velocity=normal(),
        weight=torch.ones(count),
        advantage=torch.linspace(-1, 1, count).where(torch.arange(count) % 3 != 0, 0.0),
        unit=torch.arange(count),
        graph=torch.full((count,), -1),
    )


def gradient(conditions, rows, **changes):
    """The gradient that an update leaves behind, before clipping could touch it."""
    how = {"updates": 1, "max_grad_norm": 1e9, "recompute": False}  # its rows are of no policy
    settings = resolve({"algorithm": "aegpo", "optimizer": how | changes})
    model = models.load(settings.model)
    optimizer = torch.optim.SGD(model.trainable.values(), lr=0.0)
    counted = update(settings, model, optimizer, rows, conditions, 0, Quiet())
    return counted, torch.cat([p.grad.flatten() for p in model.trainable.values() if p.grad is not None])


def test_the_gradient_does_not_depend_on_micro_batches(rows):
    counted, whole = gradient(*rows, micro_batch=100)
    assert whole.abs().max() > 0
    for micro_batch in (1, 5):
        other, parts = gradient(*rows, micro_batch=micro_batch)
        torch.testing.assert_close(parts, whole, atol=1e-7, rtol=1e-4)
        assert other["loss"] == pytest.approx(counted["loss"], rel=1e-4)


def test_rows_without_advantage_cost_no_forward_and_change_no_gradient(rows):
    conditions, full = rows
    counted, kept = gradient(conditions, full, micro_batch=100)
    assert counted["rows"] == 8
    settings = resolve({"algorithm": "aegpo"})
    model = models.load(settings.model)
    loss = objective(settings, model, full, conditions)
    (loss.rows.sum() / 12).backward()
    all_rows = torch.cat([p.grad.flatten() for p in model.trainable.values() if p.grad is not None])
    torch.testing.assert_close(kept, all_rows, atol=1e-7, rtol=1e-4)


def test_a_group_seen_together_keeps_those_of_no_advantage(rows):
    """DGPO divides by all of a group, so one of its rollouts with an advantage of exactly 0 still counts."""
    conditions, full = rows
    unit = torch.arange(12) // 3
    advantage = torch.tensor([1.0, -1, 0, 0.5, 0, -0.5, 0, 0, 0, 2, -1, -1])
    full = replace(full, unit=unit, advantage=advantage, until=torch.full((12,), 10))
    settings = resolve({"algorithm": "dgpo", "optimizer": {"updates": 1, "max_grad_norm": 1e9, "micro_batch": 4}})
    found = []
    for whole in (False, True):
        model = models.load(settings.model)
        with torch.no_grad():
            for i, parameter in enumerate(model.trainable.values()):
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        if whole:
            (objective(settings, model, full, conditions).rows.sum() / 12).backward()
        else:
            optimizer = torch.optim.SGD(model.trainable.values(), lr=0.0)
            assert update(settings, model, optimizer, full, conditions, 0, Quiet())["rows"] == 9
        found.append(torch.cat([p.grad.flatten() for p in model.trainable.values() if p.grad is not None]))
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-4)
    assert found[0].abs().max() > 1e-4


def test_a_step_in_which_no_group_differs_changes_nothing(rows):
    conditions, full = rows
    settings = resolve({"algorithm": "aegpo"})
    model = models.load(settings.model)
    before = [p.clone() for p in model.trainable.values()]
    optimizer = torch.optim.AdamW(model.trainable.values(), lr=1.0)
    counted = update(settings, model, optimizer, replace(full, advantage=torch.zeros(12)), conditions, 0, Quiet())
    assert counted["rows"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.trainable.values(), strict=True))
    assert json.dumps(counted)


def test_the_average_is_flow_grpos(tmp_path):
    """Every second optimizer step n, with decay min((1 + n) / (10 + n), .9), by hand from the weights of each step."""
    averaging = {"updates": 1, "ema": 0.9, "ema_every": 2}
    build.fit(config(tmp_path, steps=4, eval_every=0, optimizer=averaging))
    build.fit(config(tmp_path, "two", steps=2, eval_every=0, optimizer=averaging))
    begin = {name: p.detach().clone() for name, p in models.load(config(tmp_path).model).trainable.items()}
    second, fourth = (
        load_file(tmp_path / run / f"checkpoint-{step}" / "weights.safetensors")
        for run, step in (("two", 2), ("run", 4))
    )
    third, last = (load_file(tmp_path / "run" / f"checkpoint-{n}" / "average.safetensors") for n in (3, 4))
    for name in fourth:
        by_hand = begin[name].lerp(second[name], 1 - 3 / 12)
        torch.testing.assert_close(third[name], by_hand)
        torch.testing.assert_close(last[name], by_hand.lerp(fourth[name], 1 - 5 / 14))


def test_the_average_is_what_is_judged_and_what_is_saved(tmp_path):
    averaging = {"lr": 1e-2, "updates": 1, "ema": 0.9, "ema_every": 1}
    build.fit(config(tmp_path, steps=2, eval_every=0, reward=brightness(tmp_path), optimizer=averaging))
    run = tmp_path / "run"
    assert use.evaluate(run)["eval/reward_mean"] == metrics(run)[-1]["eval/reward_mean"]
    saved = load_file(run / "pytorch_lora_weights.safetensors")
    for name, tensor in load_file(run / "checkpoint-2" / "average.safetensors").items():
        assert torch.equal(saved[f"transformer.{name.replace('.default.', '.')}"], tensor)


def test_an_average_not_yet_taken_is_the_weights_themselves(tmp_path):
    build.fit(config(tmp_path, steps=2, eval_every=0, optimizer={"lr": 1e-2, "ema": 0.9, "ema_every": 50}))
    first, last = metrics(tmp_path / "run")[0], metrics(tmp_path / "run")[-1]
    assert use.evaluate(tmp_path / "run") == {k: v for k, v in last.items() if k.startswith("eval/")}
    assert last["eval/reward_mean"] != first["eval/reward_mean"]


def test_a_step_is_adamws_with_the_settings_own_numbers(tmp_path):
    """The weights of step 2 by hand, from those of step 1 and the moments: rate, its fall, betas, eps and decay."""
    adamw = {"lr": 0.01, "decay": "linear", "betas": [0.5, 0.75], "eps": 1e-3, "weight_decay": 0.1, "updates": 1}
    build.fit(config(tmp_path, steps=2, eval_every=0, reward=brightness(tmp_path), optimizer=adamw))
    (w1, m1), (w2, m2) = (
        [load_file(tmp_path / "run" / f"checkpoint-{n}" / f"{part}.safetensors") for part in ("weights", "optimizer")]
        for n in (1, 2)
    )
    assert [line["lr"] for line in metrics(tmp_path / "run")[1:]] == pytest.approx([0.01, 0.005])
    for name in w1:
        first, second = m1[f"{name}/exp_avg"], m1[f"{name}/exp_avg_sq"]
        torch.testing.assert_close(second, 0.25 * (first / 0.5).square())  # of one gradient g: .5 g, and .25 g^2
        mean, square = m2[f"{name}/exp_avg"] / (1 - 0.5**2), m2[f"{name}/exp_avg_sq"] / (1 - 0.75**2)
        by_hand = w1[name] * (1 - 0.005 * 0.1) - 0.005 * mean / (square.sqrt() + 1e-3)
        torch.testing.assert_close(w2[name], by_hand, atol=1e-7, rtol=1e-5)
    assert any((w1[name] != w2[name]).any() for name in w1)


@pytest.mark.parametrize(
    ("how", "loss"),
    [
        ({"std": "none"}, 0.06),  # .8 is cut to .5, four times -.2
        ({"std": "group", "eps": 0}, 0.3),  # 2 is cut to .5, four times -.5
        ({"std": "global", "eps": 0.4}, 0.1),  # 1 is cut to .5, four times -.25
        ({"std": "none", "clip": 9}, 0.0),
    ],
    ids=str,
)
def test_advantages_are_the_settings_own(tmp_path, how, loss):
    """One of five rollouts gets the reward 1, the others 0; on policy, the loss is minus the mean advantage."""
    (tmp_path / "one.py").write_text(
        "def score(images, prompts):\n    return [i % 5 == 0 for i in range(len(images))]\n"
    )
    sizes = {"steps": 1, "allocation": {"rule": "uniform"}, "optimizer": {"updates": 1, "micro_batch": 8}}
    build.fit(config(tmp_path, **sizes, reward=f"{tmp_path}/one.py:score", advantage={"clip": 0.5} | how))
    assert metrics(tmp_path / "run")[-1]["loss"] == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("best_of", [0, 3])
def test_every_row_has_the_advantage_of_its_own_rollout(tmp_path, monkeypatch, best_of):
    """Scores by place, groups of unequal size; what `update` is given is each row's own, by the settings' formula."""
    scores = np.random.default_rng(5).normal(size=10).astype(np.float32)
    given = []

    def watched(config, model, optimizer, rows, *others):
        given.append(rows)
        return update(config, model, optimizer, rows, *others)

    monkeypatch.setattr(train, "update", watched)
    how = {"std": "group", "ddof": 1, "eps": 0.01, "best_of": best_of}
    own = config(tmp_path, steps=1, algorithm="flow-grpo", advantage=how, eval_every=0)
    model = models.load(own.model)
    prompts = [Prompt(i, text, {}) for i, text in enumerate(("a red circle", "two squares"))]
    (tmp_path / "run").mkdir()

    def score(images, prompts, metadata):
        return Judgement(scores[: len(images)])

    train.train(own, model, prompts, prompts, alone(Reward("own", score)), tmp_path / "run", Quiet())
    expected, kept = {}, set()
    for group in (range(5), range(5, 10)):
        mine = scores[list(group)].astype(float)
        expected |= dict(zip(group, (mine - mine.mean()) / (mine.std(ddof=1) + 0.01), strict=True))
        ranked = sorted(group, key=lambda i: -scores[i])
        kept |= {*ranked[:2], ranked[-1]} if best_of else set(group)
    rows = given[0]
    assert sorted(rows.rollout.tolist()) == sorted(i for i in kept for _ in range(3))
    for i, advantage in zip(rows.rollout.tolist(), rows.advantage.tolist(), strict=True):
        assert advantage == pytest.approx(expected[i], rel=1e-5)


def test_the_learning_rate_falls_step_by_step_and_would_be_zero_after_the_last():
    falling = resolve({"steps": 4, "optimizer": {"lr": 0.1, "decay": "linear"}})
    assert [learning_rate(falling, step) for step in range(4)] == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert learning_rate(resolve({"algorithm": "aegpo", "optimizer": {"lr": 0.1}}), 3) == 0.1


def test_a_long_gradient_is_shortened_and_its_length_reported(rows):
    """With a learning rate of 1 and plain SGD, the weights move by just that."""
    free, _ = gradient(*rows, micro_batch=100)
    how = {"updates": 1, "max_grad_norm": free["grad_norm"] / 4, "micro_batch": 100, "recompute": False}
    settings = resolve({"algorithm": "aegpo", "optimizer": how})
    model = models.load(settings.model)
    before = [p.clone() for p in model.trainable.values()]
    optimizer = torch.optim.SGD(model.trainable.values(), lr=1.0)
    counted = update(settings, model, optimizer, rows[1], rows[0], 0, Quiet())
    moved = torch.cat([(p - q).flatten() for p, q in zip(before, model.trainable.values(), strict=True)])
    norm = free["grad_norm"]
    assert counted["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert moved.norm().item() == pytest.approx(norm / 4 * norm / (norm + 1e-6), rel=1e-3)  # torch's guard against 0


def test_a_resume_leaves_nothing_of_the_course_it_abandons(tmp_path, capsys):
    build.run(config(tmp_path))
    run = tmp_path / "run"
    build.run(config(tmp_path, steps=2), resume=str(run / "checkpoint-2"))
    assert f"going on from {run / 'checkpoint-2'}, the last of its steps: nothing is left to train\n" in (
        capsys.readouterr().out
    )
    assert [p.name for p in checkpoint.checkpoints(run)] == ["checkpoint-2"]
    assert [line["step"] for line in metrics(run)] == [0, 1, 2]
    assert sorted(p.name for p in (run / "samples").glob("*.png")) == ["step-000000.png", "step-000002.png"]


@pytest.mark.parametrize(
    ("changes", "kept"), [({}, True), ({"model": {"text_tokens": 3}}, False)], ids=["same", "other text tokens"]
)
def test_a_resume_keeps_the_bases_entropies_only_if_they_are_still_the_bases(tmp_path, changes, kept):
    """Those in the checkpoint are made wrong: a run that believes them writes them into its own."""
    build.fit(config(tmp_path))
    folder = tmp_path / "run" / "checkpoint-2"
    saved, manifest = folder / "memory.safetensors", folder / "manifest.json"
    wrong = load_file(saved)
    wrong["base_entropy/curves"] += 7
    save_file(wrong, saved)
    digests = json.loads(manifest.read_text()) | {saved.name: hashlib.sha256(saved.read_bytes()).hexdigest()}
    manifest.write_text(json.dumps(digests))
    build.fit(config(tmp_path, **changes), resume=str(folder))
    written = load_file(tmp_path / "run" / "checkpoint-3" / "memory.safetensors")["base_entropy/curves"]
    assert any((written == curve).all(1).any() for curve in wrong["base_entropy/curves"]) == kept


def test_resuming_with_other_weights_or_into_another_run_is_refused_and_changes_nothing(tmp_path):
    build.fit(config(tmp_path, steps=1))
    run = tmp_path / "run"
    before = (run / "config.yaml").read_text()
    with pytest.raises(ValueError, match="holds other weights than this config trains"):
        build.fit(config(tmp_path, model={"lora": {"rank": 8}}), resume="latest")
    with pytest.raises(ValueError, match="belongs to another run"):
        build.fit(config(tmp_path, "other"), resume=str(run / "checkpoint-1"))
    assert (run / "config.yaml").read_text() == before
    assert not (tmp_path / "other").exists()


def test_a_resume_never_makes_the_record_untrue(tmp_path):
    build.fit(config(tmp_path, steps=2))
    run = tmp_path / "run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for changes, said in (
        ({"seed": 3}, "seed: the run in .* has seed 0, not 3; start another --output-dir"),
        ({"algorithm": "flow-grpo"}, "algorithm: the run in .* has algorithm aegpo, not flow-grpo; start another"),
        ({"eval_steps": 5}, "eval_steps: the run in .* has eval_steps 4, not 5; start another"),
        ({"sampler": {"steps": 5}}, "sampler.steps: the run in .* has sampler.steps 4, not 5; start another"),
        ({"steps": 1}, "steps: .*checkpoint-2 is past step 1; ask for at least 2"),
    ):
        with pytest.raises(ValueError, match=said):
            build.fit(config(tmp_path, **{"steps": 2} | changes), resume="latest")
    (run / "2").mkdir()
    for name in ("samples", "2"):
        with pytest.raises(ValueError, match=rf"--resume: .*{name} is not a checkpoint folder"):
            build.fit(config(tmp_path), resume=str(run / name))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    (run / "metrics.jsonl").write_text('{"step": 0}\ngarbage\n')
    with pytest.raises(ValueError, match=r"run/metrics.jsonl, line 2: not JSON"):
        build.fit(config(tmp_path), resume="latest")
    assert (run / "config.yaml").read_bytes() == before[run / "config.yaml"]


def test_an_update_that_is_not_finite_is_not_taken_and_its_rows_are_told(rows):
    conditions, full = rows
    settings = resolve({"algorithm": "aegpo", "optimizer": {"updates": 2, "micro_batch": 4, "recompute": False}})
    model = models.load(settings.model)
    before = [p.clone() for p in model.trainable.values()]
    optimizer = torch.optim.SGD(model.trainable.values(), lr=1.0)
    one_bad = replace(full, x=full.x.clone().index_fill_(0, torch.tensor([4]), torch.inf))
    told = []
    spoilt = lambda number, rows: told.append((number, rows))  # noqa: E731
    counted = update(settings, model, optimizer, one_bad, conditions, 0, Quiet(), spoilt=spoilt)
    [(_, kept)] = told
    assert 4 in kept.rollout.tolist()
    assert (kept.x == one_bad.x[kept.rollout]).all()
    assert counted["dropped_updates"] == 1
    assert counted["loss"] is None  # a mean over rows of which one is not finite
    after = [p.clone() for p in model.trainable.values()]
    assert any((a != b).any() for a, b in zip(before, after, strict=True))  # the other update was taken

    good = full[torch.tensor([i for i in range(12) if i not in kept.rollout.tolist()])]
    alone = models.load(settings.model)
    zeroed = replace(full, advantage=full.advantage.index_fill(0, kept.rollout, 0.0))
    assert len(good) == 12 - len(kept)
    own = resolve({"algorithm": "aegpo", "optimizer": {"updates": 1, "micro_batch": 4, "recompute": False}})
    optimizer = torch.optim.SGD(alone.trainable.values(), lr=2.0)  # each of two updates counts for half of the rows
    update(own, alone, optimizer, zeroed, conditions, 0, Quiet())
    for a, b in zip(after, alone.trainable.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_run_whose_gradients_are_not_finite_stops_at_its_last_good_checkpoint(tmp_path, capsys):
    """At such a rate the first update throws the weights so far that nothing is finite from there on."""
    how = {"algorithm": "flow-grpo", "exploration": {"rule": "all"}, "allocation": {"rule": "uniform"}}
    (tmp_path / "turns.py").write_text("def score(images, prompts):\n    return [i % 2 for i in range(len(images))]\n")
    how |= {"reward": f"{tmp_path / 'turns.py'}:score"}  # black pictures differ too
    own = config(tmp_path, steps=9, eval_every=0, optimizer={"lr": 1e25}, **how)
    (tmp_path / "own.yaml").write_text(dump_yaml(own))
    assert main(["train", str(tmp_path / "own.yaml")]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "not finite in 3 steps in a row" in said
    assert "--resume latest" in said
    lines = metrics(tmp_path / "run")
    assert [line["dropped_updates"] for line in lines[1:]] == [1, 2, 2]  # the first update of all is taken
    assert [line["grad_norm"] > 0 for line in lines[1:]] == [True, False, False]
    assert [folder.name for folder in checkpoint.checkpoints(tmp_path / "run")] == ["checkpoint-0"]
    saved = sorted((tmp_path / "run" / logbook.ASIDE).iterdir())
    assert [file.name[5:20] for file in saved] == [f"00000{at}-update-{n}" for at, n in ("11", "20", "21", "30", "31")]
    held = load_file(saved[0])
    assert {"x", "x_next", "velocity", "step", "advantage"} <= held.keys()
    assert len(held["step"]) > 0


def test_rows_are_dealt_once_each_and_out_of_their_order(rows, monkeypatch):
    conditions, full = rows
    dealt = []

    def spy(config, model, some, *others, **more):
        dealt[-1] += some.advantage.tolist()  # a name for a row
        return objective(config, model, some, *others, **more)

    monkeypatch.setattr(train, "objective", spy)
    settings = resolve({"algorithm": "aegpo", "optimizer": {"updates": 2, "recompute": False}})
    model = models.load(Config().model)
    for step in (0, 0, 1):
        dealt.append([])
        update(settings, model, torch.optim.SGD(model.trainable.values(), lr=0.0), full, conditions, step, Quiet())
    names = [a for a in full.advantage.tolist() if a]
    assert all(sorted(order) == names for order in dealt)
    assert dealt[0] == dealt[1] != dealt[2]
    assert names not in dealt


def test_two_updates_share_the_rows_between_them(rows):
    """With no learning rate the two halves' gradients, each a mean over half the rows, average to the whole one."""
    conditions, full = rows
    seen = []

    class Recorder(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(
                torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"] if p.grad is not None])
            )

    for updates in (1, 2):
        settings = resolve({"algorithm": "aegpo", "optimizer": {"updates": updates, "max_grad_norm": 1e9}})
        model = models.load(settings.model)
        update(settings, model, Recorder(model.trainable.values(), lr=0.0), full, conditions, 0, Quiet())
    whole, one, other = seen
    torch.testing.assert_close((one + other) / 2, whole, atol=1e-7, rtol=1e-4)


# ---------------------------------------------------------------- what the loop asks of the rooms


def test_the_loop_measures_when_it_is_due_and_remembers_what_it_saw(tmp_path, monkeypatch):
    """Twelve steps over three prompts, two a step: an epoch is one step. Every call and what it was given."""
    spreads, walks, seen = [], [], []

    def spread(model, prompts, conditions, reward, config, step, visit, trunk, team):
        spreads.append((step, visit, trunk is None))
        return torch.arange(4.0, dtype=torch.float64).flip(0)

    def walk(model, prompts, conditions, plan, config, step, visit, team):
        walks.append((step, visit))
        return shared_trunk(model, prompts, conditions, plan, config, step, visit, team)

    class Watched(Memory):
        def visit(self, prompts, values, smoothing):
            seen.append((prompts, values.tolist(), smoothing))
            return super().visit(prompts, values, smoothing)

    monkeypatch.setattr(train, "reward_spread", spread)
    monkeypatch.setattr(train, "shared_trunk", walk)
    monkeypatch.setattr(train, "Memory", Watched)
    own = config(
        tmp_path,
        steps=12,
        prompts={"train": FEW},
        reward=brightness(tmp_path),
        sampler={"kind": "cps", "shared_noise": True},
        allocation={"rule": "reward_variance", "smoothing": 0.25},
        exploration={"rule": "reward_spread", "k": 2},
        eval_every=0,
        save_every=12,
    )
    build.fit(own)
    assert spreads == [(0, 0, True), (10, 10, True)]
    assert walks == [(step, step) for step in range(12)]
    lines = metrics(tmp_path / "run")[1:]
    assert all(line["explored_steps"][2:] == [0, 0] for line in lines)
    assert [smoothing for *_, smoothing in seen] == [0.25] * 12
    assert all(len(prompts) == len(values) == 2 and min(values) > 0 for prompts, values, _ in seen)


def test_a_prompts_spread_of_reward_is_that_of_its_own_group_whatever_its_size(tmp_path, monkeypatch):
    """Pictures of group i score i times their place: spreads are the unbiased deviations, by hand."""
    seen = []

    class Watched(Memory):
        def visit(self, prompts, values, smoothing):
            seen.append(values.tolist())
            return super().visit(prompts, values, smoothing)

    def score(images, prompts, metadata):
        group = np.cumsum([0] + [a != b for a, b in pairwise(prompts)])
        place = np.concatenate([np.arange(n) for n in np.bincount(group)])
        return Judgement((place * (1 + group)).astype(np.float32))

    monkeypatch.setattr(train, "Memory", Watched)
    own = config(tmp_path, steps=1, allocation={"rule": "reward_variance"}, exploration={"rule": "window", "k": 1})
    model = models.load(own.model)
    prompts = [Prompt(i, text, {}) for i, text in enumerate(("a red circle", "two squares"))]
    (tmp_path / "run").mkdir()
    train.train(own, model, prompts, prompts, alone(Reward("own", score)), tmp_path / "run", Quiet())
    deviation = float(np.std(np.arange(own.rollouts_per_step // 2), ddof=1))
    assert seen == [pytest.approx([deviation, 2 * deviation])]


def test_a_run_that_did_not_measure_the_spread_can_go_on_by_it(tmp_path):
    build.fit(config(tmp_path, steps=2))
    changed = config(tmp_path, steps=3, exploration={"rule": "reward_spread", "k": 2})
    build.fit(changed, resume="latest")
    assert metrics(tmp_path / "run")[-1]["step"] == 3


def test_what_the_probe_cannot_read_is_said_before_a_run_is_overwritten(tmp_path):
    build.fit(config(tmp_path, steps=1))

    def files():
        return {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}

    before = files()
    with pytest.raises(ValueError, match="is named 'down_blocks"):
        build.fit(config(tmp_path, steps=1, probe={"layers": ["down_blocks.*"]}), overwrite=True)
    assert files() == before
    assert metrics(tmp_path / "run")[0]["forwards"] == 6 * 4  # having tried it is not counted


@pytest.mark.parametrize("loss", ["clip", "guard", "dppo"])
def test_ratios_that_rounding_put_off_are_taken_anew_in_the_batches_of_training(rows, loss):
    """Velocities that are off by what half precision may round stand for those of other batches."""
    conditions, full = rows
    errors = 3e-2 * torch.randn(full.velocity.shape, generator=torch.Generator().manual_seed(1))

    def updated(off, recompute, first=0):
        """Two updates of four rows; those from place `first` on in the first update's order are off."""
        how = {"updates": 2, "micro_batch": 2, "recompute": recompute}
        changes = {"loss": {"kind": loss, "kl": 0.0}, "optimizer": how, "sampler": {"guidance": 2.0}}
        settings = resolve({"algorithm": "flow-grpo"}, changes)
        model = models.load(settings.model)
        with torch.no_grad():
            for i, parameter in enumerate(model.trainable.values()):
                parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            sigma = model.sigmas(10)[full.step].to(full.x)
            exact = model.predict(full.x, sigma, conditions, full.prompt, 2.0)
        spoiled = torch.zeros(12, dtype=torch.bool)
        taught = (full.advantage != 0).nonzero().flatten()
        dealt = deal(torch.arange(8), 2, 2, [train.SHUFFLE, 0, 0])
        spoiled[taught[torch.cat([*dealt[0][first:], *dealt[1]])]] = True
        drawn = replace(full, x_next=full.x - 0.1 * exact, velocity=exact + off * spoiled.reshape(-1, 1, 1, 1))
        model.forwards = 0
        optimizer = torch.optim.SGD(model.trainable.values(), lr=1.0)
        learned = update(settings, model, optimizer, drawn, conditions, 0, Quiet())
        return torch.cat([p.detach().flatten() for p in model.trainable.values()]), learned, model.forwards // 2

    exact, learned, evaluated = updated(torch.zeros_like(errors), None)
    assert learned["recomputed"] == 0 and evaluated == 8 * 3  # eight rows with an advantage
    assert learned["ratio/first_error"] < 1e-6
    assert abs(learned["ratio/mean"] - 1) > 1e-6  # of the second update, which ratios to the rollouts' policy shape
    assert updated(1e-4 * errors, None)[1]["recomputed"] == 0
    for first in (0, 1):  # in the first batch or in a later one
        mended, learned, evaluated = updated(errors, None, first)
        assert learned["recomputed"] == 4 and evaluated == 8 * 3 + 2 + 4  # one batch twice, and the second update's
        assert learned["ratio/first_error"] > 1e-5
        torch.testing.assert_close(mended, exact, atol=1e-6, rtol=1e-4)
    left, learned, _ = updated(errors, False)
    assert learned["recomputed"] == 0
    assert (left - exact).abs().max() > 1e-5
    asked, learned, evaluated = updated(errors, True)
    assert learned["recomputed"] == 4 and evaluated == 8 * 3 + 4
    torch.testing.assert_close(asked, exact, atol=1e-6, rtol=1e-4)


def test_ratios_to_another_policy_are_left_as_they_are():
    """Under `optimizer.behaviour` the policy that drew is not the one that is trained, so they do not begin at 1."""
    other = {"optimizer": {"behaviour": 0.5}}
    assert ratio_tolerance(resolve({"algorithm": "awm"}, other)) == float("inf")
    assert ratio_tolerance(resolve({"algorithm": "awm"})) == pytest.approx(0.01)
    assert ratio_tolerance(resolve({"algorithm": "flow-grpo", "loss": {"clip_low": 2e-5}})) == pytest.approx(2e-6)
    assert ratio_tolerance(resolve({"algorithm": "ram"})) == float("inf")
    with pytest.raises(
        ValueError, match=r"optimizer\.recompute: under optimizer\.behaviour rollouts are drawn by another"
    ):
        resolve({"algorithm": "awm"}, other, {"optimizer": {"recompute": True}})


# ---------------------------------------------------------------- rewards


def test_each_reward_is_logged_and_a_group_that_is_dropped_teaches_nothing(tmp_path):
    (tmp_path / "own.py").write_text(
        "import numpy as np\n"
        "def bright(images, prompts): return images.mean((1, 2, 3)) / 255\n"
        "def odd(images, prompts):\n"
        "    return np.where(np.array(prompts) == 'two squares', np.nan, images[..., 0].mean((1, 2)))\n"
        "def seen(images, prompts): return np.full(len(images), 7)\n"
    )
    (tmp_path / "train.txt").write_text("a red circle\ntwo squares\n")
    bright, odd, seen = (f"{tmp_path}/own.py:{name}" for name in ("bright", "odd", "seen"))
    own = config(
        tmp_path,
        steps=2,
        algorithm="flow-grpo",
        reward={bright: 1, odd: 0.01, seen: 0},
        reward_checks={"not_finite": "drop"},
        advantage={"combine": "gdpo"},
        prompts={"train": str(tmp_path / "train.txt"), "eval": str(tmp_path / "few.jsonl")},
    )
    build.run(own)
    before, *steps = metrics(tmp_path / "run")
    assert before["eval/reward_mean"] == pytest.approx(
        before[f"eval/reward_mean/{bright}"] + 0.01 * before[f"eval/reward_mean/{odd}"]
    )
    assert before[f"eval/reward_mean/{seen}"] == 7
    for step in steps:
        assert step["dropped_groups"] == 1 and step["zero_advantage_groups"] == 1
        assert step["allocation"] == [5, 5] and step["rows"] == 5 * 3  # of one group alone
        assert f"reward/{seen}/mean" not in step and step[f"reward/{bright}/std"] > 0
        [trouble] = step["reward_troubles"]
        assert trouble["kind"] == "not_finite" and trouble["reward"] == odd and trouble["images"] == 5
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<td>not finite</td><td>2</td><td>10</td>" in page and "numbers must be finite (1)" in page
    with pytest.raises(ValueError, match=r"said nan of an image for 'two squares'.* drop would go on; to go on from"):
        build.fit(config(tmp_path, "stopped", **{"reward": odd, "prompts": own_prompts(own)}))


def own_prompts(own):
    return {"train": own.prompts.train, "eval": own.prompts.eval}


def test_where_all_groups_are_dropped_nothing_moves(tmp_path):
    (tmp_path / "own.py").write_text(
        "import numpy as np\n"
        "def odd(images, prompts): return np.where(np.array(prompts) == 'a ring', images.mean((1, 2, 3)), np.nan)\n"
    )
    (tmp_path / "train.txt").write_text("a red circle\ntwo squares\n")
    (tmp_path / "eval.txt").write_text("a ring\n")
    own = config(
        tmp_path,
        steps=1,
        algorithm="flow-grpo",
        reward=f"{tmp_path}/own.py:odd",
        reward_checks={"not_finite": "drop"},
        prompts={"train": str(tmp_path / "train.txt"), "eval": str(tmp_path / "eval.txt")},
    )
    build.fit(own)
    step = metrics(tmp_path / "run")[1]
    assert step["reward/mean"] is None and step["dropped_groups"] == 2 and step["rows"] == 0 and step["grad_norm"] == 0
    first, last = (load_file(tmp_path / "run" / f"checkpoint-{n}" / "weights.safetensors") for n in (0, 1))
    assert all(torch.equal(first[name], last[name]) for name in first)


def test_ocr_judges_the_evaluations_of_a_run_and_nothing_else(tmp_path):
    rows = [{"prompt": "a red circle", "text": "STOP"}, {"prompt": "two squares", "text": "O"}]
    (tmp_path / "signs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = {"train": "world", "eval": str(tmp_path / "signs.jsonl")}
    own = config(tmp_path, steps=1, algorithm="flow-grpo", reward={"world": 1, "ocr": 0}, prompts=prompts)
    build.fit(own)
    before, step = metrics(tmp_path / "run")
    for line in (before, step):
        assert 0 <= line["eval/reward_mean/ocr"] <= 0.5 and line["eval/pass_rate_of/ocr"] in (0, 0.5)
        assert line["eval/reward_mean"] == line["eval/reward_mean/world"]
    assert not any(key.startswith("reward/ocr") for key in step)
    with pytest.raises(ValueError, match=r"ocr: no text is due in .*\(tried on a prompt of prompts\.train: world\)"):
        build.fit(config(tmp_path, "other", reward={"world": 1, "ocr": 0.5}, prompts=prompts))


def test_a_reward_elsewhere_is_asked_part_by_part_and_the_run_is_the_same(tmp_path):
    (tmp_path / "own.py").write_text(
        "def here(images, prompts): return images.mean((1, 2, 3)) / 255\n"
        "async def away(images, prompts):\n"
        "    with open(__file__ + '.calls', 'a') as file:\n        file.write(f'{len(images)}\\n')\n"
        "    return here(images, prompts)\n"
    )
    layer = {"allocation": {"low": 2, "high": 3}, "optimizer": {"micro_batch": 2, "updates": 2}, "eval_every": 0}
    layer |= {"prompts_per_step": 4, "steps": 2}
    for name in ("here", "away"):
        build.fit(config(tmp_path, name, reward=f"{tmp_path}/own.py:{name}", **layer))
    asked = [int(line) for line in (tmp_path / "own.py.calls").read_text().split()]
    drawn = [2, 2, 6]  # tried out on two sets, and the first evaluation
    assert asked[:3] == drawn and sum(asked[3:-1]) == 20 and len(asked) == 3 + 8 + 1  # each prompt's group, of 2 or 3
    for here, away in zip(metrics(tmp_path / "here"), metrics(tmp_path / "away"), strict=True):
        assert here.keys() == away.keys()
        for key in ("reward/mean", "loss", "grad_norm", "rows", "allocation", "eval/reward_mean"):
            assert key not in here or here[key] == pytest.approx(away[key], rel=2e-2, abs=1e-5), key


def test_means_are_of_what_is_kept():
    said = Judgement(np.array([1, 50, 9], np.float32))
    kept, rewards = np.array([True, False, True]), np.array([[1], [np.nan], [9]], np.float32)
    verdict = Verdict(rewards[:, 0], np.array([True, True, False]), {"a": said, "b": said}, rewards, (1.0,), kept)
    found = evaluation._means(verdict, ["x", "x", "y"])
    assert found == {
        **{"eval/reward_mean": 5, "eval/pass_rate": 0.5, "eval/reward_mean/a": 5, "eval/reward_mean/b": 5},
        **{"eval/reward/x": 1, "eval/pass_rate/x": 1, "eval/reward/y": 9, "eval/pass_rate/y": 0},
    }
