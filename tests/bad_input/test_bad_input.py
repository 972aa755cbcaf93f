"""Bad recipes, command lines, prompt files and checkpoints, some 500 of them, through the command itself.

Each ends in exit code 2 and one plain line, changes no file anywhere, runs nothing, and is refused before anything is
trained. The corpus beside this file holds what people have, by accident or on purpose; the rest is generated.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from aegpo import config as configuration
from aegpo.cli import main
from aegpo.config import Config
from aegpo.disk import LOCK
from aegpo.words import RECIPES

CORPUS = Path(__file__).parent
BAD_RECIPES = sorted((CORPUS / "recipes").iterdir())
BAD_PROMPTS = sorted((CORPUS / "prompts").iterdir())
EXAMPLES = {"settings": 110, "structures": 40, "files": 15, "command lines": 50, "prompts": 40, "checkpoints": 25}
NEVER_READ = "never-read.txt"  # would be said where a bad config was taken for a good one

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
STARTING = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "subprocess.Popen", "pickle.find_class")
CHANGING = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree")

SMALL = {
    "algorithm": "diffusion-nft",
    "reward": "jpeg_size",
    "steps": 1,
    "prompts_per_step": 2,
    "rollouts_per_step": 6,
    "sampler": {"steps": 3},
    "exploration": {"rule": "entropy_peaks", "k": 1},
    "allocation": {"rule": "reward_variance"},
    "optimizer": {"ema": 0.5, "ema_every": 1},
    "model": {"lora": {"rank": 1, "targets": ["attn.to_q"]}},
    "eval_images": 1,
    "checkpoints_total_limit": 1,
}


def generated(name: str) -> Any:
    """The same examples in each run, so that a failure is one of this code and not of luck."""
    quiet = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    return settings(
        max_examples=EXAMPLES[name], derandomize=True, database=None, deadline=None, suppress_health_check=quiet
    )


# ---------------------------------------------------------------- what is watched


class Watch:
    """What the interpreter tells of files that are written and of programs that are started, while it is `on`."""

    def __init__(self) -> None:
        self.on, self.written, self.started, self.read = False, list[str](), list[str](), list[str]()
        sys.addaudithook(self)

    def __call__(self, event: str, given: tuple[Any, ...]) -> None:
        if not self.on or self.is_the_lock(event, given):
            return
        if event in STARTING:
            self.started.append(f"{event} {given}")
        elif event in CHANGING:
            self.written.append(f"{event} {given}")
        elif event == "open" and not isinstance(given[0], int) and "__pycache__" not in os.fsdecode(given[0]):
            (self.written if (given[2] or 0) & WRITING else self.read).append(os.fsdecode(given[0]))

    def is_the_lock(self, event: str, given: tuple[Any, ...]) -> bool:
        """Whether this is how a run's own folder is held meanwhile, which changes nothing in it."""
        if event == "os.mkdir":
            return os.path.isdir(given[0])
        return event == "open" and isinstance(given[0], str) and given[0].endswith(f"/{LOCK}")


WATCH = Watch()


def everything(folder: Path) -> dict[str, tuple[Any, ...]]:
    """All that stands in a folder: kinds, times, targets of links and contents."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.name != LOCK):
        about = path.lstat()
        inside = (
            os.readlink(path)
            if path.is_symlink()
            else hashlib.sha256(path.read_bytes()).digest()
            if path.is_file()
            else None
        )
        found[str(path)] = (about.st_mode, about.st_mtime_ns, inside)
    return found


def complaint(argv: list[str], sandbox: Path) -> str:
    """The one line that a bad command gets; nothing else has happened."""
    before = everything(sandbox)
    out, err = io.StringIO(), io.StringIO()
    WATCH.written.clear(), WATCH.started.clear(), WATCH.read.clear()
    WATCH.on = True
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(argv)
    finally:
        WATCH.on = False
    said = err.getvalue()
    assert code == 2, said
    assert out.getvalue() == ""
    assert said.startswith("aegpo: ") and said.endswith("\n") and said[:-1].isprintable(), said
    assert len(said) < 2500 and "Traceback" not in said and NEVER_READ not in said, said
    assert (WATCH.started, WATCH.written) == ([], [])
    assert everything(sandbox) == before
    assert not list(Path.cwd().rglob("executed"))
    return said


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's folder, which is the working directory, with one small run and things that are not ours."""
    home = tmp_path_factory.mktemp("home")
    with contextlib.chdir(home):
        (home / "good.txt").write_text("a ring\na red cross\n")
        (home / "small.yaml").write_text(json.dumps(SMALL | {"prompts": {"train": "good.txt", "eval": "good.txt"}}))
        (home / "theirs").mkdir()
        (home / "theirs" / "notes.txt").write_text("of somebody else")
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(["train", "small.yaml", "--output-dir", "run"]) == 0
        yield home


