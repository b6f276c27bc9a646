"""The two models that a report compares, the original and an export, each with what was measured on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compress.report.report import Comparison, ExportReport, Report
    from eval.scores import Scores


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two models; values that were not measured are None."""

    scores: Scores | None
    tensor_bytes: int | None
    """Size of all its tensors."""
    layer_bits_per_weight: float | None = None
    """Bits per weight of the compressed layers alone."""
    relative_error: float | None = None
    """Output error of the compressed layers, relative; None for the original."""
    tasks: tuple[str, ...] = ()
    """Tasks that the recipe names."""


@dataclass(frozen=True)
class Sides:
    """The original and the compressed model."""

    before: Side
    after: Side


def sides_of(report: Report, export: ExportReport | None = None) -> Sides:
    """Both models of a report. `export`: the one that is meant; None for the first.

    Speed, memory and bits per weight were measured on the first export, so they are left out of both sides for
    another one.
    """
    totals, tasks = report.totals, tuple(report.recipe["tasks"])
    before = after = None
    if report.scores is not None:
        before, after = report.scores.before, report.scores.after
        if not evaluated(report, export):
            before, after = replace(before, footprint=None), replace(after, footprint=None)
    bits = totals.layer_bits_per_weight
    smaller = (
        totals.layer_bytes_before / totals.layer_bytes_after if totals.layer_bytes_after else None
    )
    return Sides(
        before=Side(
            scores=before,
            tensor_bytes=totals.tensor_bytes_before,
            layer_bits_per_weight=None if smaller is None else bits * smaller,
            tasks=tasks,
        ),
        after=Side(
            scores=after,
            tensor_bytes=totals.tensor_bytes_after if export is None else export.tensor_bytes,
            layer_bits_per_weight=bits,
            relative_error=totals.relative_error,
            tasks=tasks,
        ),
    )


def sides_of_scores(scores: Comparison) -> Sides:
    """Both models of an evaluation alone, whose sizes are those of their footprints."""
    return Sides(*(_measured_alone(each) for each in (scores.before, scores.after)))


def evaluated(report: Report, export: ExportReport | None) -> bool:
    """Whether speed, memory and bits per weight are those of `export`: the first is measured."""
    return export is None or export == report.exports[0]


def _measured_alone(scores: Scores) -> Side:
    n_bytes = None if scores.footprint is None else scores.footprint.tensor_bytes
    return Side(scores=scores, tensor_bytes=n_bytes)
