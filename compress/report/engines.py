"""What engines made of an export, in words."""

from __future__ import annotations

from compress.report.report import EngineReport, Report


def engine_text(found: EngineReport) -> str:
    """In a line: "loaded by vllm 0.32.0, largest difference 2.1e-06 (bound 3.0e-05: ...)", or why it was not tried."""
    if found.version is None:
        return f"not tried with {found.engine}: {found.reason}"
    loaded = f"loaded by {found.engine} {found.version}"
    if found.largest_difference is None:
        return f"{loaded}, which does not compute with it here: {found.reason}"
    return (
        f"{loaded}, largest difference of log-probabilities {found.largest_difference:.1e} "
        f"(bound {found.bound:.1e}: {found.arithmetic})"
    )


def engine_lines(report: Report) -> list[str]:
    """A line for each export and engine."""
    return [
        f"{export.format}: {engine_text(found)}"
        for export in report.exports
        for found in export.engines
    ]
