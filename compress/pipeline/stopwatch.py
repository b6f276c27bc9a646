"""A stopwatch for the time and memory of stages, for the report."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from eval.peak_memory import high_water_mark, restart_high_water_mark

T = TypeVar("T")


class Stopwatch:
    """Adds up seconds by stage name, and marks how high memory rises in each."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}
        """Most that the process held in each stage; where its mark cannot be started again, in it or before."""
        self._open: list[int] = []

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time what happens inside."""
        self._mark()
        self._open.append(0)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started
            self._mark()
            self.peak_bytes[stage] = max(self.peak_bytes.get(stage, 0), self._open.pop())

    def _mark(self) -> None:
        """Every stage that is open has seen what was held since the last mark."""
        mark = high_water_mark()
        self._open = [max(peak, mark) for peak in self._open]
        restart_high_water_mark()

    def each(self, stage: str, items: Iterable[T]) -> Iterator[T]:
        """The same items; making each of them is timed, not what the caller does in between."""
        iterator = iter(items)
        while True:
            with self(stage):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item
            del item
