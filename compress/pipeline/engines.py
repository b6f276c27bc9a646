"""The engines' part of verification: each loads an export that was proved in a fresh process, and is compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from compress.callbacks import Progress
from compress.engines.asked import engines_among
from compress.engines.base import Origin
from compress.engines.trying import try_engines
from compress.report.report import EngineReport, ExportReport


def with_engines(
    export: ExportReport, root: Path, asked: Sequence[str], progress: Progress
) -> ExportReport:
    """The report of an export in an output folder, with what engines made of it.

    Raises CheckpointError naming an engine that does not load it, or computes something else.
    """
    engines = engines_among(asked, export.format)
    if not engines:
        return export
    found = []
    stage = f"engines for {export.format}"
    progress(stage, 0, len(engines))
    for trial in try_engines(root / export.folder, engines, Origin.THIS_RUN):
        found.append(EngineReport(**asdict(trial)))
        progress(stage, len(found), len(engines))
    return replace(export, engines=tuple(found))
