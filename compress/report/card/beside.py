"""The card of an adapter that lies in a folder of its export: the corrections, and the checkpoint they belong to."""

from __future__ import annotations

from dataclasses import replace

from compress.exports.card import widened_note
from compress.report.card.facts import adapter_rank, exporter_of, facts_of, is_padded, layers_text
from compress.report.card.metadata import adapter_matter
from compress.report.card.names import model_name
from compress.report.report import ExportReport, Report

_CHECKPOINT = "CHECKPOINT_FOLDER"


def adapter_card(report: Report, export: ExportReport) -> str:
    """The card as Markdown with front matter; commands name the folder or the repository that holds both."""
    facts = facts_of(report, export, None)
    where = ""
    if export.repository is None:
        facts = replace(
            facts,
            folder=_CHECKPOINT,
            source=_CHECKPOINT,
            adapter=f"{_CHECKPOINT}/{facts.subfolder}",
        )
        where = f"`{_CHECKPOINT}` is the folder that this one lies in, or the id of its repository on the hub."
    kind = exporter_of(export)
    parts = [
        f"---\n{adapter_matter(report, export).to_yaml()}\n---",
        f"# Corrections for {model_name(report)}",
        f"This adapter holds the low-rank corrections of {layers_text(report)}, {_ranks(report)}, for the "
        f"{export.format} checkpoint that it lies in. Without them that checkpoint is not corrected; scores are in the "
        "checkpoint's card.",
        *widened_note(facts),
        "## How to load it",
        kind.how_to_load(facts),
        kind.how_to_serve(facts),
        where,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _ranks(report: Report) -> str:
    rank = adapter_rank(report)
    if is_padded(report):
        return f"all of rank {rank}, zeros included that fill lower ranks up"
    alike = len({layer.rank for layer in report.layers}) == 1
    return f"of rank {rank}" if alike else f"of ranks up to {rank}"
