"""The mean accuracy over tasks. Tasks weigh the same, however many items they have."""

from __future__ import annotations

import math
from collections.abc import Sequence

from eval.scores import ACCURACY, Scores, TaskScore, primary

_ACCURACIES = {"acc", "acc_norm", "exact_match"}


def accuracies(scores: Scores, asked: Sequence[str]) -> tuple[TaskScore, ...]:
    """The accuracy of each task that shows one first.

    Where `asked` names tasks that were scored, only those: a group's members are in the group's own score.
    """
    found = {
        name: score
        for name, score in primary(scores.tasks).items()
        if score.metric.partition(",")[0] in _ACCURACIES or name == ACCURACY
    }
    named = tuple(found[name] for name in asked if name in found)
    return named if named else tuple(found.values())


def mean_accuracy(tasks: Sequence[TaskScore]) -> tuple[float, float | None]:
    """The mean of tasks, at least one, and its standard error.

    Tasks have no item in common, so their errors add in squares; None if one of them is not known.
    """
    value = math.fsum(task.value for task in tasks) / len(tasks)
    errors = [task.stderr for task in tasks if task.stderr is not None]
    known = len(errors) == len(tasks)
    return value, math.hypot(*errors) / len(tasks) if known else None
