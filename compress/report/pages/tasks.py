"""Task scores before and after, with the difference on the same items."""

from __future__ import annotations

from dataclasses import dataclass, replace

from compress.report.changes import p_text, task_changes
from compress.report.numbers import NOTHING, with_error
from compress.report.pages.figures import Difference, Figure, differences
from compress.report.pages.theme import Palette
from compress.report.report import Report
from eval.paired import PairedChange
from eval.scores import TaskScore, primary


@dataclass(frozen=True)
class TaskRow:
    """One task by the metric that is shown first, as text; "-" for what is not known."""

    task: str
    metric: str
    n_items: int
    before: str
    after: str
    change: str
    interval: str
    p_value: str
    holm: str
    """The p after Holm's correction; "-" for a task that was tested alone."""
    verdict: str
    difference: Difference | None
    """For the chart; None where the score is not a share of the items."""


def task_rows(report: Report) -> list[TaskRow]:
    """The tasks that both models were scored on."""
    if report.scores is None:
        return []
    after = {(score.task, score.metric): score for score in report.scores.after.tasks}
    found = {score.task: change for score, change in task_changes(report.scores)}
    return [
        _row(score, after[score.task, score.metric], found.get(score.task))
        for score in primary(report.scores.before.tasks).values()
        if (score.task, score.metric) in after
    ]


def tasks_figure(report: Report, palette: Palette) -> Figure:
    """The differences of scores that are shares of the items, with their intervals."""
    title = "Change of each task's score"
    shown = [row.difference for row in task_rows(report) if row.difference is not None]
    if not shown:
        return Figure(title, None, "No task has a score between 0 and 1 for each item.")
    told = "Difference of the scores, after − before, on the same items, with 95% intervals."
    return Figure(title, differences(shown, palette), told)


def signed(value: float) -> str:
    """A change to a tenth, with its sign: "+4.9"."""
    return f"{value:+.1f}".replace("-", "−")


def _row(before: TaskScore, after: TaskScore, found: PairedChange | None) -> TaskRow:
    row = TaskRow(
        task=before.task,
        metric=before.metric,
        n_items=before.n_items,
        before=with_error(before.value, before.stderr, 3),
        after=with_error(after.value, after.stderr, 3),
        change=NOTHING,
        interval=NOTHING,
        p_value=NOTHING,
        holm=NOTHING,
        verdict="no score for each item",
        difference=None,
    )
    return row if found is None else _compared(row, before, after, found)


def _compared(row: TaskRow, before: TaskScore, after: TaskScore, found: PairedChange) -> TaskRow:
    """The row with its paired difference: in points where scores are shares, else in the metric's own unit."""
    is_share = all(0 <= score <= 1 for score in (*before.per_item, *after.per_item))
    unit = 100 if is_share else 1
    interval = NOTHING
    if found.interval is not None:
        interval = f"{signed(unit * found.interval.low)} to {signed(unit * found.interval.high)}"
    change = signed(unit * found.change)
    return replace(
        row,
        change=f"{change} points" if is_share else change,
        interval=interval,
        p_value=_p(found.tested_p),
        holm=_p(found.holm_p),
        verdict=found.verdict,
        difference=_drawn(row.task, f"{change} ({interval})", found) if is_share else None,
    )


def _p(value: float | None) -> str:
    return NOTHING if value is None else p_text(value).removeprefix("= ")


def _drawn(task: str, text: str, found: PairedChange) -> Difference:
    low, high = (None, None) if found.interval is None else vars(found.interval).values()
    return Difference(task, text, found.change, low, high)
