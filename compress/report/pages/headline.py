"""The figures that a reader wants to know first, each with what it was before."""

from __future__ import annotations

from dataclasses import dataclass

from compress.report.metrics import METRICS, Metric, Shown, shown_in
from compress.report.numbers import Measured, Written
from compress.report.report import Report
from compress.report.sides import Sides, sides_of


@dataclass(frozen=True)
class Stat:
    """One figure; `was` and `change` are empty where there is nothing to compare with."""

    label: str
    value: str
    unit: str = ""
    was: str = ""
    change: str = ""


def headline(report: Report) -> list[Stat]:
    """The figures that were measured, in the order of METRICS."""
    sides = sides_of(report)
    stats = []
    for metric in shown_in(Shown.HEADLINE):
        after = metric.after(sides)
        if after is not None:
            stats.append(_stat(metric, after, sides))
    return stats


def lead(report: Report) -> str:
    """The result in a sentence: size, and perplexity if it was measured."""
    sides = sides_of(report)
    parts = [_became(METRICS["n_bytes"], sides), _became(METRICS["perplexity"], sides)]
    return ", perplexity ".join(part for part in parts if part)


def _stat(metric: Metric, after: Measured, sides: Sides) -> Stat:
    written, before = metric.format(after), metric.before(sides)
    return Stat(
        label=metric.label[0].upper() + metric.label[1:],
        value=written.number,
        unit=metric.unit or written.suffix,
        was="" if before is None else _plain(metric, before),
        change=_beside(metric, sides, written),
    )


def _beside(metric: Metric, sides: Sides, written: Written) -> str:
    """The metric's own remark, or else its paired change, or else its standard error."""
    if metric.beside is not None:
        return metric.beside(sides)
    changed = metric.changed(sides)
    if changed is None:
        return f"± {written.error}" if written.error else ""
    interval = f" ({changed.interval_text})" if changed.interval_text else ""
    return f"{changed.text}{interval}"


def _became(metric: Metric, sides: Sides) -> str:
    before, after = metric.before(sides), metric.after(sides)
    if before is None or after is None:
        return ""
    return f"{_plain(metric, before)} became {_plain(metric, after)}"


def _plain(metric: Metric, measured: Measured) -> str:
    """The value without its error."""
    return metric.text(Measured(measured.value))
