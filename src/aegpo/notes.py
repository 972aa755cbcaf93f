"""What the workers of a run on a Ray cluster leave word of, in an actor that outlives them.

It imports nothing, for the actor is a process of its own, which all workers wait for.
"""

FRUITLESS = 3  # attempts from one checkpoint that may fail before a run ends


class Notes:
    """An actor that outlives the workers: what they say, what they found wrong, and how often they began where."""

    def __init__(self, workers: int) -> None:
        self.workers, self.step = workers, -1
        self.said, self.wrong_line = [], ""
        self.over: set[int] = set()
        self.is_stopping = False
        self.lost: dict[int, str] = {}
        self.begun: dict[int, int] = {}
        self.machines: dict[str, int] = {}

    def say(self, text: str, is_error: bool) -> None:
        """A piece of output."""
        self.said.append((text, is_error))

    def take(self) -> tuple[list[tuple[str, bool]], int]:
        """The output since this was last asked for, and the step of the last checkpoint, -1 if none was written."""
        said, self.said = self.said, []
        return said, self.step

    def save(self, step: int) -> None:
        """The checkpoint of this step is where it should be."""
        self.step = step

    def begin(self) -> tuple[str, int, int]:
        """The workers begin.

        Returns:
            What is wrong with the run, if anything is; the step of its last checkpoint, -1 if it has written none; and
            how often they began before.
        """
        before = sum(self.begun.values())
        self.over.clear()
        count = self.begun[self.step] = self.begun.get(self.step, 0) + 1
        if count > FRUITLESS and not self.wrong_line:
            since = f"after the checkpoint of step {self.step}" if self.step >= 0 else "before it wrote a checkpoint"
            why = self.lost.get(self.step, "a worker was lost without a word")
            self.wrong_line = f"the run failed {FRUITLESS} times {since}: {why}"
        return self.wrong_line, self.step, before

    def is_own(self, machine: str, before: int) -> bool:
        """Whether workers on this machine began the run, and so may have written its folder, before this attempt."""
        return self.machines.setdefault(machine, before) < before

    def fail(self, rank: int, line: str, for_good: bool) -> None:
        """A worker failed; for good, if it is something that a user got wrong, of which another may say the line."""
        if for_good:
            self.wrong_line = self.wrong_line or line
            self.over.add(rank)
        else:
            self.lost.setdefault(self.step, line)

    def stop(self) -> None:
        """The run is to end after its step."""
        self.is_stopping = True

    def stopping(self) -> bool:
        """Whether it is."""
        return self.is_stopping

    def end(self, rank: int) -> None:
        """A worker has nothing left to do."""
        self.over.add(rank)

    def all_over(self) -> bool:
        """Whether every worker has ended, or found what ends the run."""
        return len(self.over) == self.workers

    def wrong(self) -> tuple[str, str]:
        """What is wrong with the run, and what the first worker said that was lost after the last checkpoint."""
        return self.wrong_line, next(reversed(self.lost.values()), "")
