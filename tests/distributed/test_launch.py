"""Processes that are started by the command line, by accelerate and by torchrun, and how they end together."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aegpo import build, launch, world
from aegpo.config import resolve
from aegpo.distributed import ALONE, shares
from aegpo.train import deal

SMALL = {
    "algorithm": "aegpo",
    "prompts_per_step": 2,
    "rollouts_per_step": 10,
    "allocation": {"low": 3, "high": 7},
    "sampler": {"steps": 4, "solver": "euler", "compress": 1.0},
    "exploration": {"rule": "entropy_peaks", "k": 2},
    "optimizer": {"micro_batch": 8},
    "model": {"lora": {"rank": 4}},
    "eval_every": 0,
    "eval_images": 1,
}
ONE_SIDED = """
import os
def score(images, prompts):
    if len(images) > 2 and os.environ["RANK"] == "1":
        raise ValueError("the second process does not like them")
    return images.mean((1, 2, 3)) / 255
"""


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe, and gives the words of a run of it."""
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in world.held_out()[::72]))
    (tmp_path / "one_sided.py").write_text(ONE_SIDED)

    def words(**changes):
        own = {"prompts": {"eval": str(tmp_path / "eval.jsonl")}, "output_dir": str(tmp_path / "run")}
        (tmp_path / "own.yaml").write_text(json.dumps(SMALL | own | changes))
        return ["train", str(tmp_path / "own.yaml")]

    return words


def begin(*words):
    command = [sys.executable, "-m", *words]
    alike = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=alike)


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_all_finish_their_step_when_one_of_them_is_asked_to_stop_and_one_alone_goes_on(recipe, tmp_path):
    process = begin("aegpo.cli", *recipe(steps=500), "--processes", "2")
    while not (tmp_path / "run" / "checkpoint-1").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    ranked(process.pid)[1].send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    done = steps(tmp_path / "run")
    assert done == list(range(len(done))) and 2 <= len(done) < 500
    assert f"checkpoint-{done[-1]}" in [folder.name for folder in (tmp_path / "run").glob("checkpoint-*")]
    assert out.count("--resume latest") == 1
    assert out.count("held-out reward") == 1  # one process speaks
    build.fit(resolve(json.loads((tmp_path / "own.yaml").read_text()), {"steps": done[-1] + 1}), resume="latest")
    assert steps(tmp_path / "run") == [*done, done[-1] + 1]


def test_what_is_wrong_in_one_process_ends_all_in_one_line(recipe, tmp_path):
    reward = f"{tmp_path / 'one_sided.py'}:score"
    process = begin("aegpo.cli", *recipe(reward=reward), "--processes", "2")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    [line] = [line for line in err.splitlines() if line.startswith("aegpo: ")]
    assert "the second process does not like them" in line
    assert "Traceback" not in err