# ---------------------------------------------------------------- recipes


def setting_kinds() -> dict[str, Any]:
    """The annotation of every setting, by its dotted name."""
    kinds = {}
    for name in configuration.settings():
        kind: Any = Config
        for key in name.split("."):
            kind = get_type_hints(kind)[key]
        kinds[name] = kind
    return kinds


KINDS = setting_kinds()
COPIES = count()
NUMBERS = [float("nan"), float("inf"), -float("inf"), 10**30, -(10**30), -1e300]
BASES = [yaml.safe_load((RECIPES / name).read_text()) for name in ("world.yaml", "sd35-medium-lora-24gb.yaml")]
WORDS = st.text(max_size=20)
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=8,
)


def wrong_values(name: str) -> st.SearchStrategy[Any]:
    """What a setting can never be."""
    kind, default = KINDS[name], Config()
    for key in name.split("."):
        default = getattr(default, key)
    structures = [[], [[1]], [None, {}], {}, {"a": {"b": [1]}}]
    optional = type(None) in get_args(kind)
    nothing = [] if optional else [None]
    if name == "reward":
        return st.sampled_from([None, 3, True, [], ["world"], {}, {"world": {"weight": "x"}}, {"world": 0}])
    if name == "algorithm":
        return st.sampled_from([None, 3, True, *structures]) | WORDS
    if get_origin(kind) is Literal:
        return st.sampled_from([None, 3, 1.5, True, "", *structures]) | WORDS.map(lambda word: f"{word}?")
    if isinstance(default, bool) or name == "optimizer.recompute":
        return st.sampled_from([0, 1, "true", "", 2.5, *nothing, *structures])
    if isinstance(default, str):
        return st.sampled_from([3, 1.5, True, None, "a\0b", *structures])
    if isinstance(default, tuple):
        return st.sampled_from([None, 3, True, "to_q", {"a": 1}, [1.5], [None], [[]], [2, 3], [float("nan")] * 2])
    if isinstance(default, int) or name == "model.text_tokens":
        return st.sampled_from([*NUMBERS, "ten", "", 2.5, True, *nothing, *structures])
    numbers = [number for number in NUMBERS if name != "exploration.merge" or number not in (10**30, -1e300)]
    return st.sampled_from([*numbers, "ten", "", True, *nothing, *structures])


