"""sweep: many runs, planned together, and their comparison."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from compress.cli.command import Command, show_cells, shown_progress
from compress.config.flags import Flags, Parser
from compress.config.recipe import Recipe
from compress.config.yaml_file import read_yaml
from compress.errors import RecipeError, SweepError
from compress.families.base import METHODS
from compress.report.summary import counted, megabytes
from compress.sweep.file import Point, budgets_of, points_of, set_by_points, sizes_of

if TYPE_CHECKING:
    from compress.sweep.results import Aim
    from compress.sweep.run import SweepPlan

_FILE, _PAGE = "sweep.yaml", "report.html"
_COMMON = tuple(it.name for it in fields(Recipe) if it.name not in ("method", "out"))
"""Options that flags may give for all points."""


def _sweep(given: list[str]) -> None:
    values, known = _read(given)
    out: Path = known.out or Path(Path(known.sweep).stem)
    points = points_of(values, out)
    from compress.sweep.results import Aim, refuse_unmeasured
    from compress.sweep.run import plan_sweep

    aim = Aim(known.by)
    if budgets_of(values):
        refuse_unmeasured(points, aim)
    with shown_progress() as progress:
        plan = plan_sweep(points, out, progress=progress)
    _show_plan(plan)
    if not known.plan:
        _carry_out(plan, values, aim)


def _carry_out(plan: SweepPlan, values: Mapping[str, Any], aim: Aim) -> None:
    """Run what waits, then show what there is. Raises SweepError if points failed."""
    from compress.sweep.run import State, run_sweep, write_whole

    plan.out.mkdir(parents=True, exist_ok=True)
    write_whole(plan.out / _FILE, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    failed: dict[str, str] = {}
    try:
        for outcome in run_sweep(plan, _watching(plan)):
            if outcome.state is State.FAILED:
                failed[outcome.point.name] = outcome.error
                print(f"failed: {outcome.point.name}: {outcome.error}", file=sys.stderr)
    except KeyboardInterrupt as error:
        error.add_note(f"points that are done stay in {plan.out}; the same command goes on")
        raise
    _show_results(
        plan, [it.point for it in plan.points if it.point.name not in failed], values, aim
    )
    if failed:
        lines = [f"  {name}: {error.splitlines()[0]}" for name, error in failed.items()]
        count = counted(len(failed), "point")
        raise SweepError("\n".join([f"{count} of {len(plan.points)} failed:", *lines]))


def _show_results(
    plan: SweepPlan, points: list[Point], values: Mapping[str, Any], aim: Aim
) -> None:
    if not points:
        return
    from compress.report.pages import comparison_page
    from compress.sweep.results import (
        HEAD,
        best_at,
        best_lines,
        best_table,
        compare_points,
        comparison_cells,
    )
    from compress.sweep.run import write_whole

    comparison = compare_points(points, [plan.out / point.name for point in points])
    best = best_at(budgets_of(values), comparison.figures, aim)
    page = comparison_page(comparison, best_table(best, comparison, aim))
    write_whole(plan.out / _PAGE, page)
    show_cells(str(plan.out), HEAD, comparison_cells(comparison))
    for difference in comparison.differences:
        print(f"note: measured differently: {difference.text}")
    print("\n".join(best_lines(best, comparison.figures, aim)), end="\n" if best else "")
    print(f"the comparison is {plan.out / _PAGE}")


def _show_plan(plan: SweepPlan) -> None:
    """Every point with its size, before work starts."""
    rows = [
        (it.point.name, megabytes(it.bytes_after), "done" if it.done else "to do")
        for it in plan.points
    ]
    done = len(plan.points) - len(plan.waiting)
    title = f"{counted(len(plan.points), 'point')} in {plan.out}" + (
        f", {done} done" if done else ""
    )
    show_cells(title, ("", "bytes", ""), rows)
    for folder in plan.unfinished:
        print(
            f"note: {folder} is the verified checkpoint of a point whose evaluation did not end; `compress eval "
            f"{folder}` evaluates it, and the sweep makes the point anew"
        )


def _watching(plan: SweepPlan) -> Callable[[Point], Any]:
    """Says which point is at work, and shows its progress."""
    numbers = {it.point.name: k for k, it in enumerate(plan.points, 1)}

    @contextmanager
    def watching(point: Point) -> Iterator[Callable[[str, int, int], None]]:
        print(f"[{numbers[point.name]}/{len(numbers)}] {point.name}", file=sys.stderr)
        with shown_progress() as progress:
            yield progress

    return watching


def _read(given: list[str]) -> tuple[dict[str, Any], argparse.Namespace]:
    """The file's mapping with the flags in its recipe, and what else was given."""
    has_file = bool(given) and not given[0].startswith("-")
    values = dict(read_yaml(Path(given[0]))) if has_file else {}
    base = values.get("recipe") or {}
    if not isinstance(base, Mapping):
        raise RecipeError(f"recipe: {base!r} is not a mapping of options such as `model: demo`")
    recipe, known = Flags(Recipe, METHODS, _COMMON).parse(base, given, _parser())
    if not has_file:
        raise RecipeError("a sweep's file goes first: compress sweep sweep.yaml [options]")
    places = set_by_points(values)
    for name in vars(known):
        if name in places and name in _COMMON:
            raise RecipeError(
                f"--{name.replace('_', '-')}: {places[name]} in {given[0]} sets it too; take one away"
            )
    values["recipe"] = recipe
    if known.budget is not None:
        values["budgets"] = list(_sizes(known.budget))
    return values, known


def _sizes(text: str) -> tuple[str, ...]:
    """Raises RecipeError for sizes that are none."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise RecipeError(f"--budget: {text!r} leaves out a size; write 120MB or 120MB,80MB")
    return sizes_of(parts, "--budget")


def _parser() -> Parser:
    parser = Parser("compress sweep", SWEEP.about, f"{_FILE} [options]")
    parser.add_argument("sweep", metavar=_FILE, nargs="?", help="a base recipe, points and axes")
    parser.add_argument("--out", metavar="DIR", type=Path, help="where (default: the file's name)")
    parser.add_argument(
        "--budget",
        metavar="SIZES",
        help="sizes of whole checkpoints (120MB,80MB): tells the best point at each, and makes points of just these "
        "sizes for methods that have a budget",
    )
    parser.add_argument(
        "--by",
        choices=("kl", "perplexity", "accuracy"),
        default="kl",
        help="what the best point is best in (default: kl)",
    )
    parser.add_argument("--plan", action="store_true", help="plan and refuse; do nothing")
    return parser


SWEEP = Command(_sweep, "Run many recipes, planned together, and compare what they reach.")
