"""The result of a run in a dozen rows, before and after: for the terminal and the model card."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.table import Table

from compress.report.metrics import Shown, shown_in
from compress.report.numbers import NOTHING, with_error
from compress.report.report import Comparison, ExportReport, Report
from compress.report.sides import Sides, sides_of, sides_of_scores
from eval.scores import TaskScore, primary


@dataclass(frozen=True)
class Row:
    """One figure of the original and of the export, as text."""

    label: str
    before: str
    after: str


def rows(report: Report, export: ExportReport | None = None) -> list[Row]:
    """The rows of the summary; without an evaluation only the sizes.

    They tell the size of `export` (None: the first), and its speed only if it was the one measured.
    """
    return [*_metric_rows(sides_of(report, export)), *_task_rows(report.scores)]


def comparison_rows(scores: Comparison) -> list[Row]:
    """The rows of an evaluation alone."""
    return [*_metric_rows(sides_of_scores(scores)), *_task_rows(scores)]


def table(rows: list[Row], title: str) -> Table:
    """The rows as a table for a terminal."""
    drawn = Table(title=title, title_justify="left")
    drawn.add_column("")
    drawn.add_column("before", justify="right")
    drawn.add_column("after", justify="right")
    for row in rows:
        drawn.add_row(row.label, row.before, row.after)
    return drawn


def lines(rows: list[Row]) -> list[str]:
    """The rows as lines of aligned text, for a log."""
    head = Row("", "before", "after")
    widths = [
        max(len(part) for part in column)
        for column in zip(*map(_cells, [head, *rows]), strict=True)
    ]
    return [
        f"{row.label:<{widths[0]}}  {row.before:>{widths[1]}}  {row.after:>{widths[2]}}"
        for row in [head, *rows]
    ]


def _metric_rows(sides: Sides) -> Iterator[Row]:
    """A row for each metric that was measured on one of the two models."""
    for metric in shown_in(Shown.SUMMARY):
        before, after = metric.before(sides), metric.after(sides)
        if before is not None or after is not None:
            yield Row(metric.title, metric.text(before), metric.text(after))


def _task_rows(scores: Comparison | None) -> Iterator[Row]:
    if scores is None:
        return
    reached = {(score.task, score.metric): score for score in scores.after.tasks}
    for score in primary(scores.before.tasks).values():
        other = reached.get((score.task, score.metric))
        label = f"{score.task}, {score.metric} ({score.n_items} items)"
        yield Row(label, _task_text(score), _task_text(other) if other else NOTHING)


def _task_text(score: TaskScore) -> str:
    return with_error(score.value, score.stderr, 3)


def _cells(row: Row) -> tuple[str, str, str]:
    return row.label, row.before, row.after
