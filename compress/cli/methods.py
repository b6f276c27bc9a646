"""methods: what there is."""

from __future__ import annotations

from compress.cli.command import Given
from compress.families.base import METHODS


def methods(_: Given) -> None:
    """List them, each with its summary and paper."""
    for name, kind in sorted(METHODS.items()):
        summary = (kind.__doc__ or "").strip().partition("\n")[0]
        print(f"{name:<14}{summary}\n{'':<14}{kind.paper}")
    print("\ncompress run --method NAME --help lists the options of one.")
