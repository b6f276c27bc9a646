"""Runs beside each other: their figures in one table, if they were measured alike.

A number compares only with one that was measured the same way: `compare_runs` refuses runs that differ in what decides
a score, unless it is told to say so instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from compress.errors import ComparisonError
from compress.report.comparable import Difference, differences_between
from compress.report.report import Comparison, Report
from compress.report.summary import method_text
from eval.paired import PairedChange, mean_change
from eval.scores import Scores, TaskScore, primary
from eval.whole import ACCURACY

_ACCURACIES = {"acc", "acc_norm", "exact_match"}


class Differences(Enum):
    """What is done about runs that were measured differently."""

    REFUSE = "refuse"
    TELL = "tell"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A folder that `run` wrote."""

    label: str
    """Its name; with as many of the folders above it as tell it from the other runs."""
    folder: Path
    report: Report


@dataclass(frozen=True)
class Measured:
    """A value and its standard error; None where that is not known."""

    value: float
    stderr: float | None


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one model costs and how good it is; None for what was not measured."""

    label: str
    method: str
    """"eora on gptq"; "original" for the model that was compressed."""
    n_bytes: int
    """Of the whole checkpoint's tensors."""
    layer_bits_per_weight: float | None = None
    """In the compressed layers; None for the original."""
    bits_per_weight: float | None = None
    """Of the whole checkpoint, a parameter of the original."""
    perplexity: Measured | None = None
    kl: Measured | None = None
    """KL(original || model), nats a token."""
    top1_agreement: Measured | None = None
    accuracy: Measured | None = None
    """The mean over tasks of the metric that is shown first, where that is an accuracy; in [0, 1]."""
    accuracy_change: PairedChange | None = None
    """Of `accuracy` against the original on the same items, much sharper than the two errors; None for the original."""
    n_tasks: int = 0
    """Tasks that `accuracy` is the mean of."""
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class RunComparison:
    """Runs in the order they were given, `figures` being those of `runs`, one for one."""

    runs: tuple[Run, ...]
    figures: tuple[Figures, ...]
    originals: tuple[Figures, ...]
    """What was compressed: one, or where runs were measured differently one for each of them."""
    differences: tuple[Difference, ...]
    """What was measured differently; empty unless `Differences.TELL` let it pass."""


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
    report = run.report
    alone = Figures(
        label=run.label,
        method=method_text(report.recipe["method"]),
        n_bytes=report.totals.tensor_bytes_after,
        layer_bits_per_weight=report.totals.layer_bits_per_weight,
    )
    scores, asked = report.scores, report.recipe["tasks"]
    if scores is None:
        return alone
    return replace(_measured(alone, scores.after, asked), accuracy_change=_change(scores, asked))


def _originals(runs: Sequence[Run], found: Sequence[Difference]) -> tuple[Figures, ...]:
    """One stands for all where they were measured alike: the first that was measured."""
    if found:
        return tuple(_original(run, f"original of {run.label}") for run in runs)
    measured = next((run for run in runs if run.report.scores is not None), runs[0])
    return (_original(measured, "original"),)


def _original(run: Run, label: str) -> Figures:
    report = run.report
    n_bytes = report.totals.tensor_bytes_before
    alone = Figures(label=label, method="original", n_bytes=n_bytes)
    scores = report.scores
    return alone if scores is None else _measured(alone, scores.before, report.recipe["tasks"])


def _measured(figures: Figures, scores: Scores, asked: Sequence[str]) -> Figures:
    fidelity, footprint = scores.fidelity, scores.footprint
    if fidelity is not None:
        figures = replace(
            figures,
            perplexity=Measured(fidelity.perplexity, fidelity.perplexity_stderr),
            kl=Measured(fidelity.kl, fidelity.kl_stderr),
            top1_agreement=Measured(fidelity.top1_agreement, fidelity.top1_stderr),
        )
    if footprint is not None:
        figures = replace(
            figures,
            bits_per_weight=footprint.bits_per_weight,
            prefill_tokens_per_s=footprint.prefill_tokens_per_s,
            decode_tokens_per_s=footprint.decode_tokens_per_s,
        )
    tasks = _accuracies(scores, asked)
    return replace(figures, accuracy=_mean(tasks), n_tasks=len(tasks))


def _accuracies(scores: Scores, asked: Sequence[str]) -> tuple[TaskScore, ...]:
    """The accuracy of each task; of those that the recipe names, where it names them: a group's members are in it."""
    found = {
        name: score
        for name, score in primary(scores.tasks).items()
        if score.metric.partition(",")[0] in _ACCURACIES or name == ACCURACY
    }
    named = tuple(found[name] for name in asked if name in found)
    return named if named else tuple(found.values())


def _change(scores: Comparison, asked: Sequence[str]) -> PairedChange | None:
    """Where every task kept its items."""
    before, after = (_accuracies(each, asked) for each in (scores.before, scores.after))
    if not after or not all(task.per_item for task in (*before, *after)):
        return None
    return mean_change(before, after)


def _mean(tasks: Sequence[TaskScore]) -> Measured | None:
    """The mean of tasks, each weighing the same; they have no item in common, so their errors add in squares."""
    if not tasks:
        return None
    value = math.fsum(task.value for task in tasks) / len(tasks)
    errors = [task.stderr for task in tasks if task.stderr is not None]
    known = len(errors) == len(tasks)
    return Measured(value, math.hypot(*errors) / len(tasks) if known else None)
