"""Size against quality: which runs nothing beats."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from compress.comparing import Figures, Measured, RunComparison
from compress.pages.figures import Chart, Figure
from compress.pages.theme import Palette

HEIGHT = 300
_WIDE_RANGE = 8.0
_ROOM = 0.06


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A measure of quality, and which end of it is good."""

    title: str
    of: Callable[[Figures], Measured | None]
    is_loss: bool
    number: str
    """How a tooltip writes it."""


GOALS = (
    Goal(title="KL divergence, nats a token", of=lambda it: it.kl, is_loss=True, number=".4f"),
    Goal(title="perplexity", of=lambda it: it.perplexity, is_loss=True, number=".2f"),
    Goal(
        title="mean accuracy of the tasks", of=lambda it: it.accuracy, is_loss=False, number=".3f"
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


def pareto_figures(comparison: RunComparison, palette: Palette) -> list[Figure]:
    """Bytes against each measure of quality; a sentence in place of a plot where no run was measured so."""
    return [_figure(comparison, goal, palette) for goal in GOALS]


def front(points: Sequence[Point], goal: Goal) -> list[Point]:
    """The points that no other equals or beats in both size and quality without being the same, smallest first."""
    sign = 1.0 if goal.is_loss else -1.0
    kept: list[Point] = []
    for point in sorted(points, key=lambda it: (it.megabytes, sign * it.value)):
        if not kept or sign * point.value < sign * kept[-1].value:
            kept.append(point)
    return kept


def _figure(comparison: RunComparison, goal: Goal, palette: Palette) -> Figure:
    title = f"Size against {goal.title}"
    runs = _points(comparison.figures, goal, 1)
    if not runs:
        return Figure(title, None, "No run was measured so.")
    missing = len(comparison.figures) - len(runs)
    told = (
        "The dashed line joins the runs that no other beats in both. Bars are one standard error."
    )
    if missing:
        told += f" {missing} of {len(comparison.figures)} runs were not measured so."
    # The original's divergence from itself is zero, which no logarithmic axis shows.
    originals = [it for it in _points(comparison.originals, goal, 0)[:1] if it.value > 0]
    return Figure(title, _chart(runs, originals, goal, palette), told)


def _points(figures: Sequence[Figures], goal: Goal, first: int) -> list[Point]:
    found = [(number, one, goal.of(one)) for number, one in enumerate(figures, first)]
    return [
        Point(number, one.label, one.method, one.n_bytes / 1e6, it.value, it.stderr)
        for number, one, it in found
        if it is not None
    ]


def _chart(
    runs: Sequence[Point], originals: Sequence[Point], goal: Goal, palette: Palette
) -> Chart:
    every = [*runs, *originals]
    x, scale = _sizes(every), _scale(every, goal)
    y: dict[str, Any] = {"scale": scale, "axis": alt.Axis(tickCount=5), "title": goal.title}
    value = alt.Y("value:Q", **y)
    best = [{"megabytes": it.megabytes, "value": it.value} for it in front(runs, goal)]
    line = alt.Chart(alt.Data(values=best)).mark_line(
        strokeDash=[4, 4], strokeWidth=1.5, color=palette.muted
    )
    methods = list(dict.fromkeys(point.method for point in runs))
    colours = [palette.series[k % len(palette.series)] for k in range(len(methods))]
    color = alt.Color(
        "method:N",
        sort=methods,
        scale=alt.Scale(domain=methods, range=colours),
        legend=alt.Legend(orient="bottom", title=None, columns=2, labelLimit=170),
    )
    dots = alt.Chart(alt.Data(values=_rows(runs, scale))).encode(
        x=x,
        tooltip=[
            "label:N",
            "method:N",
            alt.Tooltip("megabytes:Q", title="MB", format=".1f"),
            alt.Tooltip("value:Q", title=goal.title, format=goal.number),
        ],
    )
    return alt.layer(
        line.encode(x=x, y=value),
        dots.mark_rule(strokeWidth=1.5)
        .transform_filter("isValid(datum.low)")
        .encode(y=alt.Y("low:Q", **y), y2="high:Q", color=color),
        dots.mark_circle(size=230, opacity=1).encode(y=value, color=color),
        dots.mark_text(fontSize=10, fontWeight="bold", color=palette.on_series).encode(
            y=value, text="number:N"
        ),
        *_reference(_rows(originals, scale), x, value, palette),
    ).properties(height=HEIGHT)


def _reference(
    rows: Sequence[dict[str, Any]], x: alt.X, y: alt.Y, palette: Palette
) -> list[alt.Chart]:
    if not rows:
        return []
    base = alt.Chart(alt.Data(values=list(rows))).encode(x=x, y=y)
    return [
        base.mark_point(size=90, strokeWidth=2, color=palette.ink, opacity=1),
        base.mark_text(align="right", dx=-9, color=palette.ink).encode(text="label:N"),
    ]


def _rows(points: Sequence[Point], scale: Mapping[str, Any]) -> list[dict[str, Any]]:
    """With both ends of their spread; on a logarithmic axis the lower one stays above zero."""
    least = scale["domain"][0]
    return [
        vars(point)
        | {
            "low": None if point.stderr is None else max(least, point.value - point.stderr),
            "high": None if point.stderr is None else point.value + point.stderr,
        }
        for point in points
    ]


def _sizes(points: Sequence[Point]) -> alt.X:
    """With a little room around the points."""
    sizes = [it.megabytes for it in points]
    room = _ROOM * ((max(sizes) - min(sizes)) or max(sizes))
    scale = alt.Scale(domain=[min(sizes) - room, max(sizes) + room], nice=False)
    axis = alt.Axis(tickCount=6, grid=False)
    return alt.X("megabytes:Q", title="size of the checkpoint, MB", scale=scale, axis=axis)


def _scale(points: Sequence[Point], goal: Goal) -> dict[str, Any]:
    """With a little room around the points; logarithmic for a loss that spans a wide range."""
    values = [it.value for it in points]
    lows = [it.value - (it.stderr or 0) for it in points]
    highs = [it.value + (it.stderr or 0) for it in points]
    if goal.is_loss and max(values) > _WIDE_RANGE * min(values) > 0:
        return {"type": "log", "domain": [min(values) / 1.4, max(highs) * 1.2], "nice": False}
    room = _ROOM * (max(highs) - min(lows)) or max(highs) * _ROOM or 1.0
    domain = [min(lows) - room, max(highs) + room]
    return {"type": "linear", "domain": domain, "nice": False, "zero": False}
