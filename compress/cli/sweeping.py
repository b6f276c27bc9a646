"""sweep: many runs, planned together, and their comparison."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from compress.cli.command import Given
from compress.cli.commands import COMMANDS, SWEEP_NAME
from compress.cli.showing import show_cells, shown_progress
from compress.config.yaml_file import read_yaml
from compress.errors import RecipeError, SweepError
from compress.report.metrics import METRICS, Metric
from compress.report.numbers import counted, megabytes
from compress.sweep.file import Point, budgets_of, points_of, set_by_points, sizes_of

if TYPE_CHECKING:
    from compress.sweep.run import SweepPlan

_PAGE = "report.html"


def sweep(given: Given) -> None:
    """Plan the points of a sweep, carry them out and compare them."""
    values, known = _file(given), given.own
    out: Path = known.out or Path(Path(known.sweep).stem)
    points = points_of(values, out)
    from compress.sweep.results import refuse_unmeasured
    from compress.sweep.run import plan_sweep

    by = METRICS[known.by]
    if budgets_of(values):
        refuse_unmeasured(points, by)
    with shown_progress() as progress:
        plan = plan_sweep(points, out, progress=progress)
    _show_plan(plan)
    if not known.plan:
        _carry_out(plan, values, by)


def _carry_out(plan: SweepPlan, values: Mapping[str, Any], by: Metric) -> None:
    """Run what waits, then show what there is. Raises SweepError if points failed."""
    from compress.sweep.run import State, run_sweep, write_whole

    plan.out.mkdir(parents=True, exist_ok=True)
    write_whole(plan.out / SWEEP_NAME, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    failed: dict[str, str] = {}
    try:
        for outcome in run_sweep(plan, _watching(plan)):
            if outcome.state is State.FAILED:
                failed[outcome.point.name] = outcome.error
                print(f"failed: {outcome.point.name}: {outcome.error}", file=sys.stderr)
    except KeyboardInterrupt as error:
        error.add_note(f"points that are done stay in {plan.out}; the same command goes on")
        raise
    _show_results(plan, [it.point for it in plan.points if it.point.name not in failed], values, by)
    if failed:
        lines = [f"  {name}: {error.splitlines()[0]}" for name, error in failed.items()]
        count = counted(len(failed), "point")
        raise SweepError("\n".join([f"{count} of {len(plan.points)} failed:", *lines]))


def _show_results(
    plan: SweepPlan, points: list[Point], values: Mapping[str, Any], by: Metric
) -> None:
    if not points:
        return
    from compress.report.pages import comparison_page
    from compress.sweep.results import (
        best_at,
        best_lines,
        best_table,
        compare_points,
        comparison_cells,
        comparison_head,
    )
    from compress.sweep.run import write_whole

    comparison = compare_points(points, [plan.out / point.name for point in points])
    best = best_at(budgets_of(values), comparison.figures, by)
    page = comparison_page(comparison, best_table(best, comparison, by))
    write_whole(plan.out / _PAGE, page)
    show_cells(str(plan.out), comparison_head(), comparison_cells(comparison))
    for difference in comparison.differences:
        print(f"note: measured differently: {difference.text}")
    print("\n".join(best_lines(best, comparison.figures, by)), end="\n" if best else "")
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


def _file(given: Given) -> dict[str, Any]:
    """The file's mapping with the flags in its recipe."""
    known = given.own
    if known.sweep is None or given.words[0] != known.sweep:
        raise RecipeError("a sweep's file goes first: compress sweep sweep.yaml [options]")
    values = dict(read_yaml(Path(known.sweep)))
    places = set_by_points(values)
    for name in COMMANDS["sweep"].options or ():
        if name in places and name in vars(known):
            raise RecipeError(
                f"--{name.replace('_', '-')}: {places[name]} in {known.sweep} sets it too; take one away"
            )
    values["recipe"] = given.recipe
    if known.budget is not None:
        values["budgets"] = list(_sizes(known.budget))
    return values


def _sizes(text: str) -> tuple[str, ...]:
    """The sizes in the text of --budget. Raises RecipeError for one that is no size."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise RecipeError(f"--budget: {text!r} leaves out a size; write 120MB or 120MB,80MB")
    return sizes_of(parts, "--budget")
