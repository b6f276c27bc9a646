"""report: what a run did and reached, and runs beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path

from rich.console import Console
from rich.table import Table

from compress.cli.command import Given
from compress.cli.showing import show, show_changes, show_notes
from compress.cli.writing import Written, refuse_place, write_whole
from compress.errors import RecipeError
from compress.report.comparison import Differences, Run, RunComparison, compare_runs, load_runs
from compress.report.formats import (
    MARK,
    cells,
    comparison_csv,
    comparison_json,
    comparison_markdown,
    headings,
    is_ours,
    report_markdown,
)
from compress.report.summary import rows

_OWN = ("report.json", "report.html", "README.md")
"""Files that a run itself writes into its folder."""


class Format(Enum):
    """Formats of a report."""

    MD = "md"
    JSON = "json"
    HTML = "html"
    CSV = "csv"


def report(given: Given) -> None:
    """Show, write or compare reports."""
    known = given.own
    differences = Differences(known.allow_mismatch)
    chosen = _format(known.format, known.out)
    if known.out is not None and chosen is not None:
        refuse_place("--out", known.out, _written(chosen))
    runs = load_runs(known.folders)
    if known.out is not None:
        _refuse_runs_own(known.out, runs)
    if chosen is None:
        _show(runs, differences)
        return
    text = _text(runs, differences, chosen)
    if known.out is None:
        print(text, end="")
    else:
        write_whole(known.out, text)


def _refuse_runs_own(out: Path, runs: Sequence[Run]) -> None:
    """A run's own report is replaced by nothing but that run's report."""
    folder = out.absolute().parent.resolve()
    own = [run.folder.resolve() for run in runs] == [folder]
    if out.name in _OWN and (folder / _OWN[0]).is_file() and not own:
        raise RecipeError(
            f"--out: {out} is the report of the run in {out.parent}, and this is another; name another file"
        )


def _format(named: str | None, out: Path | None) -> Format | None:
    """The format that is asked for; None for a table in the terminal."""
    known, ending = [each.value for each in Format], "" if out is None else out.suffix[1:]
    if named is not None and ending in known and ending != named:
        raise RecipeError(
            f"--format: {named}, but --out {out} is to be {ending}; leave --format out, or name a .{named} file"
        )
    if named is not None:
        return Format(named)
    if out is None:
        return None
    if ending not in known:
        raise RecipeError(
            f"--out: {out}: the name does not tell the format; add --format ({', '.join(known)})"
        )
    return Format(ending)


def _text(runs: Sequence[Run], differences: Differences, chosen: Format) -> str:
    if chosen is Format.HTML:
        # Pictures take a while to import, and most reports go without.
        from compress.report import pages

        page = (
            pages.run_page(runs[0].report)
            if len(runs) == 1
            else pages.comparison_page(compare_runs(runs, differences))
        )
        return f"{page.rstrip()}\n{MARK}\n"
    if len(runs) == 1 and chosen is Format.JSON:
        return runs[0].report.to_json()
    if len(runs) == 1 and chosen is Format.MD:
        return report_markdown(runs[0].report, runs[0].label)
    comparison = compare_runs(runs, differences)
    writers = {
        Format.MD: comparison_markdown,
        Format.JSON: comparison_json,
        Format.CSV: comparison_csv,
    }
    return writers[chosen](comparison)


def _show(runs: Sequence[Run], differences: Differences) -> None:
    if len(runs) > 1:
        _show_comparison(compare_runs(runs, differences))
        return
    only = runs[0].report
    show(rows(only), str(runs[0].folder))
    if only.scores is not None:
        show_changes(only.scores)
    show_notes(only)


def _show_comparison(comparison: RunComparison) -> None:
    console = Console()
    lines = cells(comparison)
    if console.is_terminal:
        table = Table()
        for index, heading in enumerate(headings()):
            table.add_column(heading, justify="left" if index < 2 else "right")
        for line in lines:
            table.add_row(*line)
        console.print(table)
    else:
        print("\n".join("\t".join(line) for line in (headings(), *lines)))
    for difference in comparison.differences:
        print(f"measured differently: {difference.text}")


def _written(chosen: Format) -> Written:
    """A report of ours can be made again."""
    ending = chosen.value
    return Written(f"{ending} file", "compress report", lambda text: is_ours(text, ending))