def with_setting(recipe: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    key, _, rest = name.partition(".")
    inner = recipe.get(key)
    return recipe | {key: with_setting(inner if isinstance(inner, dict) else {}, rest, value) if rest else value}


def guard(name: str = "") -> list[str]:
    """Prompts that are not there, read after the config is found good; but not over what is wrong itself."""
    return ["--prompts.train", NEVER_READ] if name == "prompts.eval" else ["--prompts.eval", NEVER_READ]


def write(recipe: Any) -> str:
    Path("bad.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return "bad.yaml"


@pytest.mark.parametrize("recipe", BAD_RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_the_corpus_is_refused(recipe: Path, sandbox: Path):
    said = complaint(["train", str(recipe), *guard()], sandbox)
    assert f"recipe {recipe}" in said


@generated("settings")
@given(st.sampled_from(BASES), st.sampled_from(sorted(KINDS)).flatmap(lambda n: st.tuples(st.just(n), wrong_values(n))))
def test_a_setting_of_a_wrong_kind_is_refused(sandbox: Path, base: dict[str, Any], wrong: tuple[str, Any]):
    name, value = wrong
    said = complaint(["train", write(with_setting(base, name, value)), *guard(name)], sandbox)
    assert "recipe bad.yaml" in said


GROUPS = sorted({name.rpartition(".")[0] for name in KINDS} - {""})
NO_TEXT = st.none() | st.booleans() | st.integers() | st.floats() | st.dates()


@generated("structures")
@given(
    st.sampled_from(BASES),
    st.one_of(
        st.tuples(st.sampled_from(GROUPS), JUNK.filter(lambda value: not isinstance(value, dict))),
        st.tuples(st.sampled_from(GROUPS), st.dictionaries(WORDS.map("?".__add__), JUNK, min_size=1, max_size=3)),
        st.tuples(st.sampled_from(GROUPS), st.dictionaries(NO_TEXT, JUNK, min_size=1, max_size=3)),
        st.tuples(WORDS.map("?".__add__), JUNK),
    ),
)
def test_a_recipe_of_another_structure_is_refused(sandbox: Path, base: dict[str, Any], wrong: tuple[str, Any]):
    name, value = wrong
    made = with_setting(base, name, value) if name in GROUPS else base | {name: value}
    assert "recipe bad.yaml" in complaint(["train", write(made), *guard()], sandbox)


@generated("files")
@given(
    st.one_of(
        st.binary(max_size=200).map(b"\xff".__add__),
        st.binary(max_size=200).map(b"steps: 1\n\0".__add__),
        st.lists(JUNK, min_size=1, max_size=4).map(lambda value: yaml.safe_dump(value).encode()),
        st.integers(200, 20_000).map(lambda deep: b"reward: " + b"[" * deep),
        st.integers(21, 30_000).map(lambda deep: b"reward: " + b"{a: " * deep + b"1" + b"}" * deep),
        st.integers(21, 3000).map(lambda deep: b"".join(b" " * i + b"a:\n" for i in range(min(deep, 300)))),
        st.integers(4301, 90_000).map(lambda digits: b"steps: " + b"9" * digits),
        st.integers(20, 90_000).map(lambda digits: b"seed: 0x" + b"f" * digits),
        st.integers(100_000, 200_000).map(lambda letters: b"output_dir: " + b"a" * letters),
        st.integers(10_001, 20_000).map(lambda items: b"reward: [" + b"1," * items + b"1]"),
        st.integers(1000, 50_000).map(lambda letters: b"s" * letters + b": 1"),
    )
)
def test_a_file_that_is_too_much_or_no_text_at_all_is_refused(sandbox: Path, content: bytes):
    Path("bad.yaml").write_bytes(content)
    assert "recipe bad.yaml" in complaint(["train", "bad.yaml", *guard()], sandbox)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "theirs", "/dev/null/x.yaml", "a" * 5000, "no\0thing", "\udcff", "loop", "/dev/zero"]
)
def test_what_is_no_file_is_no_recipe(name: str, sandbox: Path):
    if not os.path.lexists("loop"):
        Path("loop").symlink_to("loop")
    complaint(["train", name, *guard()], sandbox)


# ---------------------------------------------------------------- command lines

TYPED = sorted(name for name, kind in KINDS.items() if kind is not str and name not in ("output_dir", "reward"))


@st.composite
def bad_words(draw: Any) -> list[str]:
    name = draw(st.sampled_from(TYPED))
    value = draw(wrong_values(name))
    is_literal = get_origin(KINDS[name]) is Literal or name == "algorithm"
    text = value if is_literal and isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True)
    text = text.removesuffix("...\n").strip() if not is_literal else text
    return draw(
        st.sampled_from(
            [
                [f"--{name}={text}"],
                [f"--{name.replace('_', '-')}={text}"],
                [f"--{name}.{name}=1"],
                [f"--zz{draw(WORDS)}={text}"],
                [f"--{name}={{a: &a [*a]}}", f"--{name}={{a: &a [*a]}}"],
                [f"--{name}=!!python/object/apply:os.system ['touch executed']"],
                [f"--{'a.' * draw(st.integers(1, 5000))}a=1"] * 2,
                [f"--{name}=[" + "[" * draw(st.integers(10, 5000))],
            ]
        )
    )


