"""Where time and memory go: by stage, for the report."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from eval.peak_memory import high_water_mark

T = TypeVar("T")


class Stopwatch:
    """Adds up seconds by stage name, and marks how high memory has risen by then."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}
        """Most that the process had held, ever, by the last end of each stage."""
        self._highest = 0

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time what happens inside."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started
            # The kernel adds up its mark from what each core has counted, so that it may fall by a little.
            self._highest = max(self._highest, high_water_mark())
            self.peak_bytes[stage] = self._highest

    def each(self, stage: str, items: Iterable[T]) -> Iterator[T]:
        """The same items; what it takes to make each of them is timed, not what the caller does in between."""
        iterator = iter(items)
        while True:
            with self(stage):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item
            del item
