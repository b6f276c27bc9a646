"""Pictures of a mixture's experts: the calibration tokens and the error of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from compress.report.experts import ExpertReport, bytes_by_kind, experts_of
from compress.report.numbers import megabytes
from compress.report.pages.figures import Chart, Figure
from compress.report.pages.theme import RAMP, Palette
from compress.report.report import Report

KIND_HEAD = ("kind of weights", "before", "after", "of all")
_STEP, _TALLEST = 22, 400
_TICKS = 12
_LARGE = 7
"""Pixels from which on a cell has room for gaps and marks."""
_WIDE = 20
"""From this ratio of counts on, their colours are logarithmic."""
_STRIP, _CROWDED = 220, 16


def tokens_figure(report: Report, palette: Palette) -> Figure:
    """The calibration tokens of each expert and layer."""
    title = "Calibration tokens of each expert"
    experts = experts_of(report)
    if not experts:
        return Figure(title, None, "No tokens of experts were counted.")
    counts = [one.tokens for one in experts]
    told = (
        f"Tokens that the router sent to each expert, from {min(counts):,} to {max(counts):,}; "
        f"{sum(counts) / len(counts):,.0f} in the mean. "
    )
    marked = "Orange: experts that saw none." if min(counts) == 0 else ""
    return Figure(title, _tokens(experts, palette), told + marked)


def expert_errors_figure(report: Report, palette: Palette) -> Figure:
    """The relative error of each expert, by block."""
    title = "Error of each expert"
    experts = [one for one in experts_of(report) if one.error is not None]
    if not experts:
        return Figure(title, None, "No expert's error was measured.")
    worst = max(experts, key=lambda one: one.error or 0.0)
    told = (
        "A mark for each expert: the mean of its layers' relative errors, on the tokens of its statistics. The largest "
        f"is {worst.error:.3f}, of expert {worst.name}."
    )
    marked = " Orange: experts that saw no token." if any(not it.tokens for it in experts) else ""
    return Figure(title, _errors(experts, palette), told + marked)


def kind_rows(report: Report) -> list[tuple[str, str, str, str]]:
    """Rows of a table: a kind of weights, its bytes before and after, and its share of all that there are now."""
    found = bytes_by_kind(report)
    whole = sum(after for _, after in found.values())
    return [
        (str(kind), megabytes(before), megabytes(after), f"{100 * after / whole:.1f} %")
        for kind, (before, after) in found.items()
    ]


def _tokens(experts: Sequence[ExpertReport], palette: Palette) -> Chart:
    """Blocks from left to right, experts from top to bottom."""
    numbers = sorted({one.number for one in experts})
    step = max(1, min(_STEP, _TALLEST // len(numbers)))
    gap = 0.08 if step >= _LARGE else 0
    values = [
        {
            "block": str(it.block),
            "expert": it.number,
            "tokens": it.tokens,
            "pooled": round(it.pooled, 3),
        }
        for it in experts
    ]
    y = alt.Y(
        "expert:O",
        title="expert",
        axis=alt.Axis(values=_some(numbers), domain=False, ticks=False, labelColor=palette.ink),
        scale=alt.Scale(domain=numbers, paddingInner=gap),
    )
    legend = alt.Legend(
        orient="top", direction="horizontal", format="d", gradientLength=180, gradientThickness=8
    )
    seen = [one.tokens for one in experts if one.tokens] or [1]
    scale = (
        alt.Scale(scheme=RAMP, type="log")
        if max(seen) > _WIDE * min(seen)
        else alt.Scale(scheme=RAMP, zero=False)
    )
    color = alt.Color("tokens:Q", scale=scale, legend=legend, title="tokens")
    tooltip: list[Any] = [
        *("block:O", "expert:O", alt.Tooltip("tokens:Q", format=",")),
        alt.Tooltip("pooled:Q", title="weight of the others"),
    ]
    base = alt.Chart(alt.Data(values=values)).encode(x=_blocks(experts, gap), y=y, tooltip=tooltip)
    rect: dict[str, Any] = {"cornerRadius": 1.5 if step >= _LARGE else 0}
    drawn = [
        base.transform_filter("datum.tokens > 0").mark_rect(**rect).encode(color=color),
        base.transform_filter("datum.tokens == 0").mark_rect(color=palette.accent, **rect),
    ]
    return alt.layer(*drawn).properties(height=step * len(numbers))


def _errors(experts: Sequence[ExpertReport], palette: Palette) -> Chart:
    """A strip of marks for each block."""
    values = [
        {
            "block": str(it.block),
            "expert": it.number,
            "error": float(f"{it.error:.4g}"),
            "tokens": it.tokens,
        }
        for it in experts
    ]
    y = alt.Y(
        "error:Q",
        title="relative error",
        scale=alt.Scale(zero=False),
        axis=alt.Axis(tickCount=5, domain=False),
    )
    tooltip: list[Any] = ["block:O", "expert:O", alt.Tooltip("error:Q", format=".4f"), "tokens:Q"]
    base = alt.Chart(alt.Data(values=values)).encode(x=_blocks(experts, 0), y=y, tooltip=tooltip)
    marks: dict[str, Any] = {"thickness": 2, "orient": "horizontal", "width": {"band": 0.8}}
    crowded = len({one.number for one in experts}) > _CROWDED
    drawn = [
        base.transform_filter("datum.tokens > 0").mark_tick(
            color=palette.after, opacity=0.3 if crowded else 0.7, **marks
        ),
        base.transform_filter("datum.tokens == 0").mark_tick(
            color=palette.accent, opacity=1, **marks
        ),
    ]
    return alt.layer(*drawn).properties(height=_STRIP)


def _blocks(experts: Sequence[ExpertReport], gap: float) -> alt.X:
    blocks = [str(block) for block in dict.fromkeys(one.block for one in experts)]
    return alt.X(
        "block:O",
        title="block",
        axis=alt.Axis(values=_some(blocks), labelAngle=0, domain=False, ticks=False),
        scale=alt.Scale(domain=blocks, paddingInner=gap),
    )


def _some(values: Sequence[Any]) -> list[Any]:
    """At most a dozen of the values, evenly spaced, for the labels of an axis."""
    step = next(n for n in (1, 2, 5, 10, 20, 50, 100, 1000) if len(values) <= n * _TICKS)
    return list(values[::step])
