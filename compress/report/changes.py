"""Paired differences of the scores in a report with their significance, as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from compress.report.metrics import Shown, difference_changed, shown_in
from compress.report.report import Comparison
from compress.report.sides import sides_of_scores
from eval.paired import LEAST_VALUES, LEVEL, PairedChange, corrected, task_change
from eval.scores import TaskScore, primary

INTERVAL_NAME = f"{LEVEL:.0%} interval"


@dataclass(frozen=True)
class Change:
    """One score's change as text."""

    label: str
    change: str
    interval: str
    """Empty where it is not known."""
    verdict: str


def changes(scores: Comparison) -> list[Change]:
    """The changes of the summary's metrics and of the metric that each task shows first.

    A score that is no mean over items is left out, as are those of reports that kept no parts of them: nothing can be
    paired.
    """
    return [*_metrics(scores), *_tasks(scores)]


def task_changes(scores: Comparison) -> list[tuple[TaskScore, PairedChange]]:
    """The metric that each task shows first, before compression, and its change, corrected for how many there are."""
    known = _paired(scores)
    found = corrected([task_change(before, after) for before, after in known])
    return [(before, change) for (before, _), change in zip(known, found, strict=True)]


def correction_text(scores: Comparison) -> str:
    """How p-values are corrected for several tasks; empty where at most one was tested."""
    n = sum(before.n_items >= LEAST_VALUES for before, _ in _paired(scores))
    if n < 2:
        return ""
    return f"p-values are Holm-corrected over {n} tasks."


def _paired(scores: Comparison) -> list[tuple[TaskScore, TaskScore]]:
    """Scores before and after of the tasks whose items are known."""
    reached = {(score.task, score.metric): score for score in scores.after.tasks}
    pairs = (
        (before, reached.get((before.task, before.metric)))
        for before in primary(scores.before.tasks).values()
    )
    return [
        (before, after)
        for before, after in pairs
        if after is not None and len(before.per_item) == len(after.per_item) > 0
    ]


def _metrics(scores: Comparison) -> Iterator[Change]:
    sides = sides_of_scores(scores)
    for metric in shown_in(Shown.SUMMARY):
        found = metric.changed(sides)
        if found is not None:
            yield Change(metric.label, found.text, found.interval_text, found.verdict)


def _tasks(scores: Comparison) -> Iterator[Change]:
    for score, found in task_changes(scores):
        verdict = found.verdict
        if found.tested_p is not None:
            verdict += f" ({_tested(found)})"
        changed = difference_changed(found)
        label = f"{score.task}, {score.metric}"
        yield Change(label, changed.text, changed.interval_text, verdict)


def _tested(found: PairedChange) -> str:
    """McNemar's p, or else the bootstrap's, and the p after Holm's correction."""
    told = "" if found.tested_p is None else f"p {p_text(found.tested_p)}"
    return told if found.holm_p is None else f"{told}, Holm-corrected {p_text(found.holm_p)}"


def p_text(p_value: float) -> str:
    """A p-value after its sign: "= 0.031", "< 0.001"."""
    return "< 0.001" if p_value < 0.001 else f"= {p_value:.3f}"
