"""The page of several runs: one table, size against quality, and where their recipes differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.card_metadata import source_name
from compress.comparing import Figures, Measured, RunComparison
from compress.pages.pareto import pareto_figures
from compress.pages.rendering import render
from compress.pages.theme import PAGE
from compress.summary import NOTHING, counted, megabytes, with_error

_ABSENT = "none"


@dataclass(frozen=True)
class RunRow:
    """One run in the table, as text; "-" for what was not measured."""

    number: str
    """As on the plots; empty for the original."""
    label: str
    method: str
    cells: tuple[str, ...]


COLUMNS = (
    "size",
    "bits, layers",
    "bits, all",
    "KL",
    "perplexity",
    "agreement",
    "accuracy",
    "writing",
    "reading",
)


def comparison_page(comparison: RunComparison) -> str:
    """Runs beside each other as one HTML file that fetches nothing and prints."""
    n_runs = len(comparison.runs)
    models = list(dict.fromkeys(source_name(run.report) for run in comparison.runs))
    return render(
        "comparison.html",
        title=f"{counted(n_runs, 'run')} on {', '.join(models)}",
        models=models,
        n_runs=counted(n_runs, "run"),
        columns=COLUMNS,
        rows=[
            *(_row("", one) for one in comparison.originals),
            *(_row(str(number), one) for number, one in enumerate(comparison.figures, 1)),
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


def _row(number: str, figures: Figures) -> RunRow:
    cells = (
        megabytes(figures.n_bytes),
        _number(figures.layer_bits_per_weight, 2),
        _number(figures.bits_per_weight, 2),
        _measured(figures.kl, 4),
        _measured(figures.perplexity, 2),
        _percent(figures.top1_agreement),
        _measured(figures.accuracy, 3),
        _number(figures.decode_tokens_per_s, 1),
        _number(figures.prefill_tokens_per_s, 0),
    )
    return RunRow(number, figures.label, figures.method, cells)


def _measured(value: Measured | None, digits: int) -> str:
    # The original's divergence from itself has an error of zero, which says nothing.
    return NOTHING if value is None else with_error(value.value, value.stderr or None, digits)


def _percent(value: Measured | None) -> str:
    if value is None:
        return NOTHING
    stderr = None if not value.stderr else 100 * value.stderr
    return f"{with_error(100 * value.value, stderr, 1)}%"


def _number(value: float | None, digits: int) -> str:
    return NOTHING if value is None else f"{value:.{digits}f}"
