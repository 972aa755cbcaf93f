import json
import subprocess
import sys

import datasets
import pytest
from datasets import Dataset, Features, Image, List, Value

from aegpo.config import resolve
from aegpo.data import ahead, draw, load_prompts
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


# ---------------------------------------------------------------- data sets


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder, where `datasets` keeps what it makes of files."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    return tmp_path


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_a_folder_is_a_data_set_whose_splits_are_named_or_the_settings_own(folder):
    for split in ("train", "validation", "test"):
        jsonl(folder / "mine" / f"{split}.jsonl", [{"prompt": f"{split} {i}"} for i in (3, 1, 2)])

    def texts(*source):
        prompts = load_prompts(*source)
        assert [prompt.id for prompt in prompts] == [0, 1, 2]
        return {prompt.text.split()[0] for prompt in prompts}

    assert [prompt.text for prompt in load_prompts("mine", "train")] == ["train 3", "train 1", "train 2"]
    assert texts("./mine", "eval") == {"test"}
    assert texts(f"{folder}/mine:validation", "eval") == {"validation"}
    assert texts("mine:test", "train") == {"test"}
    (folder / "mine" / "test.jsonl").unlink()
    assert texts("mine", "eval") == {"validation"}


def test_a_data_sets_other_columns_are_metadata_as_those_of_a_jsonl_are(folder):
    rows = [
        {"prompt": "ein Kreis", "tags": ["a", "b"], "n": 1, "box": {"x": 0.5, "of": [[1, 2], [3]]}, "is": True},
        {"prompt": "two squares", "tags": [], "n": -7, "box": {"x": 2.0, "of": []}, "is": False},
        {"prompt": "ein Kreis", "tags": ["c"], "n": None, "box": {"x": None, "of": [[]]}, "is": None},
    ]
    jsonl(folder / "same.jsonl", rows)
    Dataset.from_list(rows).to_parquet(folder / "mine" / "train.parquet")
    assert load_prompts("mine", "train") == load_prompts("same.jsonl", "train")


def test_columns_of_many_shapes_in_one_are_json_too(folder):
    rows = [{"text": "a", "about": {"x": 1}}, {"text": "b", "about": 3}, {"text": "c", "about": [1, "x"]}]
    jsonl(folder / "mine" / "train.jsonl", rows)
    assert [p.metadata for p in load_prompts("mine", "train")] == [{"about": row["about"]} for row in rows]


def test_images_and_bytes_are_left_out_and_never_decoded(folder):
    kinds = {"image": Image(), "more": List(Image()), "in": {"side": Image()}, "raw": Value("binary")}
    kinds |= {"made": Value("timestamp[s]"), "caption": Value("large_string"), "n": Value("int8")}
    broken = {"bytes": b"no picture", "path": None}
    row = {"image": broken, "more": [broken], "in": {"side": broken}, "raw": b"1", "made": 7, "caption": "x", "n": 1}
    Dataset.from_list([row], features=Features(kinds)).to_parquet(folder / "mine" / "train.parquet")
    assert load_prompts("mine", "train") == [Prompt(0, "x", {"n": 1})]


def test_the_prompt_is_the_first_known_column_that_holds_text(folder):
    rows = [{"text": "c", "caption": "b", "prompt": [{"role": "user"}]}]
    jsonl(folder / "mine" / "train.jsonl", rows)
    assert load_prompts("mine", "train") == [Prompt(0, "b", {"text": "c", "prompt": [{"role": "user"}]})]


@pytest.mark.parametrize(
    ("source", "split", "files", "message"),
    [
        ("mine", "eval", {"train": [{"prompt": "x"}]}, "no split 'test' or 'validation', only train; .* mine:train"),
        ("mine:tset", "eval", {"test": [{"prompt": "x"}]}, "prompts.eval: mine:tset has no split 'tset', only test"),
        ("mine", "train", {"test": [{"prompt": "x"}]}, "no split 'train', only test; say which, as in mine:test"),
        ("mine", "train", {"train": [{"a": "x", "b": 1}]}, "no text under 'prompt', .*; its columns are a, b"),
        ("mine", "train", {"train": [{"prompt": 3}]}, "no text under 'prompt', .*; its columns are prompt"),
        ("mine", "train", {"train": [{"text": "x"}, {"text": " "}]}, "mine, row 1 of train, has an empty 'text'"),
        ("mine", "train", {"train": [{"text": "x"}, {"text": None}]}, "mine, row 1 of train, has an empty 'text'"),
        ("mine", "train", {}, "prompts.train: mine cannot be read as a data set: .*doesn't contain any data files"),
        (
            "some/body",
            "train",
            {},
            "prompts.train: some/body cannot be read as a data set: Couldn't reach .* on the Hub",
        ),
        ("some/body:x", "eval", {}, "prompts.eval: some/body:x cannot be read as a data set: Couldn't reach"),
        ("./none", "eval", {}, "prompts.eval: ./none must be a .txt .* or a data set"),
        (":train", "eval", {}, "prompts.eval: :train must be a .txt"),
        ("mine/x.jsonl", "eval", {}, "prompts.eval: mine/x.jsonl cannot be read: No such file"),
    ],
)
def test_bad_data_sets(folder, source, split, files, message):
    for name, rows in files.items():
        jsonl(folder / "mine" / f"{name}.jsonl", rows)
    with pytest.raises(ValueError, match=message) as error:
        load_prompts(source, split)
    assert "\n" not in str(error.value)


def test_a_data_set_without_a_row(folder):
    Dataset.from_dict({"prompt": []}, Features({"prompt": Value("string")})).to_parquet(folder / "mine/train.parquet")
    with pytest.raises(ValueError, match=r"prompts.train: mine cannot be read as a data set: .* no data"):
        load_prompts("mine", "train")


@pytest.mark.parametrize("version", [None, "3.6.0"])
def test_without_the_library_an_error_says_how_to_get_it(folder, monkeypatch, version):
    if version:
        monkeypatch.setattr(datasets, "__version__", version)
    else:
        monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"^--prompts: mine is a data set, .* pip install 'aegpo\[datasets\]'$"):
        load_prompts("mine", "eval", "--prompts")


def test_the_library_is_loaded_only_for_a_data_set(tmp_path):
    (tmp_path / "a.txt").write_text("a ring\n")
    program = (
        "import sys; from aegpo.data import load_prompts as load; load(sys.argv[1], 'train'); load('world', 'eval')"
    )
    program += "; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path / "a.txt")]).returncode == 0


def test_what_lies_ahead_is_what_is_drawn():
    prompts = [Prompt(i, str(i), {}) for i in range(50)]
    for steps in (1, 3, 12, 13, 40):
        config = resolve({"steps": steps, "prompts_per_step": 4, "rollouts_per_step": 48, "seed": 3})
        drawn = {prompt.id for step in range(steps) for prompt in draw(prompts, 4, 3, step)}
        assert drawn <= {prompt.id for prompt in ahead(prompts, config)}
        if steps < 12:
            assert [prompt.id for prompt in ahead(prompts, config)] == sorted(drawn)
