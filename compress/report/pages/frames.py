"""Runs as points in size and a metric, and what a plot shows of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from compress.report.metrics import Direction, Metric

_WIDE_RANGE = 4.0
_ROOM = 0.06
_FEW_DECADES = 5


@dataclass(frozen=True)
class Point:
    """A run, or the original (number 0), on a plot."""

    number: int
    label: str
    method: str
    megabytes: float
    value: float
    stderr: float | None


@dataclass(frozen=True)
class Frame:
    """Domain of a plot, with a little room around its points; the metric is logarithmic where it spans much."""

    sizes: tuple[float, float]
    values: tuple[float, float]
    is_log: bool

    @classmethod
    def around(cls, points: Sequence[Point], reference: float | None, metric: Metric) -> Frame:
        """The points with their errors, and the reference."""
        sizes = [it.megabytes for it in points]
        room = _ROOM * ((max(sizes) - min(sizes)) or max(sizes))
        spread = (min(sizes) - room, max(sizes) + room)
        values = [it.value for it in points] + ([] if reference is None else [reference])
        low = min([it.value - (it.stderr or 0) for it in points] + values)
        high = max([it.value + (it.stderr or 0) for it in points] + values)
        is_loss = metric.direction is Direction.LOWER
        if is_loss and max(values) > _WIDE_RANGE * min(values) > 0:
            return cls(spread, (min(values) / 1.4, high * 1.2), is_log=True)
        room = _ROOM * ((high - low) or abs(high) or 1.0)
        return cls(spread, (low - room, high + room), is_log=False)

    def x(self) -> alt.X:
        """The axis of sizes."""
        scale = alt.Scale(domain=list(self.sizes), nice=False, zero=False)
        axis = alt.Axis(tickCount=6, grid=False)
        return alt.X("megabytes:Q", title="size of the checkpoint, MB", scale=scale, axis=axis)

    def y(self, field: str, title: str) -> alt.Y:
        """The axis of the metric."""
        kind: dict[str, Any] = {"type": "log"} if self.is_log else {"zero": False}
        scale = alt.Scale(domain=list(self.values), nice=False, **kind)
        axis = alt.Axis(values=self._ticks()) if self.is_log else alt.Axis(tickCount=5)
        return alt.Y(f"{field}:Q", title=title, scale=scale, axis=axis)

    def _ticks(self) -> list[float]:
        """1, 2, 5, 10, ... within the plot; powers of ten if it spans many."""
        first, last = (math.floor(math.log10(end)) for end in self.values)
        digits = (1, 2, 5) if last - first <= _FEW_DECADES else (1,)
        every = (digit * 10.0**power for power in range(first, last + 1) for digit in digits)
        return [float(f"{one:.1g}") for one in every if self.values[0] <= one <= self.values[1]]

    def at(self, point: Point, size: tuple[float, float]) -> tuple[float, float]:
        """Pixels of a point from the top left of a plot of this size."""
        low, high, value = *self.values, point.value
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        across = (point.megabytes - self.sizes[0]) / (self.sizes[1] - self.sizes[0])
        return across * size[0], (high - value) / (high - low) * size[1]
