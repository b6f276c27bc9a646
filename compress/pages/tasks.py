"""Task scores before and after, with the difference on the same items."""

from __future__ import annotations

from dataclasses import dataclass

from compress.pages.figures import Difference, Figure, differences
from compress.pages.theme import Palette
from compress.report import Report
from compress.summary import with_error
from eval.scores import TaskScore, paired_difference, primary

_NORMAL_95 = 1.96


@dataclass(frozen=True)
class TaskRow:
    """One task by the metric that is shown first."""

    task: str
    metric: str
    n_items: int
    before: str
    after: str
    change: Difference | None
    """None where the metric has no value for each item."""
    verdict: str

    @property
    def interval(self) -> str:
        """Both ends of the difference's 95 % interval, in points."""
        if self.change is None or self.change.low is None or self.change.high is None:
            return "-"
        return f"{_points(self.change.low)} to {_points(self.change.high)}"


def task_rows(report: Report) -> list[TaskRow]:
    """The tasks that both models were scored on."""
    if report.scores is None:
        return []
    after = {(score.task, score.metric): score for score in report.scores.after.tasks}
    return [
        _row(score, after[score.task, score.metric])
        for score in primary(report.scores.before.tasks).values()
        if (score.task, score.metric) in after
    ]


def tasks_figure(report: Report, palette: Palette) -> Figure:
    """The differences with their intervals."""
    title = "Change of each task's score"
    changes = [row.change for row in task_rows(report) if row.change is not None]
    if not changes:
        return Figure(title, None, "No task has a score for each item, so no difference is known.")
    told = "Compressed less original on the same items, with 95 % intervals. Left of the line is worse."
    return Figure(title, differences(changes, palette), told)


def _row(before: TaskScore, after: TaskScore) -> TaskRow:
    change, verdict = None, "-"
    if before.per_item and after.per_item:
        value, stderr = paired_difference(after, before)
        reach = None if stderr is None else _NORMAL_95 * stderr
        low, high = (None, None) if reach is None else (value - reach, value + reach)
        verdict = (
            "no significant change"
            if low is None or high is None or low <= 0 <= high
            else "changed"
        )
        change = Difference(before.task, _points(value), value, low, high)
    return TaskRow(
        before.task,
        before.metric,
        before.n_items,
        with_error(before.value, before.stderr, 3),
        with_error(after.value, after.stderr, 3),
        change,
        verdict,
    )


def _points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")
