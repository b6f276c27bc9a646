"""Reports and comparisons as Markdown, JSON and CSV."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from compress.errors import CheckpointError
from compress.report.changes import INTERVAL_NAME, changes, correction_text
from compress.report.comparison import Figures, RunComparison
from compress.report.metrics import METRICS, Changed, Metric, Shown, shown_in
from compress.report.numbers import NOTHING
from compress.report.report import Report
from compress.report.summary import rows
from eval.paired import TOO_FEW
from eval.scores import Sample

MARK = "<!-- written by compress report -->"
"""Ends what people read, so that it is known again before it is replaced."""
_KIND = "compress comparison"
_COLUMNS = (
    "± is one standard error. A change is against the original on the same items and windows, with its "
    f"{INTERVAL_NAME}."
)


def headings() -> tuple[str, ...]:
    """The heads of a comparison's columns."""
    found = ["run", "method"]
    for metric in shown_in(Shown.TABLE):
        found.append(metric.heading)
        if metric.paired is not None:
            found.append(f"{metric.column}, change")
    return tuple(found)


def cells(comparison: RunComparison) -> list[tuple[str, ...]]:
    """A row of text for each model, originals first, under `headings`; - where nothing was measured."""
    return [_cells(figures) for figures in (*comparison.originals, *comparison.figures)]


def comparison_markdown(comparison: RunComparison) -> str:
    """The table, what its columns are, and what was measured differently."""
    parts = [_table(headings(), cells(comparison), n_words=2), "", _COLUMNS]
    parts += [""] if comparison.differences else []
    parts += [f"- measured differently: {each.text}" for each in comparison.differences]
    return "\n".join([*parts, "", MARK, ""])


def comparison_csv(comparison: RunComparison) -> str:
    """A line for each model, all metrics in full precision; empty where nothing was measured."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, csv_columns(), lineterminator="\n")
    writer.writeheader()
    for figures in (*comparison.originals, *comparison.figures):
        writer.writerow(_values(figures))
    return stream.getvalue()


def comparison_json(comparison: RunComparison) -> str:
    """The figures without the reports; null where nothing was measured."""
    content = {
        "kind": _KIND,
        "runs": [{"label": run.label, "folder": str(run.folder)} for run in comparison.runs],
        "figures": [_plain(each) for each in comparison.figures],
        "originals": [_plain(each) for each in comparison.originals],
        "differences": [asdict(each) for each in comparison.differences],
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def report_markdown(report: Report, title: str) -> str:
    """The summary of a run, what changed and how sure that is, what both models wrote, and the notes."""
    summary = [(row.label, row.before, row.after) for row in rows(report)]
    parts = [f"# {title}", _table(("", "before", "after"), summary, n_words=1)]
    if report.scores is not None:
        parts += [changes_table(report), correction_text(report.scores)]
        parts += samples_text(report.scores.samples)
    parts += [f"- {note}" for note in report.notes]
    return "\n\n".join(part for part in [*parts, MARK] if part) + "\n"


def changes_table(report: Report) -> str:
    """Paired changes as a Markdown table; empty if there are none."""
    if report.scores is None:
        return ""
    found = changes(report.scores)
    lines = [(each.label, each.change, each.interval or NOTHING, each.verdict) for each in found]
    head = ("", "change", INTERVAL_NAME, "verdict")
    return _table(head, lines, n_words=1) if lines else ""


def samples_text(samples: Sequence[Sample]) -> Iterator[str]:
    """A paragraph for each prompt and a quoted one for each continuation."""
    for sample in samples:
        framing = " (in the chat template)" if sample.framing == "chat" else ""
        yield f"Prompt{framing}: {sample.prompt}"
        yield _quoted("before", sample.before)
        yield _quoted("after", sample.after)


def is_ours(text: str, suffix: str) -> bool:
    """Whether a file of this suffix ("md", "html", "csv", "json") was written by `compress report`."""
    if suffix == "csv":
        return set(text.partition("\n")[0].split(",")) >= {"label", "method", "n_bytes", "n_tasks"}
    if suffix != "json":
        return text.rstrip().endswith(MARK)
    try:
        Report.from_json(text)
    except CheckpointError:
        return _is_comparison(text)
    return True


def csv_columns() -> list[str]:
    """The columns of the CSV."""
    return [
        "label",
        "method",
        *itertools.chain.from_iterable(map(_columns, METRICS.values())),
        "n_tasks",
    ]


def _columns(metric: Metric) -> list[str]:
    """The columns of one metric: value, standard error, change with the ends of its interval."""
    key = metric.key
    error = [] if metric.is_exact else [f"{key}_stderr"]
    change = (
        []
        if metric.paired is None
        else [f"{key}_change", f"{key}_change_low", f"{key}_change_high"]
    )
    return [key, *error, *change]


def _is_comparison(text: str) -> bool:
    try:
        data = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return False
    return isinstance(data, dict) and data.get("kind") == _KIND


def _plain(figures: Figures) -> dict[str, Any]:
    """For JSON: counted metrics as numbers, the others with their standard errors."""
    values: dict[str, Any] = {"label": figures.label, "method": figures.method}
    for key, metric in METRICS.items():
        measured = figures.values.get(key)
        values[key] = None if measured is None else asdict(measured)
        if measured is not None and metric.is_exact:
            values[key] = measured.value
        if metric.paired is not None:
            change = figures.changes.get(key)
            values[f"{key}_change"] = None if change is None else asdict(change)
    return values | {"n_tasks": figures.n_tasks}


def _values(figures: Figures) -> dict[str, Any]:
    """For CSV, by column; what is not there stays empty."""
    values: dict[str, Any] = {
        "label": figures.label,
        "method": figures.method,
        "n_tasks": figures.n_tasks,
    }
    for key, measured in figures.values.items():
        values[key] = measured.value
        if not METRICS[key].is_exact:
            values[f"{key}_stderr"] = measured.stderr
    for key, change in figures.changes.items():
        values[f"{key}_change"] = change.value
        if change.interval is not None:
            values[f"{key}_change_low"] = change.interval.low
            values[f"{key}_change_high"] = change.interval.high
    return values


def _cells(figures: Figures) -> tuple[str, ...]:
    found = [figures.label, figures.method]
    for metric in shown_in(Shown.TABLE):
        found.append(metric.text(figures.values.get(metric.key)))
        if metric.paired is not None:
            found.append(_changed(figures.changes.get(metric.key)))
    return tuple(found)


def _changed(change: Changed | None) -> str:
    return NOTHING if change is None else f"{change.text} ({change.interval_text or TOO_FEW})"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], n_words: int) -> str:
    """A Markdown table whose first columns are words and whose others are figures, aligned right."""
    rule = ["---"] * n_words + ["---:"] * (len(head) - n_words)
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in (head, rule, *lines))
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def _quoted(label: str, text: str) -> str:
    lines = text.strip().splitlines() or [""]
    return "\n".join([f"> **{label}:** {lines[0]}", *(f"> {line}".rstrip() for line in lines[1:])])
