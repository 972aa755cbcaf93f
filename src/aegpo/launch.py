"""`aegpo train --processes N`: as many processes of the same command on this machine, which stand or fall together.

Signals go to all of them, so each finishes its step; torchrun would end them after half a minute.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from threading import Thread
from types import FrameType

LIFELINE = "AEGPO_LIFELINE"  # the variable that tells a process the file to watch
GRACE = 10.0  # seconds that processes have to end by themselves once one of them has failed


def launch(words: Sequence[str], processes: int, last_words: Callable[[], str] = lambda: "stopped") -> int:
    """Run `aegpo WORDS` in so many processes that know each other, and wait.

    Args:
        words: the command and its arguments, without `--processes`.
        processes: how many.
        last_words: what is said where a signal ended one of them, which could say nothing.

    Returns:
        0 if all ended well; 128 and the signal's number if one ended a process; else the exit code of one that failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    alike = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    alike |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    alike |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    command = [sys.executable, "-m", "aegpo.cli", *words]
    theirs, ours = os.pipe()  # the system closes it when this process ends, however it does
    alike |= {LIFELINE: str(theirs)}
    started: list[subprocess.Popen[bytes]] = []

    def hand_on(number: int, _: FrameType | None) -> None:
        for process in started:
            process.send_signal(number)

    heard = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, hand_on) for number in heard}
    try:
        for rank in range(processes):
            own = os.environ | alike | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(subprocess.Popen(command, env=own, start_new_session=True, pass_fds=[theirs]))
        os.close(theirs)
        return _wait(started, last_words)
    finally:
        for process in started:
            process.kill()
            process.wait()
        os.close(ours)
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_launcher() -> None:
    """In a process that `launch` started: end when that one does, so that none is left that nobody knows of."""
    line = os.environ.pop(LIFELINE, None)
    if line is None:
        return

    def watch() -> None:
        os.read(int(line), 1)
        os._exit(1)

    Thread(target=watch, name="launcher", daemon=True).start()


def _wait(started: Sequence[subprocess.Popen[bytes]], last_words: Callable[[], str]) -> int:
    """Wait for all, or until one fails and the others had time to say why."""
    failed, since = 0, 0.0
    while True:
        codes = [process.poll() for process in started]
        wrong = sorted(code for code in codes if code)  # a signal's is below 0, and others may have failed for its sake
        if wrong and not failed:
            failed, since = (128 - wrong[0] if wrong[0] < 0 else wrong[0]), time.monotonic()
            if wrong[0] < 0:
                ended = f"process {codes.index(wrong[0])} was ended by signal {-wrong[0]}"
                print(f"aegpo: {ended}: {last_words()}", file=sys.stderr)
        if None not in codes or (failed and time.monotonic() - since > GRACE):
            return failed
        time.sleep(0.05)
