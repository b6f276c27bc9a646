"""The page of several runs: one table, size against quality, and where their recipes differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.report.card.metadata import source_name
from compress.report.comparison import Figures, Measured, RunComparison
from compress.report.pages.marks import Mark, marks_of
from compress.report.pages.pareto import pareto_figures
from compress.report.pages.rendering import render
from compress.report.pages.theme import PAGE
from compress.report.summary import NOTHING, counted, decimal, megabytes

_ABSENT = "none"


@dataclass(frozen=True)
class Cell:
    """A figure as text, and its standard error."""

    value: str
    """"-" for what was not measured."""
    stderr: str = ""


@dataclass(frozen=True)
class RunRow:
    """One run in the table."""

    number: str
    """As on the plots; empty for the original."""
    label: str
    method: str
    mark: Mark | None
    """As on the plots; None for the original."""
    cells: tuple[tuple[str, Cell], ...]
    """Each with the name of its column."""


@dataclass(frozen=True)
class BestRow:
    """The best run that a size allows, as text."""

    budget: str
    number: str
    """As in the table of runs; empty if there is none."""
    label: str
    """Of the run; or why there is none."""
    size: str
    value: str


@dataclass(frozen=True)
class BestTable:
    """The best run at each size."""

    by: str
    """What they are best in: "KL", "perplexity", "accuracy"."""
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
        n_tasks=max((one.n_tasks for one in comparison.figures), default=0),
        differences=[difference.text for difference in comparison.differences],
        figures=pareto_figures(comparison, PAGE),
        recipes=recipe_differences(comparison),
    )


def recipe_differences(comparison: RunComparison) -> list[tuple[str, list[tuple[str, str]]]]:
    """Each run's label, with those options that not all of them have alike."""
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
    cells = {
        "size": Cell(megabytes(figures.n_bytes)),
        "bits, layers": _number(figures.layer_bits_per_weight, 2),
        "bits, all": _number(figures.bits_per_weight, 2),
        "writing": _number(figures.decode_tokens_per_s, 1),
        "reading": _number(figures.prefill_tokens_per_s, 0),
        "KL": _measured(figures.kl, 4),
        "perplexity": _measured(figures.perplexity, _perplexity_digits(figures)),
        "agreement": _percent(figures.top1_agreement),
        "accuracy": _measured(figures.accuracy, 3),
    }
    return RunRow(number, figures.label, figures.method, mark, tuple(cells.items()))


def _measured(value: Measured | None, digits: int) -> Cell:
    if value is None:
        return Cell(NOTHING)
    # The original's divergence from itself has an error of zero, which says nothing.
    error = f"± {decimal(value.stderr, digits)}" if value.stderr else ""
    return Cell(decimal(value.value, digits), error)


def _perplexity_digits(figures: Figures) -> int:
    """Fewer of those that ran away."""
    value = 0.0 if figures.perplexity is None else figures.perplexity.value
    return 2 if value < 100 else 1 if value < 1000 else 0


def _percent(value: Measured | None) -> Cell:
    if value is None:
        return Cell(NOTHING)
    stderr = f"± {100 * value.stderr:.1f}" if value.stderr else ""
    return Cell(f"{100 * value.value:.1f} %", stderr)


def _number(value: float | None, digits: int) -> Cell:
    return Cell(NOTHING if value is None else f"{value:.{digits}f}")
