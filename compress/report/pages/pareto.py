"""Size against quality: which runs nothing beats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from compress.report.comparison import RunComparison
from compress.report.metrics import Direction, Metric, Shown, shown_in
from compress.report.numbers import Measured
from compress.report.pages.figures import Chart, Figure
from compress.report.pages.frames import Frame, Point
from compress.report.pages.keys import run_key
from compress.report.pages.labels import LETTER, LINE, Box, Placed, placed
from compress.report.pages.marks import Mark, marks_of
from compress.report.pages.theme import Palette

Picture = Chart | alt.VConcatChart
HEIGHT = 340
NARROW = 290
"""Numbers are placed for a plot of this width, a phone's: on a wider one they only move apart."""
_SIZE = 120
_TOO_FAR = "Too far above to be drawn:"


def pareto_figures(comparison: RunComparison, palette: Palette) -> list[Figure]:
    """Size against each measure of quality, runs by their numbers; a sentence where no run has the metric."""
    return [_figure(comparison, metric, palette) for metric in shown_in(Shown.PARETO)]


def pareto_pictures(
    comparison: RunComparison, palette: Palette, size: tuple[int, int]
) -> dict[str, Picture]:
    """The same plots as pictures of this width and height in pixels, with the runs' names beside their points.

    Where names would lie on each other, with their numbers, and a key of the names below.
    """
    marks = marks_of([one.method for one in comparison.figures], palette)
    found: dict[str, Picture] = {}
    for metric in shown_in(Shown.PARETO):
        plot = Plot.of(comparison, metric)
        if plot is None:
            continue
        names = plot.placed("label", size)
        field = "number" if names.covered else "label"
        texts = _texts(plot, field, plot.placed(field, size), palette)
        layers = alt.layer(*_layers(plot, Look(palette, marks)), *texts)
        chart = layers.properties(width=size[0], height=size[1], title=_titled(plot))
        key = run_key(plot.runs, marks, size[0], palette)
        found[f"pareto-{metric.key}"] = (
            alt.vconcat(chart, key, spacing=24) if names.covered else chart
        )
    return found


def front(points: Sequence[Point], metric: Metric) -> list[Point]:
    """The points that no other beats in size without being worse in quality, or the other way round; smallest first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda it: (it.megabytes, metric.loss(it.value))):
        if not kept or metric.loss(point.value) < metric.loss(kept[-1].value):
            kept.append(point)
    return kept


def _title(metric: Metric) -> str:
    return f"Size against {metric.title}"


def _titled(plot: Plot) -> alt.TitleParams:
    """Title of the plot, and the runs that are too far above to be drawn."""
    under = [_TOO_FAR, *_told(plot, "label")] if plot.beyond else []
    return alt.TitleParams(_title(plot.metric), subtitle=under)


def _told(plot: Plot, field: str) -> list[str]:
    """The runs beyond the plot with their values."""
    texts = [plot.metric.text(Measured(it.value)) for it in plot.beyond]
    return [f"{getattr(it, field)} ({text})" for it, text in zip(plot.beyond, texts, strict=True)]


def _figure(comparison: RunComparison, metric: Metric, palette: Palette) -> Figure:
    plot = Plot.of(comparison, metric)
    if plot is None:
        return Figure(_title(metric), None, "No run has this metric.")
    told = []
    if plot.beyond:
        told.append(f"{_TOO_FAR} {', '.join(_told(plot, 'number'))}.")
    measured = {it.number for it in (*plot.runs, *plot.beyond)}
    missing = [str(k) for k in range(1, len(comparison.figures) + 1) if k not in measured]
    if missing:
        which = ", ".join(missing)
        told.append(
            f"{len(missing)} of {len(comparison.figures)} runs do not have this metric: {which}."
        )
    marks = marks_of([one.method for one in comparison.figures], palette)
    numbers = _texts(plot, "number", plot.placed("number", (NARROW, HEIGHT)), palette)
    layers = alt.layer(*_layers(plot, Look(palette, marks)), *numbers)
    return Figure(_title(metric), layers.properties(height=HEIGHT), " ".join(told))


@dataclass(frozen=True)
class Plot:
    """The runs that have the metric, numbered from 1, and the original."""

    metric: Metric
    runs: Sequence[Point]
    beyond: Sequence[Point]
    """Runs whose loss is so far above the best that a plot with them would show nothing else."""
    original: Point | None
    """Point of the original; None if it was not measured, or if the metric compares with it."""
    frame: Frame

    @classmethod
    def of(cls, comparison: RunComparison, metric: Metric) -> Plot | None:
        """The plot of a metric; None if no run has it."""
        originals, runs = (
            [
                Point(number, one.label, one.method, one.n_bytes / 1e6, it.value, it.stderr)
                for number, one in enumerate(figures, first)
                if (it := one.values.get(metric.key)) is not None
            ]
            for first, figures in enumerate((comparison.originals[:1], comparison.figures))
        )
        if not runs:
            return None
        original = next(iter(originals), None)
        reference = None if original is None else original.value
        limit = metric.far * min(it.value for it in runs)
        shown, beyond = ([it for it in runs if (it.value > limit) == far] for far in (False, True))
        return cls(metric, shown, beyond, original, Frame.around(shown, reference, metric))

    @property
    def reference(self) -> str:
        """Label of the line of the original."""
        one = self.original
        return "" if one is None else f"{one.label}, {one.megabytes:.0f} MB"

    @property
    def reference_dy(self) -> float:
        """Pixels from the line to its words: on the side where no worse run can be."""
        return 9.0 if self.metric.direction is Direction.LOWER else -7.0

    def placed(self, field: str, size: tuple[float, float]) -> Placed:
        """Places for the runs' numbers or labels in a plot of this size in pixels."""
        taken: list[Box] = []
        if self.original is not None:
            middle = self.frame.at(self.original, size)[1] + self.reference_dy
            left = size[0] - LETTER * len(self.reference)
            taken = [(left, middle - LINE / 2, size[0], middle + LINE / 2)]
        pixels = [self.frame.at(it, size) for it in self.runs]
        return placed(pixels, [str(getattr(it, field)) for it in self.runs], size, taken)


