"""`aegpo eval RUN --rewards`: the intervals against closed forms, and a run's pictures against its other records."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from aegpo import build, comparison, display, use, world
from aegpo.cli import main
from aegpo.comparison import interval, summary
from aegpo.config import load_yaml, resolve
from aegpo.data import load_prompts
from aegpo.rewards import load
from tests.rewards.small import clip_folder

NORMAL = np.random.default_rng(0).normal(3, 2, 400)


# ---------------------------------------------------------------- intervals


def test_equal_values_leave_no_doubt():
    assert interval(np.full(7, 0.1)) == pytest.approx((0.1, 0.1), abs=1e-15)


@pytest.mark.parametrize(("ones", "n"), [(1, 2), (5, 10), (3, 12), (40, 200)])
def test_of_ones_and_zeros_it_is_the_binomials(ones, n):
    """So many ones of n: a resample holds a binomial number of them, of which the nearest quantiles are known."""
    low, high = (np.array(interval(np.arange(n) < ones)) * n).round(9)
    share = ones / n
    assert stats.binom.ppf(0.02, n, share) <= low <= stats.binom.ppf(0.03, n, share)
    assert stats.binom.ppf(0.97, n, share) <= high <= stats.binom.ppf(0.98, n, share)


def test_of_many_normal_values_it_is_students():
    by_t = stats.t.interval(0.95, len(NORMAL) - 1, NORMAL.mean(), stats.sem(NORMAL))
    assert interval(NORMAL) == pytest.approx(by_t, abs=0.05 * (by_t[1] - by_t[0]))
    assert interval(NORMAL) == interval(NORMAL)


def test_a_mean_of_four_times_as_many_is_twice_as_sure():
    narrow, wide = (np.ptp(interval(values)) for values in (np.tile(NORMAL, 4), NORMAL))
    assert wide / narrow == pytest.approx(2, rel=0.06)


def test_a_gain_is_surer_than_two_means_where_prompts_differ_more_than_policies():
    base = NORMAL[:, None]
    run = base + np.random.default_rng(1).normal(0.1, 0.2, (400, 1))
    row = summary({"mine": {"base": base, "run": run}})["mine"]
    low, high = row["gain"]["interval"]
    by_t = stats.t.interval(0.95, 399, (run - base).mean(), stats.sem((run - base)[:, 0]))
    assert (low, high) == pytest.approx(by_t, abs=0.05 * (by_t[1] - by_t[0]))
    assert 0 < low < high < row["run"]["interval"][1] - row["base"]["interval"][0]
    assert row["run"]["interval"][0] < row["base"]["interval"][1]  # of the means alone nothing could be said
    shifted = summary({"mine": {"base": base, "run": base + 0.25}})["mine"]["gain"]
    assert [shifted["mean"], *shifted["interval"]] == pytest.approx([0.25] * 3)


def test_a_prompts_pictures_are_one_value():
    """Prompts alike and pictures not: nothing is in doubt about prompts."""
    scores = np.tile([0.0, 0.5, 1.0], (9, 1))
    row = summary({"mine": {"base": scores, "run": scores[:, ::-1]}})["mine"]
    assert row["base"]["interval"] == (0.5, 0.5)
    assert (row["gain"]["mean"], row["gain"]["interval"]) == (0, (0, 0))
    assert row["run"]["scores"] == [[1.0, 0.5, 0.0]] * 9


# ---------------------------------------------------------------- the command


SMALL = {
    "algorithm": "flow-grpo",
    "steps": 1,
    "prompts_per_step": 2,
    "rollouts_per_step": 8,
    "sampler": {"steps": 4},
    "optimizer": {"micro_batch": 8, "lr": 0.02, "ema": 0.5, "ema_every": 1},
    "model": {"lora": {"rank": 4}},
    "eval_every": 1,
    "eval_images": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of one step and twelve held-out prompts, two rewards, and what the command left and printed."""
    folder = tmp_path_factory.mktemp("compared")
    (folder / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in world.held_out()[::12]))
    (folder / "mine.py").write_text(
        "def bright(images, prompts):\n    return images.mean((1, 2, 3)) / 255\n"
        "def together(images, prompts):\n    return [len(images)] * len(images)\n"
    )
    where = {"prompts": {"eval": str(folder / "few.jsonl")}, "output_dir": str(folder / "run")}
    build.run(resolve(SMALL, where, {"reward": f"{folder}/mine.py:bright"}))
    rewards = f"world,{folder}/mine.py:bright,{folder}/mine.py:together"
    assert main(["eval", str(folder / "run"), "--rewards", rewards]) == 0
    return folder


def said(folder):
    return json.loads((folder / "run" / "eval" / "eval.json").read_text())


def test_the_means_are_those_of_the_plain_evaluation_and_of_the_runs_own_record(folder):
    rewards = said(folder)["rewards"]
    bright = f"{folder}/mine.py:bright"
    assert list(rewards) == ["world", bright, f"{folder}/mine.py:together"]
    for name in ("world", bright):
        plain = use.evaluate(folder / "run", reward=name)["eval/reward_mean"]
        assert rewards[name]["run"]["mean"] == pytest.approx(plain, rel=1e-6)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    before, after = (line["eval/reward_mean"] for line in lines)
    assert before != after
    row = rewards[bright]
    assert (row["base"]["mean"], row["run"]["mean"]) == pytest.approx((before, after), rel=1e-6)
    assert row["gain"]["mean"] == pytest.approx(after - before, rel=1e-4)


