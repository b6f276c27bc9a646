"""How far a long step is: bars on a terminal, lines elsewhere; both estimate what is left."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Report = Callable[[str, int, int], None]
"""Called as report(stage, done, total); a total of 0 means that it is not known."""


@contextmanager
def show_progress(console: Console) -> Iterator[Report]:
    """A callback that draws on `console`: bars if it is a terminal, plain lines otherwise."""
    if not console.is_terminal:
        yield Lines(lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True))
        return
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        yield Bars(bars)


class Bars:
    """One bar for each stage; a finished stage keeps its bar and shows the time it took."""

    def __init__(self, bars: Progress) -> None:
        """`bars` is drawn by its owner."""
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Moves the bar of `stage`, which starts when it is first named."""
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total or None)
        self._bars.update(self._tasks[stage], completed=done, total=total or None)


class Lines:
    """One line when a stage starts and ends, and between them one every `every` seconds at most."""

    def __init__(
        self,
        write: Callable[[str], None],
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock` is in seconds."""
        self._write, self._every, self._clock = write, every, clock
        self._started: dict[str, float] = {}
        self._last = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Writes a line if one is due."""
        now = self._clock()
        first = stage not in self._started
        start = self._started.setdefault(stage, now)
        finished = 0 < total <= done
        if not (first or finished or now - self._last >= self._every):
            return
        self._last = now
        if finished:
            self._started.pop(stage)  # a stage of the same name later starts anew
            self._write(f"{stage}: done in {duration(now - start)}")
        else:
            self._write(f"{stage}: {_share(done, total)}{_left(now - start, done, total)}")


def duration(seconds: float) -> str:
    """A time for people: "8 s", "3 min 05 s", "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _share(done: int, total: int) -> str:
    if total <= 0:
        return str(done) if done else "started"
    return f"{100 * done // total} % ({done}/{total})"


def _left(elapsed: float, done: int, total: int) -> str:
    if done <= 0 or total <= done:
        return ""
    return f", about {duration(elapsed / done * (total - done))} left"
