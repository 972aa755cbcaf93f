"""The first signal ends a run after its step, as if it had been killed there; the second ends the process at once."""

import json
import os
import signal
import subprocess
import sys
import time
from threading import Thread

import pytest
from safetensors.torch import load_file

from aegpo import world
from aegpo.cli import main
from aegpo.report import read_metrics
from aegpo.stopping import Stop
from tests.small import SMALL

OWN = {
    "steps": 4,
    "optimizer": {"ema": 0.5, "ema_every": 1},
    "eval_every": 0,
    "save_every": 3,
}
HANDLED = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def ctrl_c_is_heard():
    """Though these tests may run in the background of a shell, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def words(tmp_path):
    """The command of a small run, whose reward does what `own` says when it is called for the fifth time."""

    def written(own, run):
        body = "import os, signal, time, asyncio\ncalls = []\n"
        body += f"{own}\n    return images.mean((1, 2, 3)) / 255\n"
        (tmp_path / f"{run}.py").write_text(body)
        rows = world.held_out()[::36]
        (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {"reward": f"{tmp_path / run}.py:score", "prompts": {"eval": str(tmp_path / "few.jsonl")}}
        (tmp_path / f"{run}.yaml").write_text(json.dumps(SMALL | OWN | settings))
        return ["train", str(tmp_path / f"{run}.yaml"), "--output-dir", str(tmp_path / run)]

    return written


def numbers(run):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read_metrics(run)]


def test_the_first_signal_ends_the_run_after_its_step_and_it_goes_on_from_there(words, tmp_path, capfd):
    """It comes while step 2 is judged: the calls before are two trials, an evaluation and step 1."""
    before = [signal.getsignal(one) for one in HANDLED]
    signals = "def score(images, prompts):\n    calls.append(1)\n"
    signals += "    if len(calls) == 5: os.kill(os.getpid(), signal.SIGINT)"
    run = tmp_path / "run"
    assert main(words(signals, "run")) == 0
    said = capfd.readouterr()
    assert said.err == "aegpo: stopping after this step; once more stops at once\n"
    resume = f"aegpo train --resume latest --output-dir {run}"
    assert said.out.endswith(f"report: {run}/report.html\nstep 2 of 4: stopped; to go on: {resume}\n")
    assert [signal.getsignal(one) for one in HANDLED] == before
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-0", "checkpoint-2"]
    assert [row["step"] for row in numbers(run)] == [0, 1, 2]
    saved = load_file(run / "checkpoint-2" / "average.safetensors")
    weights = load_file(run / "pytorch_lora_weights.safetensors")
    assert sorted(t.double().sum().item() for t in saved.values()) == pytest.approx(
        sorted(t.double().sum().item() for t in weights.values())
    )

    assert main(words("def score(images, prompts):", "whole")) == 0
    assert main(resume.split()[1:]) == 0
    assert "stopped" not in capfd.readouterr().out
    assert numbers(run) == numbers(tmp_path / "whole")
    for name in ("weights", "average", "optimizer", "memory"):
        one, other = (tmp_path / folder / "checkpoint-4" / f"{name}.safetensors" for folder in ("run", "whole"))
        assert one.read_bytes() == other.read_bytes(), name


def test_a_second_signal_ends_a_run_whose_reward_hangs(words, tmp_path):
    hangs = "async def score(images, prompts):\n    calls.append(1)\n"
    hangs += f"    if len(calls) == 4: open({str(tmp_path / 'hangs')!r}, 'w').close(); await asyncio.sleep(1000)"
    command = [sys.executable, "-m", "aegpo.cli", *words(hangs, "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for(process, (tmp_path / "hangs").exists)
        process.send_signal(signal.SIGTERM)
        assert process.stderr.readline() == "aegpo: stopping after this step; once more stops at once\n"
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=20)
        assert time.monotonic() - began < 2
    assert process.returncode == 143
    assert said == f"aegpo: stopped; to go on: aegpo train --resume latest --output-dir {tmp_path}/run\n"


def wait_for(process, holds):
    while not holds():
        assert process.poll() is None
        time.sleep(0.01)


BUSY = {  # what the main thread may be at
    "python": "while True: pass",
    "an answer": "from concurrent.futures import Future; Future().result()",
    "C": "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",
    "catching all": "while True:\n  try: time.sleep(1000)\n  except BaseException: pass",
}


@pytest.mark.parametrize("busy", BUSY)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_second_signal_ends_the_process_at_once_whatever_it_is_at(busy, number, code):
    script = "import signal, time\nfrom aegpo.stopping import Stop\n"
    script += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a background job may ignore
    body = BUSY[busy].replace("\n", "\n ")
    script += f"with Stop(lambda: 'last words'):\n print('begun', flush=True)\n {body}"
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.send_signal(number)
        assert process.stderr.readline() == "aegpo: stopping after this step; once more stops at once\n"
        process.send_signal(number)
        assert process.communicate(timeout=20)[1] == "aegpo: last words\n"
    assert process.returncode == code


def test_before_the_training_and_after_it_signals_are_as_they_were(capfd):
    with pytest.raises(KeyboardInterrupt), Stop():
        raise KeyboardInterrupt
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("ours"))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN and not stop.asked
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.asked and not seen
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == ["ours"]
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_run_in_another_thread_leaves_signals_alone():
    before, seen = [signal.getsignal(one) for one in HANDLED], []

    def work():
        with Stop() as stop:
            seen.append((stop.asked, [signal.getsignal(one) for one in HANDLED]))

    thread = Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
