"""Scores: means, paired differences, the metric shown first."""

import math
import statistics
from dataclasses import replace

import pytest

from eval.errors import EvalError
from eval.scores import TaskScore, mean_and_stderr, paired_difference, primary


def score(values: tuple[float, ...], metric: str = "acc", task: str = "t") -> TaskScore:
    mean, stderr = mean_and_stderr(values)
    return TaskScore(
        task=task,
        metric=metric,
        value=mean,
        stderr=stderr,
        n_items=len(values),
        version="1.0",
        higher_is_better=True,
        per_item=values,
    )


def test_mean_and_standard_error_are_the_textbook_ones() -> None:
    values = (0.0, 1.0, 1.0, 0.0, 1.0)
    mean, stderr = mean_and_stderr(values)
    assert mean == statistics.fmean(values)
    assert stderr == pytest.approx(statistics.stdev(values) / math.sqrt(5))
    assert mean_and_stderr((3.0,)) == (3.0, None)


def test_paired_difference_is_the_mean_of_the_differences() -> None:
    before, after = score((1.0, 1.0, 0.0, 1.0)), score((1.0, 0.0, 0.0, 1.0))
    difference, stderr = paired_difference(after, before)
    assert difference == -0.25
    assert stderr == pytest.approx(statistics.stdev([0, -1, 0, 0]) / 2)


def test_equal_answers_differ_by_exactly_nothing() -> None:
    both = score((1.0, 0.0, 1.0))
    assert paired_difference(both, both) == (0.0, 0.0)


@pytest.mark.parametrize("change", [{"task": "u"}, {"version": "2"}, {"n_items": 4}])
def test_scores_on_other_items_are_not_compared(change: dict[str, object]) -> None:
    before = score((1.0, 0.0, 1.0))
    with pytest.raises(EvalError, match=next(iter(change))):
        paired_difference(replace(before, **change), before)  # type: ignore[arg-type]


def test_a_metric_without_items_is_not_compared() -> None:
    before = replace(score((1.0, 0.0)), per_item=())
    with pytest.raises(EvalError, match="no score for each item"):
        paired_difference(before, before)


def test_acc_norm_is_shown_first_where_there_is_one() -> None:
    scores = [score((1.0,), "acc"), score((0.0,), "acc_norm"), score((1.0,), "perplexity", "p")]
    assert {task: s.metric for task, s in primary(scores).items()} == {
        "t": "acc_norm",
        "p": "perplexity",
    }
