"""Sweeps: many runs into one folder, planned together, each done once, whatever ends the process in between.

Every point is an ordinary run whose folder appears whole or not at all, so a folder that is there is done, and what was
killed is done again. A point that fails is written down with its error, and the others go on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from calibration.errors import InputError
from compress.callbacks import Progress
from compress.config.recipe import Recipe
from compress.errors import CheckpointError, RecipeError
from compress.evaluation.original_scores import Originals
from compress.models.checkpoint import Reader
from compress.models.model_config import read_config
from compress.models.resolve import resolve_model
from compress.pipeline import main as pipeline
from compress.planning.make import refuse_full_disk
from compress.prepare.output_folder import refuse_unwritable
from compress.prepare.prepare import SCRATCH_BYTES, Prepared, prepare
from compress.prepare.texts import settled_for
from compress.report.report import Report
from compress.sweep.file import Point
from eval.errors import EvalError

RECORD, ORIGINALS = "sweep.json", "originals"
SCHEMA = 1
_REFUSALS = (RecipeError, CheckpointError, InputError, EvalError)
_FAILURES = (*_REFUSALS, OSError, RuntimeError, MemoryError)
"""Of torch, RuntimeError: no memory on the device, for one. LayerError is one too."""


class State(StrEnum):
    """What became of a point."""

    DONE = "done"
    FAILED = "failed"
    WAITING = "waiting"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A point and what became of it."""

    point: Point
    state: State
    error: str = ""
    """Why it failed, with the notes of the error; empty if it did not."""


@dataclass(frozen=True, kw_only=True)
class PlannedPoint:
    """A point that can be run, or was."""

    point: Point
    done: bool
    bytes_before: int
    bytes_after: int
    """Of the first export: planned, or of one that is done reached."""


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """Every point of a sweep, in order, and what earlier runs left."""

    out: Path
    points: tuple[PlannedPoint, ...]
    unfinished: tuple[Path, ...]
    """Verified checkpoints whose evaluation failed or was ended."""

    @property
    def waiting(self) -> tuple[Point, ...]:
        """Points that are to be run."""
        return tuple(planned.point for planned in self.points if not planned.done)


def plan_sweep(points: Sequence[Point], out: Path, *, progress: Progress) -> SweepPlan:
    """Look for what is done, and prepare every other point as a run would; nothing is written.

    Raises:
        RecipeError: points that cannot be run, all of them, each by its name and with the reason; folders in the way;
            an `out` that nothing can be written to.
        CheckpointError: a report or scores of an original that cannot be read.
    """
    refuse_unwritable(out)
    Originals(out / ORIGINALS, "").check()
    problems, planned, needs = [], [], _Needs()
    sources = _Sources(progress)
    for index, point in enumerate(points):
        progress("plan", index, len(points))
        try:
            if point.recipe.folder.exists():
                planned.append(_finished(point, sources))
            else:
                prepared = prepare(point.recipe, progress)
                needs.add(prepared)
                planned.append(_waiting(point, prepared))
        except _REFUSALS as error:
            problems.append(f"  {point.name} ({point.where}): {error}")
    progress("plan", len(points), len(points))
    if problems:
        some = "1 point" if len(problems) == 1 else f"{len(problems)} points"
        raise RecipeError(
            "\n".join([f"{some} of {len(points)} cannot be run, so none was:", *problems])
        )
    needs.refuse(out)
    kept = (path for point in points for path in out.glob(f"{point.name}{pipeline.UNFINISHED}*"))
    return SweepPlan(out=out, points=tuple(planned), unfinished=tuple(sorted(kept)))


def run_sweep(
    plan: SweepPlan, watching: Callable[[Point], AbstractContextManager[Progress]]
) -> Iterator[Outcome]:
    """Run what waits, point by point, and yield what became of each; `watching` gives the progress of one.

    The record in `sweep.json` is always that of the last point that ended. Ctrl-C ends the sweep, and the point that
    was at work leaves nothing.
    """
    plan.out.mkdir(parents=True, exist_ok=True)
    states = {
        it.point.name: Outcome(point=it.point, state=State.DONE if it.done else State.WAITING)
        for it in plan.points
    }
    write_record(plan.out, states.values())
    for point in plan.waiting:
        with watching(point) as progress:
            outcome = _run_one(point, plan.out, progress)
        states[point.name] = outcome
        write_record(plan.out, states.values())
        yield outcome


