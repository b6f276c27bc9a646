"""Reports and comparisons as Markdown, JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from compress.errors import CheckpointError
from compress.report.changes import INTERVAL_NAME, changes, correction_text
from compress.report.comparison import Figures, Measured, RunComparison
from compress.report.report import Report
from compress.report.summary import NOTHING, megabytes, rows, with_error
from eval.paired import TOO_FEW, PairedChange
from eval.scores import Sample

MARK = "<!-- written by compress report -->"
"""Ends what people read, so that it is known again before it is replaced."""
_KIND = "compress comparison"
_MEASURED = ("perplexity", "kl", "top1_agreement", "accuracy")
_PLAIN = ("layer_bits_per_weight", "bits_per_weight", "prefill_tokens_per_s", "decode_tokens_per_s")
_CHANGE = ("accuracy_change", "accuracy_change_low", "accuracy_change_high")
HEADINGS = (
    *("run", "method", "size", "bits per weight: layers", "all"),
    *("perplexity", "KL, nats/token", "top-1 agreement", "mean accuracy", "its change"),
    "decode, tokens/s",
)


_COLUMNS = (
    "± is one standard error. The mean accuracy's change is against the original on the same items, with its "
    f"{INTERVAL_NAME}."
)


def cells(comparison: RunComparison) -> list[tuple[str, ...]]:
    """A row of text for each model, originals first, under `HEADINGS`; - where nothing was measured."""
    return [_cells(figures) for figures in (*comparison.originals, *comparison.figures)]


def comparison_markdown(comparison: RunComparison) -> str:
    """The table, what its columns are, and what was measured differently."""
    parts = [_table(HEADINGS, cells(comparison), n_words=2), "", _COLUMNS]
    parts += [""] if comparison.differences else []
    parts += [f"- measured differently: {each.text}" for each in comparison.differences]
    return "\n".join([*parts, "", MARK, ""])


def comparison_csv(comparison: RunComparison) -> str:
    """A line for each model, in bytes and full precision; empty where nothing was measured."""
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
        "figures": [asdict(each) for each in comparison.figures],
        "originals": [asdict(each) for each in comparison.originals],
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
        return text.splitlines()[:1] == [",".join(csv_columns())]
    if suffix != "json":
        return text.rstrip().endswith(MARK)
    try:
        Report.from_json(text)
    except CheckpointError:
        return _is_comparison(text)
    return True


def csv_columns() -> list[str]:
    """The columns of the CSV."""
    measured = [name for each in _MEASURED for name in (each, f"{each}_stderr")]
    return ["label", "method", "n_bytes", *_PLAIN, *measured, *_CHANGE, "n_tasks"]


def _is_comparison(text: str) -> bool:
    try:
        data = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return False
    return isinstance(data, dict) and data.get("kind") == _KIND


def _values(figures: Figures) -> dict[str, Any]:
    columns = ("label", "method", "n_bytes", "n_tasks", *_PLAIN)
    values = {name: getattr(figures, name) for name in columns}
    for name in _MEASURED:
        measured: Measured | None = getattr(figures, name)
        values[name] = None if measured is None else measured.value
        values[f"{name}_stderr"] = None if measured is None else measured.stderr
    change = figures.accuracy_change
    interval = None if change is None else change.interval
    ends = (None, None) if interval is None else (interval.low, interval.high)
    return values | dict(zip(_CHANGE, (change and change.change, *ends), strict=True))


def _cells(figures: Figures) -> tuple[str, ...]:
    return (
        figures.label,
        figures.method,
        megabytes(figures.n_bytes),
        _number(figures.layer_bits_per_weight, 2),
        _number(figures.bits_per_weight, 2),
        _measured(figures.perplexity, 3),
        _measured(figures.kl, 4),
        _measured(figures.top1_agreement, 4),
        _measured(figures.accuracy, 3),
        _changed(figures.accuracy_change),
        _number(figures.decode_tokens_per_s, 1),
    )


def _number(value: float | None, digits: int) -> str:
    return with_error(value, None, digits)


def _measured(measured: Measured | None, digits: int) -> str:
    return NOTHING if measured is None else with_error(measured.value, measured.stderr, digits)


def _changed(change: PairedChange | None) -> str:
    if change is None:
        return NOTHING
    interval = change.interval
    text = TOO_FEW if interval is None else f"{interval.low:+.3f} to {interval.high:+.3f}"
    return f"{change.change:+.3f} ({text})"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], n_words: int) -> str:
    """A Markdown table whose first columns are words and whose others are figures, aligned right."""
    rule = ["---"] * n_words + ["---:"] * (len(head) - n_words)
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in (head, rule, *lines))
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def _quoted(label: str, text: str) -> str:
    lines = text.strip().splitlines() or [""]
    return "\n".join([f"> **{label}:** {lines[0]}", *(f"> {line}".rstrip() for line in lines[1:])])
