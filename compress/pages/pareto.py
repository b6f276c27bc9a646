"""Size against quality: which runs nothing beats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from compress.comparing import Figures, Measured, RunComparison
from compress.pages.figures import Chart, Figure
from compress.pages.labels import placed
from compress.pages.theme import Palette

HEIGHT = 340
_WIDE_RANGE = 8.0
_ROOM = 0.06


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A measure of quality, and which end of it is good."""

    name: str
    title: str
    of: Callable[[Figures], Measured | None]
    is_loss: bool
    number: str
    """How a tooltip writes it."""


GOALS = (
    Goal(
        name="kl",
        title="KL divergence, nats a token",
        of=lambda it: it.kl,
        is_loss=True,
        number=".4f",
    ),
    Goal(
        name="perplexity",
        title="perplexity",
        of=lambda it: it.perplexity,
        is_loss=True,
        number=".2f",
    ),
    Goal(
        name="accuracy",
        title="mean accuracy of the tasks",
        of=lambda it: it.accuracy,
        is_loss=False,
        number=".3f",
    ),
)


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
    """What a plot shows, with a little room around its points; quality on a logarithmic scale where it spans much."""

    sizes: tuple[float, float]
    values: tuple[float, float]
    is_log: bool

    @classmethod
    def around(cls, points: Sequence[Point], reference: float | None, goal: Goal) -> Frame:
        """The points with their errors, and the reference."""
        sizes = [it.megabytes for it in points]
        room = _ROOM * ((max(sizes) - min(sizes)) or max(sizes))
        spread = (min(sizes) - room, max(sizes) + room)
        values = [it.value for it in points] + ([] if reference is None else [reference])
        low = min([it.value - (it.stderr or 0) for it in points] + values)
        high = max([it.value + (it.stderr or 0) for it in points] + values)
        if goal.is_loss and max(values) > _WIDE_RANGE * min(values) > 0:
            return cls(spread, (min(values) / 1.4, high * 1.2), is_log=True)
        room = _ROOM * ((high - low) or abs(high) or 1.0)
        return cls(spread, (low - room, high + room), is_log=False)

    def x(self) -> alt.X:
        """Of sizes."""
        scale = alt.Scale(domain=list(self.sizes), nice=False, zero=False)
        axis = alt.Axis(tickCount=6, grid=False)
        return alt.X("megabytes:Q", title="size of the checkpoint, MB", scale=scale, axis=axis)

    def y(self, field: str, title: str) -> alt.Y:
        """Of a measure of quality."""
        kind: dict[str, Any] = {"type": "log"} if self.is_log else {"zero": False}
        scale = alt.Scale(domain=list(self.values), nice=False, **kind)
        axis = alt.Axis(values=self._ticks()) if self.is_log else alt.Axis(tickCount=5)
        return alt.Y(f"{field}:Q", title=title, scale=scale, axis=axis)

    def _ticks(self) -> list[float]:
        """1, 2, 5, 10, ... within the plot."""
        decades = range(math.floor(math.log10(self.values[0])), 6)
        every = (digit * 10.0**power for power in decades for digit in (1, 2, 5))
        return [float(f"{one:.1g}") for one in every if self.values[0] <= one <= self.values[1]]

    def at(self, point: Point, size: tuple[float, float]) -> tuple[float, float]:
        """Pixels of a point from the top left of a plot of this size."""
        low, high, value = *self.values, point.value
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        across = (point.megabytes - self.sizes[0]) / (self.sizes[1] - self.sizes[0])
        return across * size[0], (high - value) / (high - low) * size[1]


def pareto_figures(comparison: RunComparison, palette: Palette) -> list[Figure]:
    """Size against each measure of quality, runs by their numbers; a sentence where no run was measured so."""
    return [_figure(comparison, goal, palette) for goal in GOALS]


def pareto_pictures(
    comparison: RunComparison, palette: Palette, size: tuple[int, int]
) -> dict[str, Chart]:
    """The same with the runs' names beside their points, for pictures of this width and height in pixels."""
    found: dict[str, Chart] = {}
    for goal in GOALS:
        runs, original = _points(comparison, goal)
        if runs:
            frame = Frame.around(runs, _level(original), goal)
            names = _names(runs, frame, size, palette)
            chart = alt.layer(*_layers(runs, original, goal, palette), *names)
            titled = chart.properties(width=size[0], height=size[1], title=_title(goal))
            found[f"pareto-{goal.name}"] = titled
    return found


def front(points: Sequence[Point], goal: Goal) -> list[Point]:
    """The points that no other beats in size without being worse in quality, or the other way round; smallest first."""
    sign = 1.0 if goal.is_loss else -1.0
    kept: list[Point] = []
    for point in sorted(points, key=lambda it: (it.megabytes, sign * it.value)):
        if not kept or sign * point.value < sign * kept[-1].value:
            kept.append(point)
    return kept


def _title(goal: Goal) -> str:
    return f"Size against {goal.title}"


