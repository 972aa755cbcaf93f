"""SIGINT (Ctrl-C) and SIGTERM while a run trains: the first ends it after its step, a second at once."""

import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock, Thread, current_thread, main_thread
from types import TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
BEGUN = "AEGPO_BEGUN"  # the variable that tells a run's processes the command that began it, as far as it says where


def how_to_resume(run: Path) -> str:
    """The command that goes on from a run's newest checkpoint, where it was begun."""
    return f"{os.environ.get(BEGUN, f'{_typed()} train')} --resume latest --output-dir {shlex.quote(str(run))}"


@contextmanager
def begun(options: Mapping[str, object]) -> Iterator[str]:
    """Within it, commands to resume a run have these options, those that have a value; the command so far is given."""
    said = "".join(f" {name} {shlex.quote(str(value))}" for name, value in options.items() if value)
    before, os.environ[BEGUN] = os.environ.get(BEGUN), f"{_typed()} train{said}"
    try:
        yield os.environ[BEGUN]
    finally:
        os.environ.pop(BEGUN)
        os.environ |= {BEGUN: before} if before else {}


def _typed() -> str:
    """The name of the command, as a shell finds it."""
    return sys.argv[0] if Path(sys.argv[0]).name == "aegpo" and shutil.which("aegpo") is None else "aegpo"


class Stop:
    """A context manager that meets the two signals; outside of the main thread, where Python gives none, it is idle.

    The second signal ends the process from a thread of its own, which is there also while the main thread waits for a
    reward that hangs, or for a device. A signal that was ignored, as in a job in the background, stays ignored.

    Args:
        last_words: what is said where a second signal ends the process.
        quiet: whether to say nothing, as another process of the run does.

    Attributes:
        asked: whether the run is to end after the step that it is at.
    """

    def __init__(self, last_words: Callable[[], str] = lambda: "stopped", quiet: bool = False) -> None:
        self.asked = False
        self.last_words, self.quiet = last_words, quiet
        self._before: dict[int, Any] = {}
        self._untold = Lock()

    def __enter__(self) -> Self:
        if current_thread() is main_thread():
            came, self._came = os.pipe()
            os.set_blocking(self._came, False)
            self._woke = signal.set_wakeup_fd(self._came, warn_on_full_buffer=False)
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._ask)
            self._watcher = Thread(target=self._watch, args=(came,), name="signals", daemon=True)
            self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if current_thread() is main_thread():
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._woke)
            os.close(self._came)  # which ends the thread
            self._watcher.join()

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True
        self._tell()

    def _watch(self, came: int) -> None:
        """Count what comes: the number of each signal is written here as soon as it does, whatever Python is at."""
        count = 0
        while number := os.read(came, 1):
            if number[0] not in self._before:
                continue
            count += 1
            if count == 1:
                self._tell()
                continue
            try:
                if os.isatty(1):
                    os.write(1, b"\x1b[?25h")  # shows the cursor, which bars hide
                self._say(self.last_words)
            finally:
                os._exit(128 + number[0])
        os.close(came)

    def _tell(self) -> None:
        """Say once that a signal came: the thread does while Python is at something else, or the handler."""
        if self._untold.acquire(blocking=False):
            self._say(lambda: "stopping after this step; once more stops at once")

    def _say(self, words: Callable[[], str]) -> None:
        if not self.quiet:
            with suppress(OSError):  # where nobody reads it
                os.write(2, f"aegpo: {words()}\n".encode())
