"""Rows of a plan's tables: a layer each, or the experts of a layer together."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Sequence

from compress.models.kinds import expert_of
from compress.planning.layer import PlannedLayer


class Rows(enum.Enum):
    """What a row of a table is of, where layers differ."""

    KINDS = "kinds"
    """A layer, or one projection of all experts of a layer."""
    EACH = "each"
    """A layer, each expert's too."""


def row_name(name: str, rows: Rows) -> str:
    """The row that a layer belongs to: its name, or the glob of its expert and all others of the layer."""
    expert = expert_of(name) if rows is Rows.KINDS else None
    return name if expert is None else expert.pattern


def in_rows(layers: Iterable[PlannedLayer], rows: Rows) -> dict[str, list[PlannedLayer]]:
    """The layers of each row by its name, in the order of their first."""
    found: dict[str, list[PlannedLayer]] = {}
    for layer in layers:
        found.setdefault(row_name(layer.name, rows), []).append(layer)
    return found


def ranks_table(layers: Sequence[PlannedLayer], left: Sequence[str], rows: Rows) -> list[str]:
    """Each row's rank, share of the bytes and predicted error; `left`: layers that stay dense."""
    cells = [("layer", "out x in", "rank", "kept", "predicted")]
    for name, members in in_rows(layers, rows).items():
        before, after = (
            sum(getattr(one, f"bytes_{when}") for one in members) for when in ("before", "after")
        )
        ranks = spread([one.rank for one in members])
        share = f"{100 * after / before:.1f} %"
        cells.append((name, _shape(members), ranks, share, _predicted(members)))
    for name, n in Counter(row_name(name, rows) for name in left).items():
        cells.append((name, f"{n} layers" if n > 1 else "", "dense", "100.0 %", ""))
    return aligned(cells)


def ranks_in_a_recipe(
    layers: Sequence[PlannedLayer], left: Sequence[str], rows: Rows
) -> tuple[list[str], int]:
    """Entries of `ranks` in a recipe, and the number of layers that they leave out.

    Experts of a row that all have one rank are one entry; those that have several are left out.
    """
    ranks = {layer.name: str(layer.rank) for layer in layers} | dict.fromkeys(left, "dense")
    together: dict[str, list[str]] = {}
    for name, rank in ranks.items():
        together.setdefault(row_name(name, rows), []).append(rank)
    entries = [f"{name}={given[0]}" for name, given in together.items() if len(set(given)) == 1]
    return entries, sum(len(given) for given in together.values() if len(set(given)) > 1)


def corrections_table(
    layers: Sequence[PlannedLayer], exports: Sequence[str], rows: Rows
) -> list[str]:
    """Each row's correction, its bytes, and the error that is predicted."""
    cells = [("layer", "out x in", "correction", "bytes", "predicted")]
    for name, members in in_rows(layers, rows).items():
        n_bytes = sum(one.held_correction_bytes(exports) for one in members)
        told = dict.fromkeys(one.correction for one in members)
        text = ", ".join(told) if len(told) == 1 else _corrections(members)
        cells.append((name, _shape(members), text, f"{n_bytes:,}", _predicted(members)))
    return aligned(cells)


def spread(values: Sequence[int | None]) -> str:
    """One value, or the least, the largest and the mean: "12-96, mean 43.1"; "-" stands for None."""
    known = [value for value in values if value is not None]
    if len(set(values)) == 1 or not known:
        return str(values[0]) if known else "-"
    return f"{min(known)}-{max(known)}, mean {sum(known) / len(known):.1f}"


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text as lines: the first column to the left, all others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            f"{cell:<{width}}" if k == 0 else f"{cell:>{width}}"
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def _corrections(members: Sequence[PlannedLayer]) -> str:
    """Several corrections in words: their ranks and bits, and how many layers have none."""
    corrected = [one.compressor for one in members if one.correction != PlannedLayer.NO_CORRECTION]
    ranks = [int(compressor.rank) for compressor in corrected]  # type: ignore[attr-defined]
    bits = sorted({str(compressor.adapter_bits) for compressor in corrected})  # type: ignore[attr-defined]
    none = len(members) - len(corrected)
    more = f", none in {none} of {len(members)}" if none else ""
    return f"rank {spread(ranks)}, {' or '.join(bits)} bits{more}"


def _shape(members: Sequence[PlannedLayer]) -> str:
    """The shape of the layers, or of the first of several."""
    o, i = members[0].shape
    more = f"{len(members)} x " if len(members) > 1 else ""
    return f"{more}{o} x {i}"


def _predicted(members: Sequence[PlannedLayer]) -> str:
    """The predicted error, the mean over several layers; "-" if none is predicted."""
    errors = [one.predicted_error for one in members if one.predicted_error is not None]
    return f"{sum(errors) / len(errors):.4f}" if errors else "-"
