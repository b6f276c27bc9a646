"""Names and sizes of a report as its model card tells them."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath

from calibration.heads import Head
from calibration.outputs import AUTO_CLASSES
from compress.bases import BASES
from compress.errors import CheckpointError
from compress.exports.base import EXPORTS, Exporter, stores_codes
from compress.exports.card import CardBase, CardFacts
from compress.exports.storage import AdapterRanks
from compress.families.correction_options import FULL_BITS, padded_rank
from compress.report.card.names import base_name, source_name
from compress.report.numbers import counted, megabytes
from compress.report.report import BaseReport, ExportReport, Report

THIS_FOLDER = "THIS_FOLDER"
"""What cards call the folder that they lie in."""


def exporter_of(export: ExportReport) -> type[Exporter]:
    """The format that describes an export. Raises CheckpointError for one that is not installed."""
    if export.format not in EXPORTS:
        raise CheckpointError(
            f"report.exports: {export.format!r} is no format that is installed here; there are {', '.join(EXPORTS)}"
        )
    return EXPORTS[export.format]


def facts_of(report: Report, export: ExportReport, root: str | None) -> CardFacts:
    """What a card tells of an export: its own, or with `root` that of the output folder, which is no repository."""
    base, repository = report.base, export.repository if root is None else None
    folder = seen_from(root or export.folder, export.folder)
    if repository is not None:
        folder = repository.partition("/")[2]
    subfolder = adapter_place(export)
    added = export.tensor_bytes
    if base is not None and exporter_of(export).traits.needs_base:
        added -= base.tensor_bytes
    return CardFacts(
        folder=folder,
        source=repository or folder,
        adapter=None
        if export.adapter is None
        else folder + ("" if subfolder is None else f"/{subfolder}"),
        subfolder=subfolder,
        file=export.file,
        auto_class=AUTO_CLASSES[Head(report.head)].__name__,
        writes_text=Head(report.head).writes_text,
        stored=stored_text(report, export),
        layers=layers_text(report),
        forms=forms_text(report),
        size=megabytes(export.tensor_bytes),
        original_size=megabytes(report.totals.tensor_bytes_before),
        added_size=megabytes(added),
        rank=adapter_rank(report),
        few_bits=has_few_bits(report),
        refusals=export.refusals,
        ranks_differ=not is_padded(report) and len({layer.rank for layer in report.layers}) > 1,
        has_experts=any(layer.tokens is not None for layer in report.layers),
        base=None if base is None else _card_base(base),
    )


def adapter_place(export: ExportReport) -> str | None:
    """The folder of its adapter within its own; None if that is the adapter, or it has none."""
    if export.adapter is None or export.adapter == export.folder:
        return None
    return PurePosixPath(export.adapter).relative_to(export.folder).as_posix()


def is_padded(report: Report) -> bool:
    """Whether adapters have one rank for all layers, filled up with zeros."""
    return report.recipe.get("adapter_ranks") == AdapterRanks.PADDED.value


def adapter_rank(report: Report) -> int | None:
    """The highest rank of a layer in an adapter; None if there is none, or it was not recorded."""
    rank = max((layer.rank for layer in report.layers if layer.rank is not None), default=None)
    return padded_rank(rank) if rank is not None and is_padded(report) else rank


def _card_base(base: BaseReport) -> CardBase:
    """Raises CheckpointError for a format that is not installed."""
    if base.kind is not None and base.kind not in BASES:
        raise CheckpointError(
            f"report.base.kind: {base.kind!r} is no base format that is installed here; there are {', '.join(BASES)}"
        )
    loading = None if base.kind is None else BASES[base.kind].loading
    return CardBase(
        name=base_name(base),
        revision=base.revision,
        kind=base.kind,
        loading=loading,
        unserved=base.unserved,
    )


def stored_text(report: Report, export: ExportReport | None) -> str:
    """The compressed layers, their forms and their bits; of `export`, or of an output folder with several."""
    verb = "is" if report.totals.n_layers == 1 else "are"
    return (
        f"{layers_text(report)} {verb} stored as {forms_text(report)}, which takes {bits_text(report)}"
        f"{in_which_format(report, export)}"
    )


def layers_text(report: Report) -> str:
    """As in "10 linear layers of `org/tiny`"."""
    return f"{counted(report.totals.n_layers, 'linear layer')} of `{source_name(report)}`"


def bits_text(report: Report) -> str:
    """As in "4.25 bits per weight in these layers"."""
    return f"{report.totals.layer_bits_per_weight:.2f} bits per weight in these layers"


def forms_text(report: Report) -> str:
    """Every form with the number of its layers, the most frequent first."""
    counts = Counter(layer.form for layer in report.layers).most_common()
    forms = [f"{form} ({counted(n, 'layer')})" for form, n in counts]
    return ", ".join(forms) or "they were"


def in_which_format(report: Report, export: ExportReport | None) -> str:
    """Whose the figures of the layers are, where corrections of few bits are stored differently in several exports."""
    if not has_few_bits(report):
        return ""
    coded = [each for each in report.exports if _stores_codes(each)]
    others = len(report.exports) > 1 if export is None else not _stores_codes(export)
    return f" in the {coded[0].format} export" if coded and others else ""


def _stores_codes(export: ExportReport) -> bool:
    return stores_codes([exporter_of(export).name])


def has_few_bits(report: Report) -> bool:
    """Whether factors of corrections were rounded to fewer than 16 bits."""
    widths = (layer.correction_bits for layer in report.layers)
    return any(bits is not None and bits < FULL_BITS for bits in widths)


def seen_from(root: str, folder: str) -> str:
    """A folder of the output as seen from `root`, the folder of the output that has this card."""
    return PurePosixPath(THIS_FOLDER, PurePosixPath(folder).relative_to(root)).as_posix()
