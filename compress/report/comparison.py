"""Runs beside each other: their figures in one table, if they were measured alike.

A number compares only with one that was measured the same way: `compare_runs` refuses runs that differ in what decides
a score, unless it is told to say so instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from compress.errors import ComparisonError
from compress.report.comparable import Difference, differences_between
from compress.report.metrics import METRICS, Changed
from compress.report.numbers import Measured
from compress.report.recorded_recipe import method_text
from compress.report.report import Report
from compress.report.sides import Side, sides_of
from eval.accuracy import accuracies


class Differences(Enum):
    """How runs that were measured differently are treated."""

    REFUSE = "refuse"
    TELL = "tell"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A folder that `run` wrote."""

    label: str
    """Name of its folder, with as many parent folders as tell it from the other runs."""
    folder: Path
    report: Report


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The values of one model by the keys of METRICS."""

    label: str
    method: str
    """"eora on gptq"; "original" for the model that was compressed."""
    values: Mapping[str, Measured]
    """Values by metric; those that were not measured are absent."""
    changes: Mapping[str, Changed] = field(default_factory=dict)
    """Paired changes against the original on the same items, by metric; empty for the original."""
    n_tasks: int = 0
    """Number of tasks in the mean accuracy."""

    @property
    def n_bytes(self) -> int:
        """Size of the whole checkpoint's tensors."""
        return int(self.values["n_bytes"].value)


@dataclass(frozen=True, kw_only=True)
class RunComparison:
    """Runs in the order they were given, `figures` being those of `runs`, one for one."""

    runs: tuple[Run, ...]
    figures: tuple[Figures, ...]
    originals: tuple[Figures, ...]
    """The original model: one, or one for each run where runs were measured differently."""
    differences: tuple[Difference, ...]
    """Settings that differ; empty unless `Differences.TELL` let them pass."""


def load_runs(folders: Sequence[Path]) -> tuple[Run, ...]:
    """The reports of output folders; a report.json stands for the folder that it is in.

    Raises:
        CheckpointError: a folder has no report, or one that is not ours (naming the file).
        ComparisonError: a folder is named twice.
    """
    folders = [path.parent if _is_report(path) else path for path in folders]
    places = [folder.resolve() for folder in folders]
    for index, place in enumerate(places):
        if place in places[:index]:
            raise ComparisonError(f"{folders[index]}: named twice; name each run once")
    return tuple(
        Run(label=label, folder=folder, report=Report.load(folder))
        for label, folder in zip(_labels(places), folders, strict=True)
    )


def compare_runs(runs: Sequence[Run], differences: Differences) -> RunComparison:
    """The figures of runs, which were evaluated alike or not at all.

    Raises:
        ComparisonError: there is no run, or two were measured differently and `differences` is REFUSE (naming the
            runs, the fields and both values).
    """
    if not runs:
        raise ComparisonError("there is no run to compare; name at least one folder")
    found = differences_between({run.label: run.report for run in runs})
    if found and differences is Differences.REFUSE:
        lines = (f"  {one.text}" for one in found)
        raise ComparisonError(
            "runs that were measured differently do not compare (--allow-mismatch does it all the same):\n"
            + "\n".join(lines)
        )
    return RunComparison(
        runs=tuple(runs),
        figures=tuple(map(_figures, runs)),
        originals=_originals(runs, found),
        differences=found,
    )


def _is_report(path: Path) -> bool:
    return path.name == "report.json" and path.is_file()


def _labels(places: Sequence[Path]) -> list[str]:
    """The last folders of each path, as many of them as tell it from all others."""
    return [
        next(
            (
                "/".join(place.parts[-n:])
                for n in range(1, len(place.parts))
                if not any(
                    place.parts[-n:] == other.parts[-n:] for other in places if other != place
                )
            ),
            str(place),
        )
        for place in places
    ]


def _figures(run: Run) -> Figures:
    sides = sides_of(run.report)
    values = {key: metric.after(sides) for key, metric in METRICS.items()}
    changes = {key: metric.changed(sides) for key, metric in METRICS.items()}
    return Figures(
        label=run.label,
        method=method_text(run.report.recipe["method"]),
        values={key: value for key, value in values.items() if value is not None},
        changes={key: change for key, change in changes.items() if change is not None},
        n_tasks=_n_tasks(sides.after),
    )


def _originals(runs: Sequence[Run], found: Sequence[Difference]) -> tuple[Figures, ...]:
    """The originals; the first measured one stands for all where runs were measured alike."""
    if found:
        return tuple(_original(run, f"original of {run.label}") for run in runs)
    measured = next((run for run in runs if run.report.scores is not None), runs[0])
    return (_original(measured, "original"),)


def _original(run: Run, label: str) -> Figures:
    sides = sides_of(run.report)
    values = {key: metric.before(sides) for key, metric in METRICS.items()}
    return Figures(
        label=label,
        method="original",
        values={key: value for key, value in values.items() if value is not None},
        n_tasks=_n_tasks(sides.before),
    )


def _n_tasks(side: Side) -> int:
    return 0 if side.scores is None else len(accuracies(side.scores, side.tasks))
