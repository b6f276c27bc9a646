"""What commands show: progress, tables, notes and changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers.utils import logging

from compress.cli.bars import show_progress
from compress.report.changes import changes, correction_text
from compress.report.report import Comparison, Report
from compress.report.summary import Row, lines, table


@contextmanager
def shown_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Our progress on stderr, and no bars of transformers in between."""
    logging.disable_progress_bar()
    with show_progress(Console(stderr=True)) as progress:
        yield progress


def show(result: list[Row], title: str) -> None:
    """A table of rows: drawn for a terminal, aligned text for a log."""
    console = Console()
    if console.is_terminal:
        console.print(table(result, title))
    else:
        print("\n".join([title, *lines(result)]))


def show_warning(warning: str) -> None:
    """A sentence on what a run will not do, on stderr, beside its progress."""
    Console(stderr=True).print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)


def show_notes(report: Report) -> None:
    """What was chosen or found on the way, and every fallback."""
    for note in report.notes:
        print(f"note: {note}")


def show_cells(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table whose first column is text and the others figures: drawn for a terminal, aligned text for a log."""
    console = Console()
    if not console.is_terminal:
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        print(title)
        for row in (head, *rows):
            first, *others = (
                f"{cell:<{width}}" if k == 0 else f"{cell:>{width}}"
                for k, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            print("  ".join([first, *others]).rstrip())
        return
    console.print(title, markup=False, highlight=False)
    drawn = Table(padding=(0, 1, 0, 0), box=SIMPLE_HEAD)
    for k, label in enumerate(head):
        drawn.add_column(label, justify="right" if k else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*map(escape, row))
    console.print(drawn)


def show_changes(scores: Comparison) -> None:
    """What changed and how sure that is, and what both models write."""
    for change in changes(scores):
        interval = f" ({change.interval})" if change.interval else ""
        print(f"change: {change.label}: {change.change}{interval}, {change.verdict}")
    correction = correction_text(scores)
    if correction:
        print(f"note: {correction}")
    for sample in scores.samples:
        print(f"prompt: {sample.prompt}\n  before: {sample.before!r}\n  after:  {sample.after!r}")
