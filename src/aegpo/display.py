"""Progress of a run: live bars on a terminal; elsewhere a plain line an evaluation, and one every half minute."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

QUIET = 30.0  # seconds without a line, at most, where there are no bars


class Display:
    """A context manager that shows a run of `steps` training steps; see `aegpo.train.Display`."""

    def __init__(self, steps: int, console: Console | None = None) -> None:
        self.console = console or Console()
        self.bars = _bars(self.console)
        self.whole = self.bars.add_task("training", total=steps, note="")
        self.phase = self.bars.add_task("", total=None, note="", visible=False)
        self._before = (time.monotonic(), 0)
        self._said = time.monotonic()
        self._told: set[tuple[str, str]] = set()

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def begin(self, what: str, total: int) -> None:
        """A phase begins: so many pieces of this work lie ahead."""
        self.bars.reset(self.phase, total=total, description=what, visible=True)

    def advance(self, count: int) -> None:
        """So many of them are done."""
        self.bars.advance(self.phase, count)
        phase = self.bars.tasks[self.phase]
        self._say_if_quiet(f"{phase.description}: {phase.completed:,} of {phase.total:,}")

    def step(self, metrics: dict[str, Any]) -> None:
        """A training step, or an evaluation, is over."""
        now, (then, forwards) = time.monotonic(), self._before
        self._before = (now, metrics["forwards"])
        pace = (metrics["forwards"] - forwards) / max(now - then, 1e-9)
        mean = metrics.get("reward/mean")  # none where all groups were dropped
        note = "" if mean is None else f"reward {mean:.3f}  "
        for trouble in metrics.get("reward_troubles", ()):
            if (trouble["reward"], trouble["kind"]) not in self._told:  # once; the report counts them
                self._told.add((trouble["reward"], trouble["kind"]))
                self._say(
                    f"step {metrics['step']:>4}: {trouble['kind']} ({trouble['images']:,} images): {trouble['what']}"
                )
        self.bars.update(self.whole, completed=metrics["step"], note=f"{note}{pace:,.0f} forwards/s")
        cost = f"({metrics['forwards']:,} forwards, {metrics['seconds']:.0f} s)"
        if "eval/reward_mean" in metrics:
            passed = f", pass rate {metrics['eval/pass_rate']:.1%}" if "eval/pass_rate" in metrics else ""
            self._say(f"step {metrics['step']:>4}: held-out reward {metrics['eval/reward_mean']:.3f}{passed}  {cost}")
        else:
            self._say_if_quiet(f"step {metrics['step']:>4}: {note}{cost}")

    def _say_if_quiet(self, line: str) -> None:
        """Where there are no bars, and nothing was said for long."""
        if not self.console.is_terminal and time.monotonic() - self._said > QUIET:
            self._say(line)

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False)
        self._said = time.monotonic()


@contextmanager
def bar(what: str, total: int, console: Console) -> Iterator[Callable[[int], None]]:
    """One bar for a piece of work, and within it the function to tell how many more of `total` are done."""
    with _bars(console) as bars:
        task = bars.add_task(what, total=total, note="")
        done, said = 0, time.monotonic()

        def advance(count: int) -> None:
            nonlocal done, said
            done += count
            bars.advance(task, count)
            if not console.is_terminal and time.monotonic() - said > QUIET:
                console.print(f"{what}: {done:,} of {total:,}", highlight=False)
                said = time.monotonic()

        yield advance


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
    )
