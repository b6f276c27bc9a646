"""The page of several runs: one table, size against quality, and where their recipes differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.report.card.names import source_name
from compress.report.comparison import Figures, RunComparison
from compress.report.metrics import Metric, Shown, shown_in
from compress.report.numbers import NOTHING, Written, counted
from compress.report.pages.marks import Mark, marks_of
from compress.report.pages.pareto import pareto_figures
from compress.report.pages.rendering import render
from compress.report.pages.theme import PAGE

_ABSENT = "none"


@dataclass(frozen=True)
class RunRow:
    """One run in the table."""

    number: str
    """Number on the plots; empty for the original."""
    label: str
    method: str
    mark: Mark | None
    """Mark on the plots; None for the original."""
    cells: tuple[tuple[str, Written], ...]
    """Heads of columns with their values."""


@dataclass(frozen=True)
class BestRow:
    """The best run that a size allows, as text."""

    budget: str
    number: str
    """Number in the table of runs; empty if no run fits."""
    label: str
    """Label of the run, or why no run fits."""
    size: str
    value: str


@dataclass(frozen=True)
class BestTable:
    """The best run at each size."""

    by: str
    """Short name of the metric that they are best in."""
    rows: tuple[BestRow, ...]


def comparison_page(comparison: RunComparison, best: BestTable | None = None) -> str:
    """Runs beside each other as one HTML file that fetches nothing and prints.

    `best`: of a sweep that was asked for the best run at some sizes.
    """
    n_runs = len(comparison.runs)
    models = list(dict.fromkeys(source_name(run.report) for run in comparison.runs))
    marks = marks_of([one.method for one in comparison.figures], PAGE)
    return render(
        "comparison.html",
        title=f"{counted(n_runs, 'run')} on {', '.join(models)}",
        models=models,
        n_runs=counted(n_runs, "run"),
        best=best,
        marks=marks.values(),
        rows=[
            *(_row("", one, None) for one in comparison.originals),
            *(
                _row(str(number), one, marks[one.method])
                for number, one in enumerate(comparison.figures, 1)
            ),
        ],
        metrics=shown_in(Shown.TABLE),
        n_tasks=max((one.n_tasks for one in comparison.figures), default=0),
        differences=[difference.text for difference in comparison.differences],
        figures=pareto_figures(comparison, PAGE),
        recipes=recipe_differences(comparison),
    )


def recipe_differences(comparison: RunComparison) -> list[tuple[str, list[tuple[str, str]]]]:
    """Labels of runs with the options in which the runs differ."""
    recipes = [dict(_options(run.report.recipe, "")) for run in comparison.runs]
    names = list(dict.fromkeys(name for recipe in recipes for name in recipe))
    differing = [
        name
        for name in names
        if name != "out" and len({recipe.get(name) for recipe in recipes}) > 1
    ]
    return [
        (run.label, [(name, recipe[name]) for name in differing if name in recipe])
        for run, recipe in zip(comparison.runs, recipes, strict=True)
    ]


def _options(value: Mapping[str, Any], path: str) -> Iterator[tuple[str, str]]:
    """Options by their full names: `method.base.bits`."""
    for key, inner in value.items():
        name = f"{path}{key}"
        if isinstance(inner, Mapping):
            yield from _options(inner, f"{name}.")
        elif isinstance(inner, Sequence) and not isinstance(inner, str):
            yield name, ", ".join(map(str, inner)) or _ABSENT
        else:
            yield name, _ABSENT if inner is None else str(inner)


def _row(number: str, figures: Figures, mark: Mark | None) -> RunRow:
    cells = ((it.column, _written(it, figures)) for it in shown_in(Shown.TABLE))
    return RunRow(number, figures.label, figures.method, mark, tuple(cells))


def _written(metric: Metric, figures: Figures) -> Written:
    measured = figures.values.get(metric.key)
    return Written(NOTHING) if measured is None else metric.format(measured)
