"""verify: load an export in a fresh process."""

from __future__ import annotations

from dataclasses import asdict

from compress.cli.command import Given
from compress.cli.folders import exports
from compress.engines.trying import engines_of, try_engines
from compress.exports.verification import verify as verification
from compress.report.engines import engine_text
from compress.report.report import EngineReport


def verify(given: Given) -> None:
    """Verify one export, or those of a folder."""
    for folder in exports(given.own.folder):
        found = verification.verify(folder, device=given.own.device)
        print(
            f"{folder}: loaded by {found.loader}, reproduces the compressed model; relative "
            f"difference {found.relative_difference:.1e} (tolerance {found.tolerance:.0e})"
        )
        for trial in try_engines(folder, engines_of(folder, given.own.engine)):
            print(f"{folder}: {engine_text(EngineReport(**asdict(trial)))}", flush=True)