def test_a_kept_picture_has_the_score_that_is_written_for_it(folder):
    asked = [prompt for prompt in load_prompts(str(folder / "few.jsonl"), "eval") for _ in range(2)]
    names = [f"{id_:05}-{number}.png" for id_ in range(12) for number in range(2)]
    for policy in ("base", "run"):
        where = folder / "run" / "eval" / "images" / policy
        assert sorted(path.name for path in where.iterdir()) == names
        pictures = np.stack([np.asarray(Image.open(where / name)) for name in names])
        for name in ("world", f"{folder}/mine.py:bright"):
            again = load(name).judge(pictures, [prompt.text for prompt in asked], [prompt.metadata for prompt in asked])
            assert np.ravel(said(folder)["rewards"][name][policy]["scores"]).tolist() == again.score.tolist()


def test_pictures_are_drawn_and_judged_a_part_at_a_time_and_once_for_all_rewards(folder, monkeypatch, tmp_path):
    sizes = said(folder)["rewards"][f"{folder}/mine.py:together"]["run"]["scores"]
    assert sizes == [[16.0] * 2] * 8 + [[8.0] * 2] * 4
    drawn, draw = [], comparison.draw
    monkeypatch.setattr(
        comparison, "draw", lambda model, part, config: drawn.append(len(part)) or draw(model, part, config)
    )
    again = use.evaluate_by_all(folder / "run", ["world", f"{folder}/mine.py:bright"], out=tmp_path / "out")
    assert drawn == [8, 8, 4, 4]
    assert again["rewards"]["world"]["base"]["scores"] == said(folder)["rewards"]["world"]["base"]["scores"]


def test_the_file_says_how_the_pictures_were_drawn(folder):
    written = said(folder)
    prompts = [{"id": i, "prompt": row["prompt"]} for i, row in enumerate(world.held_out()[::12])]
    assert (written["run"], written["checkpoint"], written["prompts"]) == ("run", "checkpoint-1", prompts)
    how = {
        name: written["settings"][name]
        for name in ("model", "steps", "guidance", "seed", "images", "prompts", "resamples")
    }
    assert how == {
        **{"model": "world", "steps": 4, "guidance": 1.0, "seed": 0, "images": 2},
        **{"prompts": str(folder / "few.jsonl"), "resamples": 2000},
    }


def test_other_prompts_another_folder_and_a_table(folder, tmp_path, capsys, monkeypatch):
    """Pictures of an earlier call go, so that a folder holds those of its eval.json and what is not ours."""
    monkeypatch.setattr(display, "QUIET", -1)
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "three.txt").write_text("a ring\ntwo squares\na red circle\n")
    out = tmp_path / "deep" / "down"
    old = [out / "images" / "run" / name for name in ("00007-0.png", "00000-3.png", "mine.png")]
    out.joinpath("images", "run").mkdir(parents=True)
    for path in old:
        path.write_bytes(b"")
    words = ["--prompts", str(tmp_path / "three.txt"), "--images", "1", "--out", str(out)]
    assert main(["eval", str(folder / "run"), "--rewards", f"{folder}/mine.py:bright", *words]) == 0
    assert sorted(path.name for path in (out / "images" / "run").iterdir()) == [
        *("00000-0.png", "00001-0.png", "00002-0.png", "mine.png")
    ]
    printed = capsys.readouterr().out
    assert re.findall(r"^eval: (\d+) of 6$", printed, re.MULTILINE) == ["3", "6"]
    row = json.loads((out / "eval.json").read_text())["rewards"][f"{folder}/mine.py:bright"]
    cells = [
        [cell.strip() for cell in line.strip("│").split("│")[1:]] for line in printed.splitlines() if line[0] == "│"
    ]
    columns = [row[name] for name in ("base", "run", "gain")]
    assert cells[0] == [f"{column['mean']:.4f}" for column in columns]
    assert cells[1] == ["[{:.4f}, {:.4f}]".format(*column["interval"]) for column in columns]


def test_scorers_from_folders_judge_the_kept_pictures(folder, tmp_path):
    (tmp_path / "three.txt").write_text("a ring\ntwo squares\na red circle\n")
    names = [f"{name}={clip_folder(tmp_path / name, seed)}" for seed, name in enumerate(("clipscore", "pickscore"))]
    words = ["--prompts", str(tmp_path / "three.txt"), "--images", "1", "--out", str(tmp_path / "out")]
    assert main(["eval", str(folder / "run"), "--rewards", ",".join(names), *words]) == 0
    written = json.loads((tmp_path / "out" / "eval.json").read_text())["rewards"]
    assert list(written) == names
    for policy in ("base", "run"):
        paths = sorted((tmp_path / "out" / "images" / policy).iterdir())
        pictures = np.stack([np.asarray(Image.open(path)) for path in paths])
        for name in names:
            again = load(name).judge(pictures, ["a ring", "two squares", "a red circle"], [{}] * 3).score
            assert np.ravel(written[name][policy]["scores"]) == pytest.approx(again, abs=1e-5)


def test_an_evaluation_that_fails_half_way_leaves_no_numbers(folder, tmp_path, capsys):
    copy = shutil.copytree(folder / "run", tmp_path / "run")
    (tmp_path / "picky.py").write_text("def score(images, prompts):\n    return [1.0] * min(len(images), 8)\n")
    assert main(["eval", str(copy), "--rewards", f"world,{tmp_path}/picky.py:score"]) == 2
    assert "returned shape (8,) for 16 images" in capsys.readouterr().err
    assert not (copy / "eval" / "eval.json").exists()


def test_an_evaluated_run_may_still_be_overwritten(folder, tmp_path):
    copy = shutil.copytree(folder / "run", tmp_path / "run")
    build.fit(replace(resolve(load_yaml(copy / "config.yaml")), steps=0, output_dir=str(copy)), overwrite=True)
    assert not (copy / "eval").exists()
