"""Runs on a real local Ray: as on one process, through lost workers and lost actors, and copied elsewhere."""

import json
import os
import shutil
import signal
import socket
import sys

import numpy as np
import pytest
import ray

from aegpo import world
from aegpo.cli import main
from aegpo.config import resolve
from aegpo.disk import LOCK
from aegpo.folder import is_a_runs
from aegpo.notes import FRUITLESS, Notes
from aegpo.rewards import actors
from aegpo.rewards.panel import load_panel
from aegpo.storage import Storage
from aegpo.types import Prompt
from tests.small import SMALL

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray has several of its own
WORKERS = 2


@pytest.fixture(scope="session")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        ray.init(
            address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=80_000_000
        )
        yield
        ray.shutdown()


@pytest.fixture
def recipe(tmp_path):
    rows = world.held_out()[::24]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "small.json").write_text(json.dumps(SMALL | {"prompts": {"eval": str(tmp_path / "few.jsonl")}}))
    return tmp_path / "small.json"


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def reward(folder, name, then="pass"):
    """A reward that judges by brightness, and in step 2 once does something else."""
    mark = folder / f"{name}.mark"
    (folder / f"{name}.py").write_text(f"""
import os, pathlib, shutil, signal
mark, run = pathlib.Path({str(mark)!r}), pathlib.Path({str(folder / "run")!r})
def score(images, prompts):
    if (run / "checkpoint-1").exists() and not mark.exists():
        mark.touch()
        {then}
    return images.mean((1, 2, 3)) / 255
""")
    return f"{folder / name}.py:score"


def test_a_worker_killed_in_a_step_and_its_folder_lost_the_run_ends_by_itself_as_one_process_does(
    cluster, recipe, tmp_path, capsys
):
    kill = reward(tmp_path, "kill", "shutil.rmtree(run); os.kill(os.getpid(), signal.SIGKILL)")
    run, plain, stored = tmp_path / "run", tmp_path / "plain", tmp_path / "stored"
    assert main(["train", str(recipe), "--reward", reward(tmp_path, "calm"), "--output-dir", str(plain)]) == 0
    capsys.readouterr()
    where = ["--cluster", "local", "--processes", str(WORKERS), "--storage", f"file://{stored}"]
    assert main(["train", str(recipe), "--reward", kill, "--output-dir", str(run), *where]) == 0
    printed = capsys.readouterr()
    assert (tmp_path / "kill.mark").exists()
    assert "a worker was lost" in printed.out
    assert f"going on from {run}/checkpoint-1" in printed.out
    assert printed.out.count("report:") == 1
    assert printed.err == ""
    undisturbed, disturbed = metrics(plain), metrics(run)
    assert [line["step"] for line in disturbed] == [0, 1, 2, 3]
    for line, other in zip(undisturbed, disturbed, strict=True):
        assert line.pop("prompts", 0) == other.pop("prompts", 0)
        assert line.keys() == other.keys()
        for key in line:
            assert other[key] == pytest.approx(line[key], abs=1e-5, rel=1e-5), key
    assert files(run) == files(stored)
    assert {path.name for path in tmp_path.iterdir()} >= {"run", "stored"}
    assert not list(tmp_path.glob(".*"))  # Ray Train's own record is gone


def files(folder):
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != LOCK]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_no_line_stands_twice_after_a_kill_and_what_a_user_got_wrong_ends_the_run_at_once(
    cluster, recipe, tmp_path, capsys
):
    (tmp_path / "wrong.py").write_text(f"""
import os, pathlib, signal
mark, lines = pathlib.Path({str(tmp_path / "mark")!r}), pathlib.Path({str(tmp_path / "run/metrics.jsonl")!r})
def score(images, prompts):
    if len(images) > 2 and lines.exists() and lines.read_text().count("\\n") == 2:  # no checkpoint since
        if mark.exists():
            raise ValueError("no such picture")
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return images.mean((1, 2, 3)) / 255
""")
    words = ["--reward", f"{tmp_path}/wrong.py:score", "--output-dir", str(tmp_path / "run"), "--save-every", "2"]
    assert main(["train", str(recipe), *words, "--cluster", "local"]) == 2
    printed = capsys.readouterr()
    assert printed.out.count("a worker was lost") == 1
    assert printed.err.startswith("aegpo: ")
    assert printed.err.count("\n") == 1
    assert "no such picture" in printed.err
    resume = f"--resume latest --output-dir {tmp_path}/run"
    assert printed.err.endswith(f"aegpo train --cluster local --processes 1 {resume}\n")
    assert [line["step"] for line in metrics(tmp_path / "run")] == [0, 1]


