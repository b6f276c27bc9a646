"""report: what a run did and reached."""

from __future__ import annotations

from pathlib import Path

from compress.commands.command import Command, show
from compress.flags import Parser
from compress.report import Report
from compress.summary import rows


def _report(given: list[str]) -> None:
    parser = Parser("compress report", REPORT.about, "DIR")
    parser.add_argument("folder", metavar="DIR", type=Path, help="a folder that `run` wrote")
    folder = parser.parse_args(given).folder
    report = Report.load(folder)
    show(rows(report), str(folder))
    for note in report.notes:
        print(f"note: {note}")


REPORT = Command(_report, "Show the report in a folder that run wrote.")
