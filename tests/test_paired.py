"""Paired statistics: equal to scipy and statsmodels, and intervals that hold the truth as often as they say."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from eval.errors import EvalError
from eval.holm import holm
from eval.paired import (
    NO_CHANGE,
    TOO_FEW,
    change_interval,
    corrected,
    mcnemar_p,
    mean_change,
    perplexity_ratio,
    task_change,
)
from eval.scores import Fidelity, TaskScore, WindowSums, mean_and_stderr, paired_difference


def score(values: Sequence[float], task: str = "t") -> TaskScore:
    mean, stderr = mean_and_stderr(values)
    return TaskScore(
        task=task,
        metric="acc",
        value=mean,
        stderr=stderr,
        n_items=len(values),
        version="1.0",
        higher_is_better=True,
        per_item=tuple(values),
    )


def answers(n_both: int, n_worse: int, n_better: int, n_neither: int) -> tuple[TaskScore, ...]:
    """Scores before and after of items that both answer, only the first, only the second, none."""
    before = [1.0] * (n_both + n_worse) + [0.0] * (n_better + n_neither)
    after = [1.0] * n_both + [0.0] * n_worse + [1.0] * n_better + [0.0] * n_neither
    return score(before), score(after)


def fidelity(nlls: Sequence[float], counts: Sequence[int]) -> Fidelity:
    parts = tuple(WindowSums(m, s, 0.0, 0) for s, m in zip(nlls, counts, strict=True))
    perplexity = math.exp(math.fsum(nlls) / sum(counts))
    return Fidelity(perplexity, None, 0.0, None, 1.0, None, sum(counts), parts)


@pytest.mark.parametrize(
    "counts", [(60, 12, 5, 23), (60, 2, 9, 29), (0, 1, 0, 0), (40, 0, 6, 4), (10, 8, 8, 0)]
)
def test_mcnemar_equals_statsmodels(counts: tuple[int, int, int, int]) -> None:
    both, worse, better, neither = counts
    before, after = answers(*counts)
    expected = mcnemar([[both, worse], [better, neither]], exact=True).pvalue
    pairs = list(zip(after.per_item, before.per_item, strict=True))
    assert mcnemar_p(pairs) == pytest.approx(expected, rel=1e-12)


def test_items_that_never_changed_have_p_one_and_scores_that_are_shares_have_none() -> None:
    assert mcnemar_p([(1.0, 1.0), (0.0, 0.0)]) == 1.0
    assert mcnemar_p([(1.0, 0.5), (0.0, 0.0)]) is None


def test_the_change_is_the_paired_difference_of_the_scores() -> None:
    before, after = answers(60, 12, 5, 23)
    found = task_change(before, after)
    assert found.change == paired_difference(after, before)[0] == pytest.approx(-0.07)
    assert (found.n_items, found.n_up, found.n_down) == (100, 5, 12)
    assert found == task_change(before, after)


def test_the_interval_of_many_shares_equals_that_of_scipy() -> None:
    differences = np.random.default_rng(5).exponential(1.0, size=400) - 0.9
    found = change_interval([differences.tolist()], seed=0)
    expected = stats.bootstrap(
        (differences,), np.mean, method="percentile", rng=1
    ).confidence_interval
    assert found is not None
    width = expected.high - expected.low
    assert found.low == pytest.approx(expected.low, abs=0.03 * width)
    assert found.high == pytest.approx(expected.high, abs=0.03 * width)


def test_the_interval_of_few_values_is_wider_than_scipys_by_what_student_adds() -> None:
    differences = np.random.default_rng(5).normal(size=8)
    found = change_interval([differences.tolist()], seed=0)
    wide = stats.norm.cdf(-math.sqrt(8 / 7) * stats.t.ppf(0.975, 7))
    expected = stats.bootstrap(
        (differences,), np.mean, method="percentile", confidence_level=1 - 2 * wide, rng=1
    ).confidence_interval
    assert found is not None
    width = expected.high - expected.low
    assert found.low == pytest.approx(expected.low, abs=0.03 * width)
    assert found.high == pytest.approx(expected.high, abs=0.03 * width)


def test_right_and_wrong_answers_are_drawn_with_half_a_change_either_way() -> None:
    before, after = answers(90, 6, 1, 3)
    differences = np.subtract(after.per_item, before.per_item)
    # Each item twice and one of each sign: the shares of a pool that has half an item more of each.
    pool = np.concatenate([differences, differences, [1.0, -1.0]])
    means = np.random.default_rng(1).choice(pool, size=(20_000, 100)).mean(axis=1)
    found = task_change(before, after).interval
    assert found is not None
    assert found.low == pytest.approx(np.quantile(means, 0.025), abs=0.011)
    assert found.high == pytest.approx(np.quantile(means, 0.975), abs=0.011)


COVERAGES = [
    (100, 0.05, 0.02, 0.93, 0.97),
    (300, 0.03, 0.01, 0.93, 0.97),
    (300, 0.02, 0.02, 0.93, 0.97),
    # So few change that an interval which is safe holds the truth more often than it says.
    (100, 0.02, 0.02, 0.95, 1.0),
    (100, 0.04, 0.0, 0.95, 1.0),
]


@pytest.mark.slow
@pytest.mark.parametrize(("n", "better", "worse", "least", "most"), COVERAGES)
def test_intervals_of_answers_hold_the_truth_as_often_as_they_say(
    n: int, better: float, worse: float, least: float, most: float
) -> None:
    held = seen = 0.0
    for n_better, n_worse in itertools.product(likely(n, better), likely(n, worse)):
        counts = [n_better, n_worse, n - n_better - n_worse]
        chance = stats.multinomial.pmf(counts, n, [better, worse, 1 - better - worse])
        if chance < 1e-4:
            continue
        differences = [1.0] * n_better + [-1.0] * n_worse + [0.0] * counts[2]
        interval = change_interval([differences], seed=0)
        assert interval is not None
        held += chance * interval.holds(better - worse)
        seen += chance
    assert seen > 0.98
    assert least <= held / seen <= most


def likely(n: int, share: float) -> range:
    """The counts that a binomial has nearly always."""
    return range(int(stats.binom.ppf(5e-4, n, share)), int(stats.binom.ppf(1 - 5e-4, n, share)) + 1)


@pytest.mark.slow
def test_intervals_of_perplexity_ratios_hold_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(3)
    counts, trials = [100] * 16, 400
    held = 0
    for seed in range(trials):
        before = generator.normal(300, 30, size=16)
        lost = generator.normal(5, 4, size=16)
        ratio = perplexity_ratio(
            fidelity(before.tolist(), counts), fidelity((before + lost).tolist(), counts), seed
        )
        assert ratio.interval is not None
        held += ratio.interval.holds(math.exp(0.05))
    assert 0.93 <= held / trials <= 0.97


def test_the_perplexity_ratio_is_that_of_the_perplexities_and_its_interval_scipys() -> None:
    generator = np.random.default_rng(0)
    counts = generator.integers(50, 150, size=60)
    before = 3 * counts + generator.normal(0, 9, size=60)
    after = before + 0.1 * counts + generator.normal(0, 5, size=60)
    a, b = fidelity(before.tolist(), counts.tolist()), fidelity(after.tolist(), counts.tolist())
    found = perplexity_ratio(a, b)
    assert found.ratio == pytest.approx(b.perplexity / a.perplexity, rel=1e-12)
    tail = stats.norm.cdf(-math.sqrt(60 / 59) * stats.t.ppf(0.975, 59))
    expected = stats.bootstrap(
        (after - before, counts),
        lambda lost, tokens: math.exp(lost.sum() / tokens.sum()),
        paired=True,
        vectorized=False,
        method="percentile",
        confidence_level=1 - 2 * tail,
        rng=1,
    ).confidence_interval
    assert found.interval is not None
    width = expected.high - expected.low
    assert found.interval.low == pytest.approx(expected.low, abs=0.03 * width)
    assert found.interval.high == pytest.approx(expected.high, abs=0.03 * width)
    assert found.verdict == "significantly worse"


def test_the_mean_of_tasks_weighs_them_equally_and_draws_each_alone() -> None:
    rare, common = answers(300, 0, 0, 100), answers(50, 20, 0, 30)
    found = mean_change([rare[0], common[0]], [rare[1], common[1]])
    assert found.change == pytest.approx(-0.1)
    assert found.verdict == "significantly worse"
    spread = math.sqrt(0.2 * 0.8 / 100) / 2
    assert found.interval is not None
    assert found.interval.high - found.interval.low == pytest.approx(3.92 * spread, rel=0.1)


def test_a_ratio_whose_interval_no_number_holds_ends_at_the_largest() -> None:
    counts = [10] * 10
    wild = replace(fidelity([100.0] * 10, counts))
    nlls = [100.0] * 5 + [9000.0] * 5
    windows = tuple(replace(it, nll=nll) for it, nll in zip(wild.windows, nlls, strict=True))
    found = perplexity_ratio(fidelity([1.0] * 10, counts), replace(wild, windows=windows))
    assert found.interval is not None
    assert found.interval.low < found.ratio < found.interval.high == math.exp(700)


def test_an_item_alone_has_no_interval() -> None:
    before, after = answers(0, 1, 0, 0)
    found = task_change(before, after)
    assert (found.interval, found.p_value, found.verdict) == (None, 1.0, TOO_FEW)
    window = fidelity([30.0], [10])
    assert perplexity_ratio(window, window).interval is None
    assert perplexity_ratio(window, window).verdict == TOO_FEW


@pytest.mark.parametrize("n", [5, 6])
def test_fewer_than_six_values_are_too_few_to_tell(n: int) -> None:
    """Five of one sign may come by chance once in sixteen times, six once in 32."""
    tells = n == 6
    steps = [0.1 * number for number in range(1, n + 1)]
    found = task_change(score([0.0] * n), score(steps))
    assert (found.interval is not None) == (found.verdict != TOO_FEW) == tells
    ratio = perplexity_ratio(fidelity([20.0] * n, [10] * n), fidelity([30.0] * n, [10] * n))
    assert (ratio.interval is not None) == (ratio.verdict != TOO_FEW) == tells


def test_answers_that_did_not_change_leave_room_for_some_that_would() -> None:
    before, after = answers(60, 0, 0, 40)
    found = task_change(before, after)
    assert (found.change, found.p_value, found.verdict) == (0.0, 1.0, NO_CHANGE)
    assert found.interval is not None
    assert found.interval.low < 0 < found.interval.high


def test_equal_shares_have_an_interval_without_width() -> None:
    before, after = score([0.25, 0.5] * 3), score([0.5, 0.75] * 3)
    found = task_change(before, after)
    assert found.p_value is None
    assert found.interval is not None
    assert (found.interval.low, found.interval.high) == pytest.approx((0.25, 0.25))
    assert found.verdict == "significantly better"


def test_lower_is_better_where_the_metric_says_so() -> None:
    before, after = (replace(each, higher_is_better=False) for each in answers(50, 0, 20, 30))
    assert task_change(before, after).verdict == "significantly worse"


@pytest.mark.parametrize(
    "p_values", [(0.01, 0.04, 0.03), (0.5,), (0.04, 0.04, 1.0, 0.001, 0.6), (0.9, 0.8), ()]
)
def test_holms_correction_equals_statsmodels(p_values: tuple[float, ...]) -> None:
    expected = multipletests(p_values, method="holm")[1].tolist() if p_values else []
    assert holm(p_values) == pytest.approx(expected, rel=1e-12)


def test_a_change_that_is_significant_alone_need_not_be_among_several() -> None:
    alone = task_change(*answers(80, 8, 1, 11))
    assert alone.p_value is not None and 0.025 < alone.p_value < 0.05
    assert corrected([alone]) == [alone]
    assert alone.verdict == "significantly worse"
    other = task_change(*answers(80, 2, 2, 16))
    item = task_change(*answers(0, 1, 0, 0))
    found = corrected([other, alone, item])
    assert [it.holm_p for it in found] == [1.0, pytest.approx(2 * alone.p_value), None]
    assert [it.verdict for it in found] == [NO_CHANGE, NO_CHANGE, TOO_FEW]
    clear = task_change(*answers(60, 30, 1, 9))
    assert corrected([other, clear])[1].verdict == "significantly worse"


@pytest.mark.parametrize("shift", [0.0, 0.2, 0.26, 0.32, 0.4])
def test_the_p_of_shares_and_their_interval_say_the_same(shift: float) -> None:
    differences = np.random.default_rng(3).normal(size=60) + shift
    found = task_change(score([0.0] * 60), score(differences.tolist()))
    assert found.p_value is None and found.interval is not None and found.tested_p is not None
    assert (found.tested_p < 0.05) == (not found.interval.holds(0.0))
    expected = stats.ttest_1samp(differences, 0.0).pvalue
    assert found.tested_p == pytest.approx(expected, rel=0.25, abs=0.002)


def test_what_is_not_paired_is_refused() -> None:
    with pytest.raises(EvalError, match="n_items 3 and 2"):
        task_change(score([1.0, 0.0]), score([1.0, 0.0, 1.0]))
    with pytest.raises(EvalError, match="1 and 2 windows"):
        perplexity_ratio(fidelity([3.0], [2]), fidelity([3.0, 3.0], [2, 2]))
    with pytest.raises(EvalError, match="0 and 0 tasks"):
        mean_change([], [])