def test_a_signal_lets_the_workers_finish_their_step(cluster, recipe, tmp_path, capfd):
    signals = reward(tmp_path, "signals", f"os.kill({os.getpid()}, signal.SIGTERM)")
    before = signal.getsignal(signal.SIGTERM)
    stored = ["--cluster", "local", "--storage", f"file://{tmp_path}/stored"]
    words = ["train", str(recipe), "--reward", signals, "--output-dir", str(tmp_path / "run"), "--steps", "50", *stored]
    assert main(words) == 0
    printed = capfd.readouterr()
    done = metrics(tmp_path / "run")[-1]["step"]
    assert 2 <= done < 50
    assert printed.err == "aegpo: stopping after this step; once more stops at once\n"
    resume = f"aegpo train --cluster local --processes 1 --storage file://{tmp_path}/stored --resume latest"
    assert f"step {done} of 50: stopped; to go on: {resume} --output-dir {tmp_path}/run\n" in printed.out
    assert (tmp_path / "run" / f"checkpoint-{done}").exists()
    assert files(tmp_path / "run") == files(tmp_path / "stored")
    assert signal.getsignal(signal.SIGTERM) == before
    assert "AEGPO_BEGUN" not in os.environ


def test_a_run_that_fails_again_and_again_from_one_checkpoint_ends():
    notes = Notes(workers=2)
    assert notes.begin() == ("", -1, 0)
    for step in (0, 5):  # each time that it gets on, it may be lost again
        notes.save(step)
        for _ in range(FRUITLESS):
            assert notes.begin()[:2] == ("", step)
            notes.fail(0, "RuntimeError: out of memory", for_good=False)
    wrong, step, _ = notes.begin()
    assert (wrong, step) == ("the run failed 3 times after the checkpoint of step 5: RuntimeError: out of memory", 5)
    assert notes.begin()[0] == notes.wrong()[0] == wrong


def test_a_run_is_over_when_all_of_its_last_workers_are():
    notes = Notes(workers=2)
    notes.begin()
    notes.end(0)
    assert not notes.all_over()
    notes.begin()  # the other was lost
    notes.end(1)
    assert not notes.all_over()
    notes.fail(0, "no such file", for_good=True)
    assert notes.all_over()


def test_rewards_as_actors_say_the_same_and_come_back_when_killed(cluster):
    config = resolve({"reward": {"world": 1, "jpeg_size": 0.5}})
    judges = actors.start(config, 2)
    far = actors.ask(config, judges, actors.about(judges))
    near = load_panel(config)
    asked = [Prompt(id=i, text=row["prompt"], metadata=row) for i, row in enumerate(world.held_out()[:5])]
    far.try_out(asked, "here")
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    said, expected = far.judge(images, asked), near.judge(images, asked)
    np.testing.assert_array_equal(said.rewards, expected.rewards)
    np.testing.assert_array_equal(said.passed, expected.passed)
    assert [term[0].range for term in far.terms.values()] == [term[0].range for term in near.terms.values()]

    old = ray.get([actor.process.remote() for actor in judges])
    os.kill(old[0], signal.SIGKILL)
    np.testing.assert_array_equal(far.judge(images, asked).rewards, expected.rewards)
    new = ray.get([actor.process.remote() for actor in judges])
    assert new[0] != old[0] and new[1] == old[1]

    bad = [Prompt(id=0, text="an elephant", metadata={})]
    with pytest.raises(ValueError) as there:
        far.try_out(bad, "here")
    with pytest.raises(ValueError) as here:
        near.try_out(bad, "here")
    assert str(there.value) == str(here.value)