def _run_one(point: Point, out: Path, progress: Progress) -> Outcome:
    try:
        originals = Originals(out / ORIGINALS, point.name)
        pipeline.run(point.recipe, progress=progress, originals=originals)
    except _FAILURES as error:
        said = str(error) or type(error).__name__
        text = "\n".join([said, *getattr(error, "__notes__", ())])
        return Outcome(point=point, state=State.FAILED, error=text)
    return Outcome(point=point, state=State.DONE)


def write_record(out: Path, outcomes: Iterable[Outcome]) -> None:
    """sweep.json: every point with its state and error; it appears whole or not at all."""
    points = [
        {"name": it.point.name, "where": it.point.where, "state": it.state.value, "error": it.error}
        for it in outcomes
    ]
    text = json.dumps({"schema": SCHEMA, "points": points}, indent=2, ensure_ascii=False) + "\n"
    write_whole(out / RECORD, text)


def write_whole(path: Path, text: str) -> None:
    """A file that appears whole or not at all."""
    partial = path.with_name(f".{path.name}{pipeline.PARTIAL}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _waiting(point: Point, prepared: Prepared) -> PlannedPoint:
    plan = prepared.plan
    after = plan.export_bytes(point.recipe.export[0])
    return PlannedPoint(point=point, done=False, bytes_before=plan.bytes_before, bytes_after=after)


def _finished(point: Point, sources: _Sources) -> PlannedPoint:
    """Raises RecipeError if the folder that is there holds something else than this point's result."""
    folder = point.recipe.folder
    if not (folder / pipeline.REPORT).is_file():
        raise RecipeError(
            f"out: {folder} is there and holds no {pipeline.REPORT}; remove it, or name another --out"
        )
    report = Report.load(folder)
    wanted = sources.settled(point.recipe)
    different = _differences(report.recipe, wanted)
    if different:
        raise RecipeError(
            f"out: {folder} holds the result of another recipe ({'; '.join(different)}); remove it, give the point "
            "another name, or name another --out"
        )
    if report.fingerprint != sources.fingerprint(point.recipe.model):
        raise RecipeError(
            f"out: {folder} was made from {point.recipe.model} as it was before it changed; remove it, or name "
            "another --out"
        )
    totals = report.totals
    return PlannedPoint(
        point=point,
        done=True,
        bytes_before=totals.tensor_bytes_before,
        bytes_after=totals.tensor_bytes_after,
    )


def _differences(found: Mapping[str, object], wanted: Recipe) -> list[str]:
    """What is another in a report's recipe, `out` apart: "samples 8, now 16"."""
    try:
        there = replace(Recipe.from_mapping(found), out=None).to_mapping()
    except RecipeError as error:
        return [str(error)]
    here = replace(wanted, out=None).to_mapping()
    return [
        f"{key} {there.get(key)}, now {here.get(key)}"
        for key in {**there, **here}
        if there.get(key) != here.get(key)
    ]


class _Sources:
    """Models by the words that name them, each looked up once."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._folders: dict[str, Path] = {}
        self._fingerprints: dict[str, str] = {}

    def settled(self, recipe: Recipe) -> Recipe:
        """As a run writes it into its report."""
        return settled_for(recipe, read_config(self._folder(recipe.model)))

    def fingerprint(self, spec: str) -> str:
        """Sha256 of the model as it is now."""
        if spec not in self._fingerprints:
            self._fingerprints[spec] = Reader(self._folder(spec)).fingerprint
        return self._fingerprints[spec]

    def _folder(self, spec: str) -> Path:
        if spec not in self._folders:
            self._folders[spec] = resolve_model(spec, None, progress=self._progress).folder
        return self._folders[spec]


class _Needs:
    """What all points together need of the disks."""

    def __init__(self) -> None:
        self._outputs, self._scratch = 0, 0
        self._statistics: dict[Path, int] = {}

    def add(self, prepared: Prepared) -> None:
        """Count a point's exports, and its statistics unless they are there or another point's too."""
        sizes = [prepared.plan.written_bytes(name) for name in prepared.recipe.export]
        self._outputs += sum(sizes)
        self._scratch = max(self._scratch, min(SCRATCH_BYTES, max(sizes)))
        store = prepared.store()
        if store is not None and not store.complete:
            plan = prepared.plan
            self._statistics[store.folder] = (
                plan.input_statistics_bytes + plan.gradient_statistics_bytes
            )

    def refuse(self, out: Path) -> None:
        """Raises RecipeError naming the disk that is too small."""
        refuse_full_disk(out.absolute(), self._outputs + self._scratch, "out")
        if self._statistics:
            folder, needed = next(iter(self._statistics)), sum(self._statistics.values())
            refuse_full_disk(folder, needed, "statistics (or statistics: off)")
