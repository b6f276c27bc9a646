"""Results of a sweep: its runs beside each other, and the best of them at each size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.config.recipe import Recipe
from compress.errors import RecipeError
from compress.families.budget import parse_bytes
from compress.report.comparison import (
    Differences,
    Figures,
    RunComparison,
    compare_runs,
    load_runs,
)
from compress.report.metrics import Metric, Shown, shown_in
from compress.report.numbers import NOTHING, Measured, counted, megabytes
from compress.report.pages import BestRow, BestTable
from compress.sweep.file import Point

_MEASURED_BY = ("model", "eval_text", "eval_windows", "seq_len", "tasks", "limit", "seed")
"""Options that decide what figures compare with."""


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best model that a size allows."""

    budget: str
    figures: Figures | None
    """Values of the best model; None if no evaluated model is that small."""
    n_fitting: int


def refuse_unmeasured(points: Sequence[Point], by: Metric) -> None:
    """Raises RecipeError naming a point whose evaluation does not measure the metric `by`."""
    option = by.option
    if option is None:
        return
    bare = next((point for point in points if not getattr(point.recipe, option)), None)
    if bare is not None:
        raise RecipeError(
            f"budgets: the best by {by.key} is asked for, and {bare.name} has {option} "
            f"{getattr(bare.recipe, option) or 'none'}; give it some, or choose by another figure (--by)"
        )


def compare_points(points: Sequence[Point], folders: Sequence[Path]) -> RunComparison:
    """The runs in these folders; where the points themselves ask for different evaluations, that is only told.

    Raises ComparisonError where an evaluation differs though the recipes do not: of older versions, say.
    """
    return compare_runs(load_runs(folders), _differences([point.recipe for point in points]))


def _differences(recipes: Sequence[Recipe]) -> Differences:
    asked = any(len({getattr(it, name) for it in recipes}) > 1 for name in _MEASURED_BY)
    return Differences.TELL if asked else Differences.REFUSE


def best_at(budgets: Sequence[str], figures: Sequence[Figures], by: Metric) -> list[Best]:
    """For each size of the whole checkpoint the best model that is not larger; of equals the smaller."""
    found = []
    for budget in budgets:
        most = parse_bytes(budget, "budgets")
        fitting = [it for it in figures if it.n_bytes <= most and by.key in it.values]
        best = min(
            fitting, key=lambda it: (by.loss(it.values[by.key].value), it.n_bytes), default=None
        )
        found.append(Best(budget=budget, figures=best, n_fitting=len(fitting)))
    return found


def comparison_head() -> tuple[str, ...]:
    """The heads of the columns of `comparison_cells`."""
    return ("", *(metric.heading for metric in shown_in(Shown.TABLE)))


def comparison_cells(comparison: RunComparison) -> list[tuple[str, ...]]:
    """Rows for `comparison_head`: the original, then the runs in their order; without standard errors."""
    return [_cells(it) for it in (*comparison.originals, *comparison.figures)]


def best_lines(best: Sequence[Best], figures: Sequence[Figures], by: Metric) -> list[str]:
    """A line for each size."""
    lines = []
    for one in best:
        if one.figures is None:
            text = _none_fits(figures)
        else:
            value = by.text(Measured(one.figures.values[by.key].value))
            text = (
                f"{one.figures.label}, {megabytes(one.figures.n_bytes)}, {by.column} {value} "
                f"(best of {counted(one.n_fitting, 'point')})"
            )
        lines.append(f"{one.budget}: {text}")
    return lines


def _none_fits(figures: Sequence[Figures]) -> str:
    smallest = min(figures, key=lambda it: it.n_bytes)
    return f"none that was evaluated fits; the smallest of all is {smallest.label}, {megabytes(smallest.n_bytes)}"


def best_table(best: Sequence[Best], comparison: RunComparison, by: Metric) -> BestTable | None:
    """The best models as a table of the page; None where no size was asked for."""
    if not best:
        return None
    numbers = {it.label: str(number) for number, it in enumerate(comparison.figures, 1)}
    rows = []
    for one in best:
        if one.figures is None:
            rows.append(BestRow(one.budget, "", _none_fits(comparison.figures), NOTHING, NOTHING))
            continue
        text = by.text(one.figures.values[by.key])
        label, size = one.figures.label, megabytes(one.figures.n_bytes)
        rows.append(BestRow(one.budget, numbers[label], label, size, text))
    return BestTable(by=by.column, rows=tuple(rows))


def _cells(it: Figures) -> tuple[str, ...]:
    return (it.label, *(_text(metric, it) for metric in shown_in(Shown.TABLE)))


def _text(metric: Metric, figures: Figures) -> str:
    measured = figures.values.get(metric.key)
    return metric.text(None if measured is None else Measured(measured.value))
