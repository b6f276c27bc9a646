"""A chart with what a reader is told about it, and the shapes that most charts have: bars, intervals, heat maps.

Charts say nothing of their width: a page gives them its own, a picture a fixed one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from compress.report.pages.theme import RAMP, Palette

Chart = alt.Chart | alt.LayerChart | alt.FacetChart
BAR_STEP, CELL_STEP = 40, 26
_TICKS = 12


@dataclass(frozen=True)
class Figure:
    """A chart, or the sentence that says why there is none."""

    title: str
    chart: Chart | None
    told: str
    """Caption; without a chart, the reason."""


@dataclass(frozen=True)
class Bar:
    """One quantity, and what it was before where that is known."""

    label: str
    text: str
    """The quantity in words, at the right end of the line."""
    value: float
    before: float | None = None


@dataclass(frozen=True)
class Cell:
    """A value of one layer, where it is in the model."""

    layer: str
    block: str
    projection: str
    value: float


def bars(rows: Sequence[Bar], palette: Palette) -> Chart:
    """Bars from zero, each below a line of its own with name and number, so that they fit any width."""
    values = [
        {"label": row.label, "text": row.text, "value": row.value, "before": row.before or 0}
        for row in rows
    ]
    most = max((max(row.value, row.before or 0) for row in rows), default=0) or 1
    base = alt.Chart(alt.Data(values=values)).encode(
        y=alt.Y("label:N", sort=None, axis=None), tooltip=["label:N", "text:N"]
    )
    thick: dict[str, Any] = {"height": 9, "yOffset": 9, "cornerRadiusEnd": 2}
    scale = alt.Scale(domain=[0, most], nice=False)
    axis: dict[str, Any] = {"axis": None}
    drawn = [
        base.mark_bar(color=palette.before, opacity=0.55, **thick).encode(
            x=alt.X("before:Q", scale=scale, **axis)
        ),
        base.mark_bar(color=palette.after, **thick).encode(x=alt.X("value:Q", scale=scale, **axis)),
        *_words(base, palette),
    ]
    return alt.layer(*drawn).properties(height=BAR_STEP * len(rows))


def _words(base: alt.Chart, palette: Palette) -> list[alt.Chart]:
    """Name at the left end, number at the right one, above what is drawn."""
    left: dict[str, Any] = {"align": "left", "dy": -6, "color": palette.ink}
    right: dict[str, Any] = {"align": "right", "dy": -6, "color": palette.muted}
    return [
        base.mark_text(**left).encode(x=alt.value(0), text="label:N"),
        base.mark_text(**right).encode(x=alt.value("width"), text="text:N"),
    ]


@dataclass(frozen=True)
class Difference:
    """A difference with its interval; `low` and `high` are None where it is not known."""

    label: str
    text: str
    value: float
    low: float | None
    high: float | None


def differences(rows: Sequence[Difference], palette: Palette) -> Chart:
    """Points with their intervals around a line at zero."""
    values = [vars(row) for row in rows]
    ends = [end for row in rows for end in (row.low, row.high, row.value) if end is not None]
    most = 1.08 * max((abs(end) for end in ends), default=0) or 0.01
    axis = alt.Axis(format="+%", title="difference of the score, percentage points", tickCount=5)
    x: dict[str, Any] = {"scale": alt.Scale(domain=[-most, most], nice=False), "axis": axis}
    base = alt.Chart(alt.Data(values=values)).encode(
        y=alt.Y("label:N", sort=None, axis=None), tooltip=["label:N", "text:N"]
    )
    zero = alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(strokeWidth=1.2, color=palette.muted)
    drawn = [
        zero.encode(x=alt.X("zero:Q", **x)),
        base.mark_rule(strokeWidth=3, yOffset=10, color=palette.before)
        .transform_filter("isValid(datum.low)")
        .encode(x=alt.X("low:Q", **x), x2="high:Q"),
        base.mark_circle(size=80, yOffset=10, opacity=1, color=palette.after).encode(
            x=alt.X("value:Q", **x)
        ),
        *_words(base, palette),
    ]
    return alt.layer(*drawn).properties(height=BAR_STEP * len(rows))


def heat_map(cells: Sequence[Cell], quantity: str, number: str, palette: Palette) -> Chart:
    """Blocks from left to right, projections from top to bottom; several layers in one place show their mean."""
    blocks = list(dict.fromkeys(cell.block for cell in cells))
    # As domains, for orders become expressions, which names that hold anything would break.
    projections = list(dict.fromkeys(cell.projection for cell in cells))
    step = next(size for size in (1, 2, 5, 10, 20, 50, 100, 1000) if len(blocks) <= size * _TICKS)
    x = alt.X(
        "block:O",
        title="block",
        axis=alt.Axis(values=blocks[::step], labelAngle=0, domain=False, ticks=False),
        scale=alt.Scale(domain=blocks, paddingInner=0.08),
    )
    y = alt.Y(
        "projection:N",
        title=None,
        axis=alt.Axis(domain=False, ticks=False, labelLimit=160, labelColor=palette.ink),
        scale=alt.Scale(domain=projections, paddingInner=0.08),
    )
    legend = alt.Legend(
        orient="top", direction="horizontal", format=number, gradientLength=180, gradientThickness=8
    )
    color = alt.Color(
        "value:Q", scale=alt.Scale(scheme=RAMP, zero=False), legend=legend, title=quantity
    )
    chart: alt.Chart = (
        alt.Chart(alt.Data(values=_averaged(cells)))
        .mark_rect(cornerRadius=1.5)
        .encode(
            x=x,
            y=y,
            color=color,
            tooltip=[
                alt.Tooltip("layer:N"),
                alt.Tooltip("value:Q", title=quantity, format=number),
            ],
        )
        .properties(height=CELL_STEP * len(projections))
    )
    return chart


def _averaged(cells: Sequence[Cell]) -> list[dict[str, object]]:
    together: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        together.setdefault((cell.block, cell.projection), []).append(cell)
    return [
        {
            "block": block,
            "projection": projection,
            "layer": each[0].layer if len(each) == 1 else f"{len(each)} layers, mean",
            "value": float(f"{sum(cell.value for cell in each) / len(each):.5g}"),
        }
        for (block, projection), each in together.items()
    ]