def _figure(comparison: RunComparison, goal: Goal, palette: Palette) -> Figure:
    runs, original = _points(comparison, goal)
    if not runs:
        return Figure(_title(goal), None, "No run was measured so.")
    told = (
        "Numbers are those of the table. The dashed line joins the runs that no other beats in both; bars are one "
        "standard error."
    )
    missing = len(comparison.figures) - len(runs)
    if missing:
        told += f" {missing} of {len(comparison.figures)} runs were not measured so."
    chart = alt.layer(*_layers(runs, original, goal, palette)).properties(height=HEIGHT)
    return Figure(_title(goal), chart, told)


def _points(comparison: RunComparison, goal: Goal) -> tuple[list[Point], Point | None]:
    """The runs that were measured, numbered from 1, and the original."""
    both = [
        [
            Point(number, one.label, one.method, one.n_bytes / 1e6, it.value, it.stderr)
            for number, one in enumerate(figures, first)
            if (it := goal.of(one)) is not None
        ]
        for first, figures in enumerate((comparison.originals[:1], comparison.figures))
    ]
    return both[1], both[0][0] if both[0] else None


def _level(original: Point | None) -> float | None:
    """Where the original is drawn: its divergence from itself, 0, needs no line."""
    return None if original is None or original.value <= 0 else original.value


def _layers(
    runs: Sequence[Point], original: Point | None, goal: Goal, palette: Palette
) -> list[alt.Chart]:
    frame = Frame.around(runs, _level(original), goal)
    x, y = frame.x(), frame.y("value", goal.title)
    best = [{"megabytes": it.megabytes, "value": it.value} for it in front(runs, goal)]
    line = alt.Chart(alt.Data(values=best)).mark_line(
        strokeDash=[4, 4], strokeWidth=1.5, color=palette.muted
    )
    color = _colors(runs, palette)
    inks = _inks(runs, palette)
    rows = [_row(point, frame) | {"ink": inks[point.method]} for point in runs]
    dots = alt.Chart(alt.Data(values=rows)).encode(
        x=x,
        tooltip=[
            "label:N",
            "method:N",
            alt.Tooltip("megabytes:Q", title="MB", format=".1f"),
            alt.Tooltip("value:Q", title=goal.title, format=goal.number),
        ],
    )
    low = frame.y("low", goal.title)
    return [
        *_reference(original, y, palette),
        line.encode(x=x, y=y),
        dots.mark_rule(strokeWidth=1.5)
        .transform_filter("isValid(datum.low)")
        .encode(y=low, y2="high:Q", color=color),
        dots.mark_circle(size=260, opacity=1).encode(y=y, color=color),
        *(
            dots.mark_text(fontSize=10, fontWeight="bold", color=ink)
            .transform_filter(alt.FieldEqualPredicate(field="ink", equal=ink))
            .encode(y=y, text="number:N")
            for ink in dict.fromkeys(inks.values())
        ),
    ]


def _colors(runs: Sequence[Point], palette: Palette) -> alt.Color:
    """One for each method."""
    methods = list(dict.fromkeys(point.method for point in runs))
    colours = [palette.series[k % len(palette.series)] for k in range(len(methods))]
    scale = alt.Scale(domain=methods, range=colours)
    legend = alt.Legend(orient="bottom", title=None, columns=3, labelLimit=150)
    return alt.Color("method:N", scale=scale, legend=legend)


def _inks(runs: Sequence[Point], palette: Palette) -> dict[str, str]:
    """What the numbers of each method are written in, on its colour."""
    methods = dict.fromkeys(point.method for point in runs)
    return {name: palette.on_series[k % len(palette.series)] for k, name in enumerate(methods)}


def _reference(original: Point | None, y: alt.Y, palette: Palette) -> list[alt.Chart]:
    """A line where the original is, far to the right."""
    level = _level(original)
    if original is None or level is None:
        return []
    text = f"{original.label}, {original.megabytes:.0f} MB"
    base = alt.Chart(alt.Data(values=[{"value": level, "text": text}])).encode(y=y)
    words = base.mark_text(align="right", dy=-7, color=palette.muted)
    return [
        base.mark_rule(strokeWidth=1, color=palette.muted),
        words.encode(x=alt.value("width"), text="text:N"),
    ]


def _row(point: Point, frame: Frame) -> dict[str, Any]:
    """With both ends of its spread, within the plot."""
    spread: dict[str, float | None] = {"low": None, "high": None}
    if point.stderr is not None:
        low, high = point.value - point.stderr, point.value + point.stderr
        spread = {"low": max(low, frame.values[0]), "high": high}
    return vars(point) | spread


def _names(
    runs: Sequence[Point], frame: Frame, size: tuple[int, int], palette: Palette
) -> list[alt.Chart]:
    """A layer for each place that names take beside their points."""
    ends = (float(size[0]), float(size[1]))
    labels = placed([frame.at(it, ends) for it in runs], [it.label for it in runs], ends)
    x, y = frame.x(), frame.y("value", "")
    return [
        alt.Chart(
            alt.Data(values=[vars(p) for p, one in zip(runs, labels, strict=True) if one == label])
        )
        .mark_text(align=label.align, dx=label.dx, dy=label.dy, color=palette.ink)
        .encode(x=x, y=y, text="label:N")
        for label in dict.fromkeys(labels)
    ]
