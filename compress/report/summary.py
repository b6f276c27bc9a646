"""The result of a run in a dozen rows, before and after: for the terminal and the model card."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from compress.report.report import Comparison, ExportReport, Report
from eval.scores import Fidelity, Footprint, Scores, TaskScore, primary

NOTHING = "-"
_RUN_AWAY = 1e6


@dataclass(frozen=True)
class Row:
    """One quantity of the original and of the export, as text."""

    label: str
    before: str
    after: str


def rows(report: Report, export: ExportReport | None = None) -> list[Row]:
    """The rows of the summary; without an evaluation only the sizes.

    They tell the size of `export` (None: the first), and its speed only if it was the one measured.
    """
    totals = report.totals
    after = totals.tensor_bytes_after if export is None else export.tensor_bytes
    size = Row("whole checkpoint", megabytes(totals.tensor_bytes_before), megabytes(after))
    if report.scores is None:
        return [size]
    if evaluated(report, export):
        return [size, *_score_rows(report.scores)]
    return [size, *_quality_rows(report.scores)]


def evaluated(report: Report, export: ExportReport | None) -> bool:
    """Whether speed, memory and bits per weight are those of `export`: the first is measured."""
    return export is None or export == report.exports[0]


def comparison_rows(scores: Comparison) -> list[Row]:
    """The rows of an evaluation alone."""
    size = _footprint_row("whole checkpoint", scores, lambda it: megabytes(it.tensor_bytes))
    return [size, *_score_rows(scores)]


def table(rows: list[Row], title: str) -> Table:
    """The rows as a table for a terminal."""
    drawn = Table(title=title, title_justify="left")
    drawn.add_column("")
    drawn.add_column("before", justify="right")
    drawn.add_column("after", justify="right")
    for row in rows:
        drawn.add_row(row.label, row.before, row.after)
    return drawn


def lines(rows: list[Row]) -> list[str]:
    """The rows as lines of aligned text, for a log."""
    head = Row("", "before", "after")
    widths = [
        max(len(part) for part in column)
        for column in zip(*map(_cells, [head, *rows]), strict=True)
    ]
    return [
        f"{row.label:<{widths[0]}}  {row.before:>{widths[1]}}  {row.after:>{widths[2]}}"
        for row in [head, *rows]
    ]


def megabytes(n_bytes: int | None) -> str:
    """Bytes in MB (10^6), in GB above a thousand of them, in kB below one."""
    if n_bytes is None:
        return NOTHING
    if n_bytes < 1e6:
        return f"{n_bytes / 1e3:.1f} kB"
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def method_text(method: Mapping[str, Any]) -> str:
    """A method and its base by name: "eora on gptq"."""
    base = method.get("base")
    name = str(method["name"])
    return f"{name} on {method_text(base)}" if isinstance(base, Mapping) else name


def counted(n: int, noun: str) -> str:
    """A number of things: "1 layer", "2 layers"."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def decimal(value: float, digits: int) -> str:
    """With so many digits after the point: "27.80"; where a model has run away, in short: "2.49e+08"."""
    return f"{value:.{digits}f}" if abs(value) < _RUN_AWAY else f"{value:.2e}"


def with_error(value: float | None, stderr: float | None, digits: int) -> str:
    """A value and its standard error: "27.80 ± 0.12"."""
    if value is None:
        return NOTHING
    return decimal(value, digits) + (f" ± {decimal(stderr, digits)}" if stderr is not None else "")


def _score_rows(scores: Comparison) -> Iterator[Row]:
    label = "bits per weight, whole checkpoint"
    yield _footprint_row(label, scores, lambda it: f"{it.bits_per_weight:.2f}")
    yield from _quality_rows(scores)
    yield _footprint_row("prefill, tokens/s", scores, lambda it: f"{it.prefill_tokens_per_s:.0f}")
    yield _footprint_row("decode, tokens/s", scores, _decode_text)
    yield _footprint_row("peak memory", scores, lambda it: megabytes(it.peak_rss_bytes))


def _quality_rows(scores: Comparison) -> Iterator[Row]:
    yield from _fidelity_rows(scores.before.fidelity, scores.after.fidelity)
    yield from _task_rows(scores.before, scores.after)


def _fidelity_rows(before: Fidelity | None, after: Fidelity | None) -> Iterator[Row]:
    if before is None or after is None:
        return
    yield Row(
        "perplexity",
        with_error(before.perplexity, before.perplexity_stderr, 3),
        with_error(after.perplexity, after.perplexity_stderr, 3),
    )
    yield Row("KL divergence, nats/token", NOTHING, with_error(after.kl, after.kl_stderr, 4))
    yield Row("top-1 agreement", NOTHING, with_error(after.top1_agreement, after.top1_stderr, 4))


def _task_rows(before: Scores, after: Scores) -> Iterator[Row]:
    reached = {(score.task, score.metric): score for score in after.tasks}
    for score in primary(before.tasks).values():
        other = reached.get((score.task, score.metric))
        label = f"{score.task}, {score.metric} ({score.n_items} items)"
        yield Row(label, _task_text(score), _task_text(other) if other else NOTHING)


def _task_text(score: TaskScore) -> str:
    return with_error(score.value, score.stderr, 3)


def _decode_text(footprint: Footprint) -> str:
    speed = footprint.decode_tokens_per_s
    return NOTHING if speed is None else f"{speed:.1f}"


def _footprint_row(label: str, scores: Comparison, text: Callable[[Footprint], str]) -> Row:
    before, after = scores.before.footprint, scores.after.footprint
    return Row(label, text(before) if before else NOTHING, text(after) if after else NOTHING)


def _cells(row: Row) -> tuple[str, str, str]:
    return row.label, row.before, row.after
