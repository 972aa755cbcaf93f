"""Progress of a run: live bars on a terminal; elsewhere a plain line an evaluation, and one every half minute."""

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

QUIET = 30.0  # seconds without a line, at most, where there are no bars


class Display:
    """A context manager that shows a run of `steps` training steps; see `aegpo.train.Display`."""

    def __init__(self, steps: int, console: Console | None = None) -> None:
        self.console = console or Console()
        self.bars = Progress(
            TextColumn("{task.description:<9}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.whole = self.bars.add_task("training", total=steps, note="")
        self.phase = self.bars.add_task("", total=None, note="", visible=False)
        self._before = (time.monotonic(), 0)
        self._said = time.monotonic()

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

    def step(self, metrics: dict[str, Any]) -> None:
        """A training step, or an evaluation, is over."""
        now, (then, forwards) = time.monotonic(), self._before
        self._before = (now, metrics["forwards"])
        pace = (metrics["forwards"] - forwards) / max(now - then, 1e-9)
        note = f"reward {metrics['reward/mean']:.3f}  " if "reward/mean" in metrics else ""
        self.bars.update(self.whole, completed=metrics["step"], note=f"{note}{pace:,.0f} forwards/s")
        cost = f"({metrics['forwards']:,} forwards, {metrics['seconds']:.0f} s)"
        if "eval/reward_mean" in metrics:
            passed = f", pass rate {metrics['eval/pass_rate']:.1%}" if "eval/pass_rate" in metrics else ""
            self._say(f"step {metrics['step']:>4}: held-out reward {metrics['eval/reward_mean']:.3f}{passed}  {cost}")
        elif not self.console.is_terminal and now - self._said > QUIET:
            self._say(f"step {metrics['step']:>4}: {note}{cost}")

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False)
        self._said = time.monotonic()