@generated("command lines")
@given(bad_words())
def test_a_bad_command_line_is_refused(sandbox: Path, words: list[str]):
    complaint(["train", "small.yaml", *guard(words[0][2:].partition("=")[0]), *words], sandbox)


# ---------------------------------------------------------------- prompts


def train_on(file: str, split: str) -> list[str]:
    never = f"never-{next(COPIES)}"  # a folder of its own for each, so that one taken for good does not hide the others
    words = ["train", "small.yaml", "--steps=0", "--reward=world", "--prompts_per_step=1", "--output-dir", never]
    return [*words, f"--prompts.{split}", file]


@pytest.mark.parametrize("file", BAD_PROMPTS, ids=lambda path: path.name)
def test_a_prompt_file_of_the_corpus_is_refused(file: Path, sandbox: Path):
    assert str(file) in complaint(train_on(str(file), "train"), sandbox)


GOOD_LINES = [b'{"prompt": "a ring"}', b'{"prompt": "a red cross", "task": "colors"}', b""]
ODD = st.characters(categories=["Cc", "Cs"], exclude_characters="\t\n\v\f\r\x85")
BAD_LINES = st.one_of(
    JUNK.filter(lambda value: not isinstance(value, dict)).map(lambda value: json.dumps(value).encode()),
    JUNK.filter(lambda value: not isinstance(value, str) or not value.strip())
    .map(lambda v: json.dumps({"prompt": v}))
    .map(str.encode),
    ODD.map(lambda letter: json.dumps({"prompt": f"a {letter} ring"}).encode()),
    st.text("bcdfghjklmnpqrstvwxyz0123456789", min_size=8).map(
        lambda word: json.dumps({"prompt": f"a {word}"}).encode()
    ),
    JUNK.filter(bool).map(lambda value: json.dumps({"prompt": "a ring", "objects": [[value, None]]}).encode()),
    JUNK.map(lambda value: json.dumps({"prompt": "a ring", "objects": value}).encode()),
    st.binary(min_size=1, max_size=60).map(b"\xff".__add__),
    st.just(b'{"prompt": "a ring", "about": ' + b"[" * 10**5 + b"]" * 10**5 + b"}"),
    st.integers(5000, 50_000).map(lambda digits: b'{"prompt": "a ring", "about": ' + b"9" * digits + b"}"),
    st.integers(19, 20_000).map(lambda words: b'{"prompt": "' + b"ring " * words + b'"}'),
    st.integers(1, 18).map(lambda end: b'{"prompt": "a ring"}'[:end]),
)


@generated("prompts")
@given(
    st.lists(st.sampled_from(GOOD_LINES), max_size=3),
    BAD_LINES,
    st.sampled_from(["train", "eval"]),
    st.sampled_from([b"\n", b"\r\n"]),
)
def test_a_line_that_is_no_prompt_is_refused(sandbox: Path, before: list[bytes], bad: bytes, split: str, end: bytes):
    Path("bad.jsonl").write_bytes(end.join([*before, bad, *GOOD_LINES]))
    assert f"prompts.{split}" in complaint(train_on("bad.jsonl", split), sandbox)


@pytest.mark.parametrize(
    "name", ["", " ", "no.txt", "loop.txt", "zero.txt", "/dev/null", "a" * 5000 + ".txt", "a\0.txt", "\udcff.txt"]
)
def test_what_is_no_file_holds_no_prompts(name: str, sandbox: Path):
    for link, target in {"loop.txt": "loop.txt", "zero.txt": "/dev/zero"}.items():
        if not os.path.lexists(link):
            Path(link).symlink_to(target)
    complaint(train_on(name, "train"), sandbox)


# ---------------------------------------------------------------- where a run is written


@pytest.mark.parametrize(
    "folder",
    [
        "",
        "good.txt",
        "good.txt/run",
        "theirs",
        "theirs/../theirs",
        ".",
        "..",
        "/",
        "/dev/null",
        "/dev/null/run",
        "loop",
        "loop/run",
        "nowhere",
        "a\0b",
        "a" * 300,
        "/proc",
    ],
)
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["", "overwrite"])
def test_a_folder_that_is_not_for_a_run_is_refused(folder: str, overwrite: list[str], sandbox: Path):
    for link, target in {"loop": "loop", "nowhere": "theirs/none"}.items():
        if not os.path.lexists(link):
            Path(link).symlink_to(target)
    complaint(["train", "small.yaml", "--steps", "0", "--output-dir", folder, *overwrite], sandbox)


