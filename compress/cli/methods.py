"""methods: what there is."""

from __future__ import annotations

from compress.cli.command import Command
from compress.config.flags import Parser
from compress.families.base import METHODS


def _methods(given: list[str]) -> None:
    Parser("compress methods", COMMAND.about, "").parse_args(given)
    for name, kind in sorted(METHODS.items()):
        summary = (kind.__doc__ or "").strip().partition("\n")[0]
        print(f"{name:<14}{summary}\n{'':<14}{kind.paper}")
    print("\ncompress run --method NAME --help lists the options of one.")


COMMAND = Command(_methods, "List the methods there are, with their papers.")
