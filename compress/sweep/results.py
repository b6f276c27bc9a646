"""What a sweep came to: its runs beside each other, and the best of them at each size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from compress.config.recipe import Recipe
from compress.errors import RecipeError
from compress.families.quantities import parse_bytes
from compress.report.comparison import (
    Differences,
    Figures,
    Measured,
    RunComparison,
    compare_runs,
    load_runs,
)
from compress.report.pages import BestRow, BestTable
from compress.report.summary import NOTHING, counted, decimal, megabytes, with_error
from compress.sweep.file import Point

HEAD = ("", "bytes", "bits", "perplexity", "KL", "top-1", "accuracy")
_MEASURED_BY = ("model", "eval_text", "eval_windows", "seq_len", "tasks", "limit", "seed")
"""Options that decide what figures compare with."""


class Aim(StrEnum):
    """What the best of several models is best in."""

    KL = "kl"
    PERPLEXITY = "perplexity"
    ACCURACY = "accuracy"


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best model that a size allows."""

    budget: str
    figures: Figures | None
    """None: none of them is that small, or was evaluated."""
    n_fitting: int


def refuse_unmeasured(points: Sequence[Point], aim: Aim) -> None:
    """Raises RecipeError naming a point whose evaluation does not tell what the best is to be best in."""
    option = "tasks" if aim is Aim.ACCURACY else "eval_windows"
    bare = next((point for point in points if not getattr(point.recipe, option)), None)
    if bare is not None:
        raise RecipeError(
            f"budgets: the best by {aim} is asked for, and {bare.name} has {option} "
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


def best_at(budgets: Sequence[str], figures: Sequence[Figures], aim: Aim) -> list[Best]:
    """For each size of the whole checkpoint the best model that is not larger; of equals the smaller."""
    found = []
    for budget in budgets:
        most = parse_bytes(budget, "budgets")
        fitting = [it for it in figures if it.n_bytes <= most and _value(it, aim) is not None]
        best = min(fitting, key=lambda it: (_loss(it, aim), it.n_bytes), default=None)
        found.append(Best(budget=budget, figures=best, n_fitting=len(fitting)))
    return found


def _loss(figures: Figures, aim: Aim) -> float:
    measured = _value(figures, aim)
    assert measured is not None  # those without are not among the fitting
    return -measured.value if aim is Aim.ACCURACY else measured.value


def _value(figures: Figures, aim: Aim) -> Measured | None:
    measured: Measured | None = getattr(figures, aim.value)
    return measured


def comparison_cells(comparison: RunComparison) -> list[tuple[str, ...]]:
    """Rows for `HEAD`: the original, then the runs in their order."""
    return [_cells(it) for it in (*comparison.originals, *comparison.figures)]


def best_lines(best: Sequence[Best], figures: Sequence[Figures], aim: Aim) -> list[str]:
    """A line for each size."""
    lines = []
    for one in best:
        if one.figures is None:
            text = _none_fits(figures)
        else:
            value = with_error(getattr(_value(one.figures, aim), "value", None), None, 4)
            text = (
                f"{one.figures.label}, {megabytes(one.figures.n_bytes)}, {aim} {value} "
                f"(best of {counted(one.n_fitting, 'point')})"
            )
        lines.append(f"{one.budget}: {text}")
    return lines


def _none_fits(figures: Sequence[Figures]) -> str:
    smallest = min(figures, key=lambda it: it.n_bytes)
    return f"none that was evaluated fits; the smallest of all is {smallest.label}, {megabytes(smallest.n_bytes)}"


def best_table(best: Sequence[Best], comparison: RunComparison, aim: Aim) -> BestTable | None:
    """The same for the page; None where no size was asked for."""
    if not best:
        return None
    numbers = {it.label: str(number) for number, it in enumerate(comparison.figures, 1)}
    rows = []
    for one in best:
        if one.figures is None:
            rows.append(BestRow(one.budget, "", _none_fits(comparison.figures), NOTHING, NOTHING))
            continue
        value = _value(one.figures, aim)
        text = NOTHING if value is None else with_error(value.value, value.stderr, 4)
        label, size = one.figures.label, megabytes(one.figures.n_bytes)
        rows.append(BestRow(one.budget, numbers[label], label, size, text))
    return BestTable(by="KL" if aim is Aim.KL else aim.value, rows=tuple(rows))


def _cells(it: Figures) -> tuple[str, ...]:
    bits = it.bits_per_weight
    return (
        it.label,
        megabytes(it.n_bytes),
        NOTHING if bits is None else f"{bits:.2f}",
        _text(it.perplexity, 3),
        _text(it.kl, 4),
        _text(it.top1_agreement, 3),
        _text(it.accuracy, 3),
    )


def _text(measured: Measured | None, digits: int) -> str:
    return NOTHING if measured is None else decimal(measured.value, digits)