@pytest.mark.parametrize(
    "name",
    ["metrics.jsonl", "config.yaml", "samples", "samples/step-000000.png", "README.md", ".weights", "checkpoint-0"],
)
def test_a_run_that_a_link_leads_out_of_is_not_gone_on_with(name: str, copy: Path, sandbox: Path):
    inside, outside = copy / name, sandbox / "theirs" / f"{copy.name}-moved"
    if inside.exists():
        inside.rename(outside)
    inside.symlink_to(outside)
    assert "outside" in complaint(["train", "--resume", "latest", "--output-dir", str(copy), "--steps", "2"], sandbox)


def test_overwriting_a_run_follows_no_link(copy: Path, sandbox: Path):
    shutil.rmtree(copy / "samples")
    (copy / "samples").symlink_to(sandbox / "theirs")
    (copy / "report.html").unlink()
    (copy / "report.html").symlink_to(sandbox / "theirs" / "notes.txt")
    theirs = everything(sandbox / "theirs")
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["train", "small.yaml", "--steps", "0", "--output-dir", str(copy), "--overwrite"]) == 0
    assert everything(sandbox / "theirs") == theirs
    assert (copy / "samples").is_dir() and not (copy / "samples").is_symlink()


# ---------------------------------------------------------------- checkpoints


def a_copy() -> Path:
    """A run of its own, as the small one has left it."""
    folder = Path(f"copy-{next(COPIES)}")
    shutil.copytree("run", folder)
    return folder


@pytest.fixture
def copy(sandbox: Path) -> Iterator[Path]:
    folder = a_copy()
    yield folder
    shutil.rmtree(folder)


def resumed(run: Path) -> list[str]:
    return ["train", "--resume", f"{run}/checkpoint-1", "--steps", "2"]


def consistent(checkpoint: Path) -> None:
    """Let the manifest say that all files are as they were written."""
    files = sorted(file for file in checkpoint.iterdir() if file.name != "manifest.json")
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    (checkpoint / "manifest.json").write_text(json.dumps(digests))


FILES = ("weights", "optimizer", "average", "behaviour", "memory")


@generated("checkpoints")
@given(
    st.sampled_from([*(f"{name}.safetensors" for name in FILES), "state.json", "manifest.json"]),
    st.sampled_from(["cut", "flipped", "replaced", "emptied", "gone", "folder", "link"]),
    st.integers(0, 10**9),
    st.binary(min_size=1, max_size=50),
)
def test_a_file_that_is_not_as_it_was_written_is_refused(sandbox: Path, name: str, how: str, at: int, junk: bytes):
    run = a_copy()
    file = run / "checkpoint-1" / name
    content = bytearray(file.read_bytes())
    place = at % len(content)
    match how:
        case "cut":
            file.write_bytes(content[:place])
        case "flipped":
            content[place] ^= 1 << at % 8
            file.write_bytes(content)
        case "replaced":
            file.write_bytes(content[:place] + b"\xff" + junk)
        case "emptied":
            file.write_bytes(b"")
        case _:
            file.unlink()
            if how == "folder":
                file.mkdir()
            elif how == "link":
                file.symlink_to(sandbox / "theirs" / "notes.txt")
    assert "checkpoint" in complaint(resumed(run), sandbox)
    shutil.rmtree(run)


def change_tensors(change: Any) -> Any:
    def damage(file: Path) -> None:
        tensors = load_file(file)
        save_file(change(tensors), file)

    return damage


def at_first(value: Any) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = max(tensors, key=lambda name: (tensors[name].dim() == 2 and tensors[name].is_floating_point(), name))
        return tensors | {name: value(tensors[name])}

    return change_tensors(change)


