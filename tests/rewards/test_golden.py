"""`aegpo reward-check`: pairs whose better picture everybody knows."""

import json

import numpy as np
import pytest
from PIL import Image

from aegpo.cli import main
from aegpo.rewards import Reward
from aegpo.rewards.golden import drawn_pairs, judge_pairs, read_pairs
from aegpo.types import Judgement


@pytest.mark.parametrize("name", ["world", "jpeg_size", "ocr"])
def test_a_reward_that_runs_here_knows_its_pairs(name, capsys):
    assert main(["reward-check", name]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) >= 4 and all(line.startswith("good ") for line in lines)
    assert last == f"{name}: {len(lines)} of {len(lines)} pairs in the right order"


def test_one_that_has_the_order_wrong_fails_and_so_does_one_that_always_says_the_same(tmp_path, capsys):
    (tmp_path / "own.py").write_text(
        "def dark(images, prompts): return -images.mean((1, 2, 3))\n"
        "def flat(images, prompts): return [1.0] * len(images)\n"
        "def bright(images, prompts): return images.mean((1, 2, 3))\n"
    )
    for name, value in (("light", 200), ("grey", 90)):
        Image.new("RGB", (8, 6 + value % 3), (value,) * 3).save(tmp_path / f"{name}.png")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "light", "good": "light.png", "bad": "grey.png"}\n\n')
    ask = ["--pairs", str(tmp_path / "pairs.jsonl")]
    assert main(["reward-check", f"{tmp_path}/own.py:bright", *ask]) == 0
    for wrong in ("dark", "flat"):
        with pytest.raises(SystemExit) as stopped:
            main(["reward-check", f"{tmp_path}/own.py:{wrong}", *ask])
        assert stopped.value.code == 1
        assert "does not prefer the better picture in 1 of 1 pairs" in capsys.readouterr().err


def test_pairs_are_read_with_their_metadata_and_drawn_far_apart(tmp_path):
    Image.new("RGB", (4, 3), (9, 8, 7)).save(tmp_path / "a.png")
    row = {"prompt": "p", "good": str(tmp_path / "a.png"), "bad": "a.png", "text": "x"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    [pair] = read_pairs(tmp_path / "pairs.jsonl")
    assert pair.good[0, 0].tolist() == pair.bad[2, 3].tolist() == [9, 8, 7] and pair.metadata == {"text": "x"}
    for name in ("world", "pickscore=somewhere", "ocr", "aesthetic"):
        for pair in drawn_pairs(name):
            assert np.abs(pair.good.astype(int) - pair.bad).max() > 60


def test_a_pair_is_one_group_and_keeps_its_metadata():
    seen = []

    def judge(images, prompts, metadata):
        seen.append((images[:, 0, 0, 0].tolist(), list(prompts), list(metadata)))
        return Judgement(images[:, 0, 0, 0].astype(np.float32))

    reward = Reward("own", judge, groupwise=True)
    [pair] = [pair for pair in drawn_pairs("world")][:1]
    pair = type(pair)("p", np.full((2, 2, 3), 5, np.uint8), np.full((2, 2, 3), 3, np.uint8), {"k": 1})
    assert judge_pairs(reward, [pair]) == [(5, 3)]
    assert seen == [([5, 3], ["p", "p"], [{"k": 1}, {"k": 1}])]
    other = type(pair)("p", pair.good, np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="own compares, so both pictures for 'p' must be of one size"):
        judge_pairs(reward, [other])
    assert judge_pairs(Reward("own", judge), [other]) == [(5, 0)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no pairs"),
        ("{", "line 1: .*; a line holds prompt, good and bad"),
        ("[1]", "line 1: .*; a line holds prompt, good and bad"),
        ('{"prompt": "p", "good": "a.png", "bad": 3}', "line 1: all three are texts; a line holds"),
        ('{"prompt": "p", "good": "a.png"}', "line 1: it has no 'bad'"),
        ('{"prompt": "p", "good": "none.png", "bad": "none.png"}', "line 1: .*No such file.*none.png'$"),
        ('{"prompt": "p", "good": "pairs.jsonl", "bad": "x"}', "line 1: cannot identify image file"),
    ],
)
def test_pairs_that_cannot_be_read(tmp_path, capsys, content, said):
    (tmp_path / "pairs.jsonl").write_text(content)
    with pytest.raises(ValueError, match=said) as error:
        read_pairs(tmp_path / "pairs.jsonl")
    assert "\n" not in str(error.value)
    assert main(["reward-check", "world", "--pairs", str(tmp_path / "pairs.jsonl")]) == 2


def test_a_reward_that_there_is_not_is_said_to_be_unknown(capsys):
    assert main(["reward-check", "ocrr"]) == 2
    assert "'ocrr' is unknown; known are aesthetic, " in capsys.readouterr().err


def test_none_are_drawn_for_what_we_cannot_know(capsys):
    assert main(["reward-check", "object_checks"]) == 2
    assert "no pairs are drawn for object_checks; give some of yours as --pairs FILE.jsonl" in capsys.readouterr().err
