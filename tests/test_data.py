import json

import pytest

from aegpo.data import draw, load_prompts
from aegpo.types import Prompt

PROMPTS = [Prompt(i, f"prompt {i}", {}) for i in range(10)]


def test_every_epoch_shows_every_prompt_once_and_no_step_shows_one_twice():
    for epoch in range(3):
        batches = [draw(PROMPTS, 5, seed=0, step=2 * epoch + i) for i in range(2)]
        assert sorted(p.id for batch in batches for p in batch) == list(range(10))
    assert [p.id for p in draw(PROMPTS, 10, 0, 0)] != [p.id for p in draw(PROMPTS, 10, 0, 1)]


def test_what_is_left_over_is_drawn_in_another_epoch():
    steps = [{p.id for p in draw(PROMPTS, 4, seed=1, step=step)} for step in range(40)]
    assert all(len(step) == 4 for step in steps)
    assert all(not steps[2 * i] & steps[2 * i + 1] for i in range(20))
    assert set().union(*steps) == set(range(10))


def test_the_draw_depends_on_seed_and_step_alone():
    assert draw(PROMPTS, 4, 3, 7) == draw(list(PROMPTS), 4, 3, 7)
    assert draw(PROMPTS, 4, 3, 7) != draw(PROMPTS, 4, 4, 7)


def test_more_prompts_a_step_than_there_are():
    with pytest.raises(ValueError, match=r"takes 11 prompts.*holds only 10"):
        draw(PROMPTS, 11, 0, 0)


def test_text_and_jsonl_keep_order_duplicates_and_metadata(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("\ufeffein Kreis \n\nzwei Bälle\nein Kreis\n", encoding="utf-8")
    assert load_prompts(str(text), "train") == [
        Prompt(0, "ein Kreis", {}),
        Prompt(1, "zwei Bälle", {}),
        Prompt(2, "ein Kreis", {}),
    ]
    rows = tmp_path / "a.jsonl"
    rows.write_text(json.dumps({"prompt": "x", "tag": [1]}) + "\n\n" + json.dumps({"prompt": "y"}), encoding="utf-8")
    assert load_prompts(str(rows), "eval") == [Prompt(0, "x", {"tag": [1]}), Prompt(1, "y", {})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"prompts.train: .*a.txt holds no prompt"),
        ("a.txt", b" \n\n", "holds no prompt"),
        ("a.txt", b"ein Kreis\n" + b"\xff\xfe", r"a.txt is not UTF-8 \(byte 10\)"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": 3}\n', "line 2 must be an object with a non-empty text"),
        ("a.jsonl", b"[1]\n", "line 1 must be an object"),
        ("a.jsonl", b"not json\n", "line 1 is not JSON"),
        ("a.csv", b"x\n", r"must be a .txt"),
        (None, b"", "cannot be read: No such file"),
    ],
)
def test_bad_prompt_files(tmp_path, name, content, message):
    path = tmp_path / (name or "missing.txt")
    if name:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_prompts(str(path), "train")