TENSORS = {
    "not a number": at_first(lambda tensor: tensor * float("nan")),
    "infinite": at_first(lambda tensor: tensor + float("inf")),
    "longer": at_first(lambda tensor: torch.cat([tensor, tensor])),
    "a number alone": at_first(lambda tensor: tensor.flatten()[0].clone()),
    "in half": at_first(lambda tensor: tensor.half()),
    "whole numbers": at_first(lambda tensor: tensor.long()),
    "none": change_tensors(lambda tensors: {}),
    "one less": change_tensors(lambda tensors: dict(sorted(tensors.items())[1:])),
    "one more": change_tensors(lambda tensors: tensors | {"more": torch.zeros(2)}),
    "renamed": change_tensors(lambda tensors: {f"../{name}": tensor for name, tensor in tensors.items()}),
    "no tensors": lambda file: file.write_bytes(b"\xff" * 64),
    "a header without an end": lambda file: file.write_bytes((2**40).to_bytes(8, "little") + b"{}"),
    "empty": lambda file: file.write_bytes(b""),
}


FIT = {"memory": {"one more", "in half", "whole numbers"}, "optimizer": {"none"}}  # what a run might have written
ALIKE = {"average": {"not a number", "longer", "one less"}, "behaviour": {"infinite", "in half", "one more"}}


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for name in FILES for damage in sorted(ALIKE.get(name, set(TENSORS)) - FIT.get(name, set()))],
)
def test_tensors_that_are_no_run_s_are_refused_though_the_manifest_agrees(
    name: str, damage: str, copy: Path, sandbox: Path
):
    checkpoint = copy / "checkpoint-1"
    TENSORS[damage](checkpoint / f"{name}.safetensors")
    consistent(checkpoint)
    assert "checkpoint" in complaint(resumed(copy), sandbox)


STATES = {
    "no object": [],
    "empty": {},
    **{f"no {name}": {name: ...} for name in ("step", "forwards", "seconds", "remembers", "average_steps")},
    **{f"step {value!r:.20}": {"step": value} for value in (0, 2, -1, "1", 1.0, True, None, [1], 10**30)},
    **{f"forwards {value!r:.20}": {"forwards": value} for value in (-1, "1", None, {}, 1.5)},
    **{f"seconds {value!r}": {"seconds": value} for value in (-1.0, float("nan"), float("inf"), "1", None)},
    **{f"average_steps {value!r}": {"average_steps": value} for value in (-1, "1", None, 0.5)},
    **{f"remembers {value!r}": {"remembers": value} for value in (3, None, [])},
}


@pytest.mark.parametrize("change", STATES.values(), ids=STATES)
def test_counters_that_are_no_run_s_are_refused_though_the_manifest_agrees(change: Any, copy: Path, sandbox: Path):
    file = copy / "checkpoint-1" / "state.json"
    state = json.loads(file.read_text())
    if change:
        state = {name: value for name, value in (state | change).items() if value is not ...}
    file.write_text(json.dumps(state if change else change))
    consistent(copy / "checkpoint-1")
    assert "checkpoint" in complaint(resumed(copy), sandbox)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b"null",
        b'{"weights.safetensors": 3}',
        b"[" * 10**5,
        b'{"a": ' * 2000,
        b'{"a": ' + b"9" * 10**5 + b"}",
        b"\xff\xfe",
        b"{" + b", ".join(b'"%d": ""' % i for i in range(10**5)) + b"}",
        b'{"/etc/hostname": ""}',
        b'{"": ""}',
        b'{".": ""}',
        b'{"a\\u0000b": ""}',
    ],
    ids=range(14),
)
def test_a_manifest_that_is_none_is_refused(content: bytes, copy: Path, sandbox: Path):
    (copy / "checkpoint-1" / "manifest.json").write_bytes(content)
    assert "checkpoint" in complaint(resumed(copy), sandbox)


