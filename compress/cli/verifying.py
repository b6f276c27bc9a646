"""verify: load an export in a fresh process."""

from __future__ import annotations

from compress.cli.command import Given
from compress.cli.folders import exports
from compress.exports.verification import verify as verification


def verify(given: Given) -> None:
    """Verify one export, or those of a folder."""
    for folder in exports(given.own.folder):
        found = verification.verify(folder, device=given.own.device)
        print(
            f"{folder}: loaded by {found.loader}, reproduces the compressed model; relative "
            f"difference {found.relative_difference:.1e} (tolerance {found.tolerance:.0e})"
        )
