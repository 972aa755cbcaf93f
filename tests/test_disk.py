"""A disk that takes no more, a folder that may not be written to, and two runs in one folder: all real."""

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from aegpo import build, checkpoint, disk, world
from aegpo.cli import main
from aegpo.config import dump_yaml, load_yaml, resolve
from aegpo.report import read_metrics

SMALL = {
    "algorithm": "flow-grpo",
    "steps": 3,
    "prompts_per_step": 2,
    "rollouts_per_step": 6,
    "sampler": {"steps": 3},
    "model": {"lora": {"rank": 4}},
    "eval_images": 1,
    "eval_every": 0,
}
AT_STEP_2 = """
import os
calls = []
def score(images, prompts):
    calls.append(1)
    if len(calls) == 5:  # after two trials, an evaluation and step 1
        {}
    return images.mean((1, 2, 3)) / 255
"""


@pytest.fixture
def words(tmp_path):
    """The command of a small run, whose reward does something in its second step."""

    def written(run="run", does="pass"):
        (tmp_path / f"{run}.py").write_text(AT_STEP_2.format(does))
        (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in world.held_out()[::36]))
        settings = {"reward": f"{tmp_path / run}.py:score", "prompts": {"eval": str(tmp_path / "few.jsonl")}}
        (tmp_path / f"{run}.yaml").write_text(json.dumps(SMALL | settings))
        return ["train", str(tmp_path / f"{run}.yaml"), "--output-dir", str(tmp_path / run)]

    return written


@contextmanager
def largest_file(size):
    """No file grows beyond this: the write that would is refused, as on a full disk, in its midst."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def numbers(run):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read_metrics(run)]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "file"
    disk.write(file, b"before\n")
    disk.append(file, "and more")
    with largest_file(100):
        for attempt in (disk.write, lambda file, content: disk.append(file, content.decode())):
            with pytest.raises(OSError, match="File too large"):
                attempt(file, b"x" * 200)
            assert contents(tmp_path) == {Path("file"): b"before\nand more\n"}
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / ".checkpoint-1.old").mkdir()  # of a deletion that was killed
    disk.delete(tmp_path / "checkpoint-1")
    assert list(contents(tmp_path)) == [Path("file")] and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_costs_no_checkpoint_that_was_there(words, tmp_path, capsys):
    """The optimizer's moments of the first step are twice as large as weights, and find no room."""
    assert main(words("whole")) == 0
    size = (tmp_path / "whole" / "checkpoint-3" / "weights.safetensors").stat().st_size
    command, run = words(), tmp_path / "run"
    capsys.readouterr()
    with largest_file(size * 3 // 2):
        assert main(command) == 2
    resume = f"aegpo train --resume latest --output-dir {run}"
    said = f"output_dir: {run} cannot be written to: File too large; to go on from the newest checkpoint: {resume}"
    assert capsys.readouterr().err == f"aegpo: {said}\n"
    assert checkpoint.newest_whole(run) == (run / "checkpoint-0", [])
    assert not list(run.glob(".[!l]*"))  # but the lock
    assert main(resume.split()[1:]) == 0
    assert numbers(run) == numbers(tmp_path / "whole")
    assert contents(run / "checkpoint-3").keys() == contents(tmp_path / "whole" / "checkpoint-3").keys()


def test_a_line_of_metrics_that_finds_no_room_ends_the_run_with_its_checkpoints(words, tmp_path, capsys):
    """/dev/full is a disk without room."""
    metrics, aside = tmp_path / "run" / "metrics.jsonl", tmp_path / "metrics.jsonl"
    move = f"os.rename('{metrics}', '{aside}'); os.symlink('/dev/full', '{metrics}')"
    assert main(words(does=move)) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"aegpo: output_dir: {tmp_path}/run cannot be written to: No space left on device; to go on")
    assert said.count("\n") == 1
    assert checkpoint.newest_whole(tmp_path / "run") == (tmp_path / "run" / "checkpoint-1", [])


def may_not_override_modes():
    """Take from a root the right to write wherever it likes, as nobody else has it."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE


def test_a_folder_that_may_not_be_written_to_is_said_at_once_or_once_it_may_not(words, tmp_path):
    run, closed = tmp_path / "run", tmp_path / "closed"
    closed.mkdir()
    command = words(does=f"os.chmod('{run}', 0o500)")
    (closed / "config.yaml").write_text(dump_yaml(resolve(load_yaml(tmp_path / "run.yaml"))))
    closed.chmod(0o500)
    calls = [[*command[:3], str(closed / "run")], ["train", "--resume", "latest", "--output-dir", str(closed)], command]
    script = f"from aegpo.cli import main\nfor words in {calls}: print(main(words))"
    done = subprocess.run(
        [sys.executable, "-c", script], preexec_fn=may_not_override_modes, capture_output=True, text=True
    )
    run.chmod(0o700)
    refused = f"aegpo: output_dir: {closed} may not be written to; make it writable, or give another --output-dir"
    resume = f"aegpo train --resume latest --output-dir {run}"
    denied = f"aegpo: output_dir: {run} cannot be written to: Permission denied"
    assert done.stderr.splitlines() == [
        *(refused, refused),
        f"{denied}; to go on from the newest checkpoint: {resume}",
    ]
    assert [line for line in done.stdout.splitlines() if line in "012"] == ["2", "2", "2"]
    assert checkpoint.newest_whole(run) == (run / "checkpoint-1", [])


@contextmanager
def held(folder):
    """Another process has the folder, until it is killed."""
    script = (
        f"import time; from pathlib import Path; from aegpo import disk\nwith disk.alone_in(Path({str(folder)!r})):"
    )
    command = [sys.executable, "-c", f"{script}\n print('held', flush=True); time.sleep(1000)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield
        finally:
            process.send_signal(signal.SIGKILL)


def test_one_run_in_a_folder_until_it_ends_or_is_killed(words, tmp_path, capsys, monkeypatch):
    command, run = [*words(), "--steps", "0"], tmp_path / "run"
    busy = f"aegpo: output_dir: another aegpo train is at work in {run}; let it end, or give another --output-dir\n"
    run.mkdir()
    with held(run):
        assert main(command) == 2
        assert capsys.readouterr().err == busy
        assert os.listdir(run) == [disk.LOCK]
    assert main(command) == 0
    monkeypatch.delattr(build, "load")  # what follows is said before the model is loaded
    before = contents(run)
    with held(run):
        for more in (["--resume", "latest"], ["--overwrite"]):
            capsys.readouterr()
            assert main([*command, *more]) == 2
            assert capsys.readouterr().err == busy
    assert contents(run) == before