@pytest.mark.parametrize(
    "name", ["../../theirs/notes.txt", "{theirs}/notes.txt", "../checkpoint-1/../../theirs/notes.txt"]
)
def test_a_manifest_makes_nobody_read_elsewhere(name: str, copy: Path, sandbox: Path):
    theirs = sandbox / "theirs" / "notes.txt"
    file = copy / "checkpoint-1" / "manifest.json"
    digest = hashlib.sha256(theirs.read_bytes()).hexdigest()
    file.write_text(json.dumps(json.loads(file.read_text()) | {name.format(theirs=theirs.parent): digest}))
    assert "checkpoint" in complaint(resumed(copy), sandbox)
    assert not [path for path in WATCH.read if Path(path).resolve() == theirs]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"steps: 1\n",
        b"\xff",
        b"- 1\n",
        b"steps: x\n",
        b"steps: [1\n",
        b"!!python/object/apply:os.system ['touch executed']\n",
        "half",
        "folder",
        "gone",
    ],
)
def test_a_run_whose_config_is_damaged_is_not_gone_on_with(content: Any, copy: Path, sandbox: Path):
    file = copy / "config.yaml"
    whole = file.read_bytes()
    match content:
        case "half":
            file.write_bytes(whole[: len(whole) // 2])
        case "folder" | "gone":
            file.unlink()
            if content == "folder":
                file.mkdir()
        case _:
            file.write_bytes(content)
    complaint(resumed(copy), sandbox)


METRICS = [
    *(b"", b"[]", b"3", b"null", b"\xff", b"\0", b"[" * 10**5, b'{"seconds": 1}', b'{"step": ' + b"9" * 5000 + b"}"),
    *(b'{"step": "0"}', b'{"step": true}', b'{"step": null}', b'{"step": 0.0}'),
    *(b'{"step": 0, "eval/reward_mean": "much"}', b'{"step": 0, "eval/reward_mean": null}'),
    *(b'{"step": 1, "reward/mean": []}', b'{"step": 1, "forwards": "many"}', b'{"step": 1, "rows": {}}'),
    *(b'{"step": 1, "prompts": 3}', b'{"step": 1, "prompts": [3]}', b'{"step": 1, "allocation": ["a"]}'),
    *(b'{"step": 1, "rollouts": null}', b'{"step": 1, "entropy": [[1]]}'),
    *(b'{"step": 1, "reward_troubles": [{}]}', b'{"step": 1, "reward_troubles": 7}'),
]


@pytest.mark.parametrize("line", METRICS, ids=range(len(METRICS)))
@pytest.mark.parametrize("place", [0, 1])
def test_a_run_whose_metrics_are_damaged_is_not_gone_on_with(line: bytes, place: int, copy: Path, sandbox: Path):
    lines = (copy / "metrics.jsonl").read_bytes().splitlines()
    lines[place] = line
    (copy / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    assert "metrics.jsonl" in complaint(resumed(copy), sandbox)


@pytest.mark.parametrize(
    "words",
    [
        ["run"],
        ["run/checkpoint-0"],
        ["run/checkpoint-2"],
        ["run/samples"],
        ["theirs"],
        ["/"],
        ["."],
        ["a\0b"],
        ["a" * 5000],
        ["loop"],
        ["\udcff"],
        ["linked/checkpoint-1", "--output-dir", "theirs"],
        ["run/checkpoint-1", "--output-dir", "theirs"],
        ["run/checkpoint-1", "--steps", "0"],
        ["run/checkpoint-1", "--sampler.steps", "4"],
        ["run/checkpoint-1", "--seed", "7"],
        ["run/checkpoint-1", "--model.lora.rank", "2"],
        ["run/checkpoint-1", "--model.train", "full"],
        ["run/checkpoint-1", "--optimizer.kind", "adamw_8bit"],
        ["run/checkpoint-1", "--overwrite"],
        ["latest", "--output-dir", "theirs"],
        ["latest", "--output-dir", "/dev/null"],
        ["latest", "--output-dir", "a\0b"],
        ["latest", "--output-dir", "loop"],
    ],
    ids=lambda words: " ".join(words)[:60].encode("unicode_escape").decode(),
)
def test_a_checkpoint_of_nothing_or_of_another_run_is_refused(words: list[str], sandbox: Path):
    if not os.path.lexists("linked"):
        Path("linked").symlink_to("run")
    if not os.path.lexists("loop"):
        Path("loop").symlink_to("loop")
    complaint(["train", "--resume", *words], sandbox)


def test_there_are_as_many_as_are_promised():
    assert sum(EXAMPLES.values()) + len(BAD_RECIPES) + len(BAD_PROMPTS) >= 400