@pytest.mark.parametrize(
    "words, line",
    [
        (["--storage", "s3://bucket/run"], "--storage goes with --cluster"),
        (["--cluster", "somewhere"], "must be local, auto, HOST:PORT or ray://HOST:PORT, not 'somewhere'"),
        (["--cluster", "local", "--processes", "0"], "must be a whole number of at least 1"),
        (["--cluster", "local", "--storage", "memory://run"], "is the memory of one process"),
        (["--cluster", "local", "--storage", "nowhere://run"], "--storage: nowhere://run cannot be opened"),
        (
            ["--cluster", "local", "--processes", "3", "--reward-actors", "9"],
            "3 workers and 9 reward actors take a CPU",
        ),
        (["--cluster", "local", "--resume", "latest", "--storage", "file:///nowhere"], "holds no run"),
    ],
)
def test_options_that_cannot_be(cluster, recipe, tmp_path, capsys, words, line):
    given = [] if "--resume" in words else [str(recipe)]
    assert main(["train", *given, "--output-dir", str(tmp_path / "run"), *words]) == 2
    assert line in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_a_client_takes_is_said(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "grpc", None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        words = ["--output-dir", str(tmp_path / "run"), "--cluster", f"ray://127.0.0.1:{server.getsockname()[1]}"]
        assert main(["train", str(recipe), *words]) == 2
    assert "takes Ray's client: pip install 'ray[client]'" in capsys.readouterr().err


# ---------------------------------------------------------------- the copy


def a_run(folder, steps=(0, 2), seconds=1.5):
    """The files of a run, as far as a copy cares."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 0\n")
    lines = [json.dumps({"step": step, "seconds": seconds + step}) + "\n" for step in range(max(steps) + 1)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    for step in steps:
        (folder / "samples" / f"step-{step:06d}.png").write_text(str(step))
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}" / "weights.safetensors").write_text(f"weights {step} {seconds}")
        (folder / f"checkpoint-{step}" / "manifest.json").write_text(f"digests {step} {seconds}")
    return folder


@pytest.fixture(params=["memory", "file"])
def place(request, tmp_path):
    url = f"memory://{tmp_path}/place" if request.param == "memory" else f"file://{tmp_path}/place"
    yield Storage(url)
    Storage(url).fs.rm(Storage(url).root, recursive=True)


def test_a_copy_follows_the_run_and_is_brought_home(tmp_path, place):
    run, home = a_run(tmp_path / "run"), tmp_path / "home"
    place.fs.makedirs(place.root)
    place.fs.pipe_file(f"{place.root}/notes.txt", b"a user's own")
    for steps in ((0, 2), (2, 3), (2,), (2, 4)):  # one step more, then a course that is left, then another
        place.put(a_run(run, steps), is_a_runs)
        assert set(place.files()) == {*files(run), "notes.txt"}
        Storage(place.url).get(home)
        assert files(home) == files(run) | {"notes.txt": b"a user's own"}
    place.put(a_run(run, (0,), seconds=9.0), is_a_runs)  # another run is begun in its place
    with pytest.raises(ValueError, match="holds another run than"):
        place.get(home)


def test_a_copy_that_was_cut_short_anywhere_holds_what_can_be_gone_on_from(tmp_path, place, monkeypatch):
    run, home = tmp_path / "run", tmp_path / "home"
    place.put(a_run(run, (2, 3)), is_a_runs)
    send, left = Storage._send, []

    def short(self, file, name):
        if not left:
            raise ConnectionError
        left.pop()
        send(self, file, name)

    monkeypatch.setattr(Storage, "_send", short)
    for course in ((3, 4), (2, 3, 5), (2,)):
        a_run(run, course)
        for count in range(20):
            left[:] = range(count)
            try:
                Storage(place.url).put(run, is_a_runs)
            except ConnectionError:
                shutil.rmtree(home, ignore_errors=True)
                place.get(home)
                newest = max(home.glob("checkpoint-*"))
                step = int(newest.name.removeprefix("checkpoint-"))
                assert (newest / "weights.safetensors").read_text() == f"weights {step} 1.5"
                assert len(metrics(home)) > step