@dataclass(frozen=True)
class Look:
    """Colours, and what each method is drawn as."""

    palette: Palette
    marks: Mapping[str, Mark]


def _layers(plot: Plot, look: Look) -> list[alt.Chart]:
    frame, metric, palette = plot.frame, plot.metric, look.palette
    x, y = frame.x(), frame.y("value", metric.title)
    best = [{"megabytes": it.megabytes, "value": it.value} for it in front(plot.runs, metric)]
    line = alt.Chart(alt.Data(values=best)).mark_line(
        strokeDash=[4, 4], strokeWidth=1.5, color=palette.muted
    )
    rows = [_row(point, plot) for point in plot.runs]
    dots = alt.Chart(alt.Data(values=rows)).encode(
        x=x,
        tooltip=[
            "label:N",
            "method:N",
            alt.Tooltip("megabytes:Q", title="MB", format=".1f"),
            alt.Tooltip("text:N", title=metric.title),
        ],
    )
    color, shape = _scales(look)
    low = frame.y("low", metric.title)
    return [
        *_reference(plot, y, palette),
        line.encode(x=x, y=y),
        dots.mark_rule(strokeWidth=1.5)
        .transform_filter("isValid(datum.low)")
        .encode(y=low, y2="high:Q", color=color),
        dots.mark_point(
            size=_SIZE, filled=True, opacity=1, stroke=palette.paper, strokeWidth=1
        ).encode(y=y, color=color, shape=shape),
    ]


def _scales(look: Look) -> tuple[alt.Color, alt.Shape]:
    """Scales for colour and shape without a legend: pages and pictures have their own, which wraps."""
    methods, marks = list(look.marks), look.marks.values()
    colors = alt.Scale(domain=methods, range=[mark.color for mark in marks])
    shapes = alt.Scale(domain=methods, range=[mark.shape for mark in marks])
    return (
        alt.Color("method:N", scale=colors, legend=None),
        alt.Shape("method:N", scale=shapes, legend=None),
    )


def _reference(plot: Plot, y: alt.Y, palette: Palette) -> list[alt.Chart]:
    """A line where the original is, far to the right."""
    if plot.original is None:
        return []
    value = {"value": plot.original.value, "text": plot.reference}
    base = alt.Chart(alt.Data(values=[value])).encode(y=y)
    words = base.mark_text(align="right", dy=plot.reference_dy, color=palette.muted)
    return [
        base.mark_rule(strokeWidth=1, color=palette.muted),
        words.encode(x=alt.value("width"), text="text:N"),
    ]


def _row(point: Point, plot: Plot) -> dict[str, Any]:
    """A point with its value as text and both ends of its spread, within the plot."""
    spread: dict[str, float | None] = {"low": None, "high": None}
    if point.stderr is not None:
        low, high = point.value - point.stderr, point.value + point.stderr
        spread = {"low": max(low, plot.frame.values[0]), "high": high}
    text = plot.metric.text(Measured(point.value, point.stderr))
    return vars(point) | spread | {"text": text}


def _texts(plot: Plot, field: str, places: Placed, palette: Palette) -> list[alt.Chart]:
    """A layer for each place that names or numbers take beside their points."""
    x, y = plot.frame.x(), plot.frame.y("value", "")
    both = list(zip(plot.runs, places.labels, strict=True))
    return [
        alt.Chart(alt.Data(values=[vars(point) for point, one in both if one == label]))
        .mark_text(align=label.align, dx=label.dx, dy=label.dy, color=palette.ink)
        .encode(x=x, y=y, text=f"{field}:N")
        for label in dict.fromkeys(places.labels)
    ]