def ranked(launcher):
    """The two processes that a launcher has started, in the order of their ranks, once it has."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        found = {}
        for child in psutil.Process(launcher).children():
            with suppress(psutil.Error):
                found[child.environ().get("RANK")] = child
        if {"0", "1"} <= found.keys():
            return [found["0"], found["1"]]
        time.sleep(0.05)
    raise TimeoutError


@contextmanager
def meanwhile(act):
    """Have something done to the processes that this one starts, which are given."""
    found = []

    def watch():
        found.extend(ranked(os.getpid()))
        act(found)

    thread = Thread(target=watch, daemon=True)
    thread.start()
    yield found
    thread.join(10)
    assert len(found) == 2


def test_one_that_is_killed_ends_the_others_and_is_named(recipe, capfd, monkeypatch):
    monkeypatch.setattr(launch, "GRACE", 0.5)
    with meanwhile(lambda processes: processes[1].kill()) as started:
        assert launch.launch(recipe(), 2, lambda: "last words") == 128 + signal.SIGKILL
    assert capfd.readouterr().err == "aegpo: process 1 was ended by signal 9: last words\n"
    assert not any(map(psutil.Process.is_running, started))


def test_a_signal_to_the_launcher_goes_to_all(recipe, monkeypatch):
    """Before they train, it ends them at once; were one left, the launcher would wait for it."""
    monkeypatch.setattr(launch, "GRACE", 60)
    before = signal.getsignal(signal.SIGTERM)

    def end(_):
        time.sleep(0.2)  # they are there; so it knows
        os.kill(os.getpid(), signal.SIGTERM)

    began = time.monotonic()
    with meanwhile(end) as started:
        assert launch.launch(recipe(steps=1000), 2) == 128 + signal.SIGTERM
    assert time.monotonic() - began < 50
    assert not any(map(psutil.Process.is_running, started))
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_that_is_ignored_stays_ignored(recipe):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    ignored = []

    def look(processes):
        for process in processes:
            status = Path(f"/proc/{process.pid}/status").read_text()
            mask = int(status.partition("SigIgn:")[2].split()[0], 16)
            ignored.append(bool(mask >> signal.SIGINT - 1 & 1))
            process.kill()

    try:
        with meanwhile(look):
            assert launch.launch(recipe(), 2) == 128 + signal.SIGKILL
        assert ignored == [True, True]
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_one_that_is_killed_while_they_train_is_named_and_how_to_go_on_is_said(recipe, tmp_path):
    process = begin("aegpo.cli", *recipe(steps=500), "--processes", "2")
    while not (tmp_path / "run" / "checkpoint-1").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    ranked(process.pid)[1].kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    [line] = [line for line in err.splitlines() if "kernels" not in line and line.strip()]
    resume = f"aegpo train --processes 2 --resume latest --output-dir {tmp_path}/run"
    assert line == f"aegpo: process 1 was ended by signal 9: stopped; to go on: {resume}"


def test_none_outlives_a_launcher_that_is_killed(recipe):
    process = begin("aegpo.cli", *recipe(), "--processes", "2")
    started, until = ranked(process.pid), time.monotonic() + 30
    while any(child.num_threads() == 1 for child in started):  # none that waits for the launcher's end as yet
        assert time.monotonic() < until
        time.sleep(0.05)
    process.kill()
    assert not psutil.wait_procs(started, timeout=10)[1]
    process.communicate()


def test_accelerate_serves_as_well(recipe, tmp_path):
    """As does torchrun, with which test_processes.py starts its own."""
    launcher = "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"
    process = begin(*launcher, "-m", "aegpo.cli", *recipe(steps=1))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert steps(tmp_path / "run") == [0, 1]
    assert out.count("report:") == 1
    assert json.loads((tmp_path / "run" / "env.json").read_text())["processes"] == 2


def test_it_is_said_where_sharding_is_not_what_accelerate_was_told(recipe, monkeypatch):
    recipe(steps=1)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"model\.shard: accelerate was told to shard"):
        build.fit(resolve(SMALL))


# ---------------------------------------------------------------- who does what

COSTS = st.lists(st.integers(0, 30), min_size=1, max_size=40)


@given(COSTS, st.integers(1, 9))
def test_shares_are_all_of_the_work_in_order_and_none_is_idle(cost, size):
    parts = shares(cost, size)
    assert [i for part in parts for i in part] == list(range(len(cost)))
    assert len(parts) == size
    assert sum(map(bool, map(len, parts))) == min(size, len(cost))


@given(COSTS, st.integers(1, 9), st.data())
def test_groups_are_not_cut(cost, size, data):
    group = sorted(data.draw(st.lists(st.integers(0, 5), min_size=len(cost), max_size=len(cost))))
    parts = shares(cost, size, group)
    assert [i for part in parts for i in part] == list(range(len(cost)))
    held = [{group[i] for i in part} for part in parts]
    assert sum(map(len, held)) == len(set(group))


def test_shares_by_hand():
    assert shares([1] * 7, 2) == [range(3), range(3, 7)]
    assert shares([4, 1, 1, 1, 1], 2) == [range(1), range(1, 5)]
    assert shares([3, 3, 3, 3], 3) == [range(1), range(1, 3), range(3, 4)]
    assert shares([1] * 6, 2, group=[0, 0, 0, 0, 1, 1]) == [range(4), range(4, 6)]
    assert shares([5], 3) == [range(1), range(1, 1), range(1, 1)]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(1, 4), st.integers(1, 5), st.integers(1, 8))
def test_each_update_takes_the_same_rows_whatever_the_number_of_processes(units, updates, size, most):
    unit = torch.tensor(units)
    one = deal(unit, updates, most, [1, 2, 3])
    several = [deal(unit, updates, most, [1, 2, 3], Place(rank, size)) for rank in range(size)]
    assert all(len(dealt) == len(one) for dealt in several)
    for at, whole in enumerate(one):
        together = [row for dealt in several for micro in dealt[at] for row in micro.tolist()]
        assert sorted(together) == sorted(row for micro in whole for row in micro.tolist())
    held = [{units[row] for micros in dealt for micro in micros for row in micro.tolist()} for dealt in several]
    assert sum(map(len, held)) == len(set(units))  # a unit is seen whole, by one process


class Place:
    """A process's place among others, where nothing is to be told."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size


def test_rows_are_found_by_their_numbers():
    rows, ids = torch.tensor([[10.0], [20.0], [30.0]]), torch.tensor([7, 2, 5])
    [found] = ALONE.fetch(lambda places: [rows[places]], ids, torch.tensor([5, 7, 2]))
    assert found.flatten().tolist() == [30, 10, 20]
