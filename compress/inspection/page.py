"""The page of an inspection: what is in a checkpoint and what methods would make of it, in pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.inspection.checkpoint import Inspection
from compress.inspection.possibilities import Possibility
from compress.inspection.spectra import EffectiveRanks
from compress.inspection.tables import (
    LAYER_HEAD,
    OTHER_HEAD,
    SPECTRA_HEAD,
    Cells,
    each_layer,
    group_line,
    headline,
    layer_cells,
    n_layer_columns,
    other_cells,
    refused_lines,
    spectra_cells,
)
from compress.report.numbers import Measured, counted, in_bytes, megabytes
from compress.report.pages.charts import bits_figure, cells_of
from compress.report.pages.figures import Bar, Figure, bars, heat_map
from compress.report.pages.headline import Stat
from compress.report.pages.places import part_of, places_of
from compress.report.pages.rendering import render
from compress.report.pages.run import MOST_LAYERS
from compress.report.pages.theme import PAGE

_HUNDRED = 100.0


@dataclass(frozen=True)
class MethodRow:
    """What methods would make of a checkpoint at one setting, as text and as shares of what it takes now."""

    setting: str
    methods: str
    bits: str
    layers: str
    whole: str
    kept: str
    layers_percent: float
    whole_percent: float


@dataclass(frozen=True)
class Rows:
    """Heads and rows of a table."""

    head: Cells
    rows: Sequence[Cells]


@dataclass(frozen=True)
class Spectra:
    """Effective ranks as heat maps and as a table; all empty where nobody asked for them."""

    figures: tuple[Figure, ...]
    head: Cells
    rows: Sequence[Cells]


def inspection_page(
    spec: str,
    found: Inspection,
    possible: Sequence[Possibility],
    spectra: Mapping[str, EffectiveRanks],
) -> str:
    """One HTML file that fetches nothing; `possible` and `spectra` are empty for what was not measured."""
    n = n_layer_columns(found)
    name = name_of(spec)
    return render(
        "inspection.html",
        title=f"{name}, inspected",
        name=name,
        lead=headline(found),
        stats=_stats(found),
        bytes=bytes_figure(found),
        layers=Rows(LAYER_HEAD[:n], [row[:n] for row in layer_cells(found, found.layers)]),
        bits=bits_figure(
            {it.name: 8 * it.n_bytes / math.prod(it.shape) for it in found.layers}, PAGE
        ),
        spectra=_spectra(spectra),
        methods=method_rows(found, possible),
        refused=refused_lines(possible),
        groups=group_line(found),
        others=other_cells(found),
        other_head=OTHER_HEAD,
        every=Rows(LAYER_HEAD[:n], [row[:n] for row in each_layer(found)[:MOST_LAYERS]]),
        n_layers=len(found.layers),
    )


def name_of(spec: str) -> str:
    """A model as a page calls it: a folder's last name, or else the words that name it."""
    folder = Path(spec).expanduser()
    return folder.resolve().name if folder.exists() else spec


def bytes_figure(found: Inspection) -> Figure:
    """Bytes by part: each projection in the model's order, then what is not compressed, largest first."""
    places = places_of([layer.name for layer in found.layers])
    layers: dict[str, int] = {}
    for layer in found.layers:
        part = places[layer.name].projection
        layers[part] = layers.get(part, 0) + layer.n_bytes
    others: dict[str, int] = {}
    for tensor in found.others:
        part = part_of(tensor.name, tensor.reason)
        others[part] = others.get(part, 0) + tensor.n_bytes
    parts = [*layers.items(), *sorted(others.items(), key=lambda entry: -entry[1])]
    rows = [
        Bar(part, f"{megabytes(size)}, {_percent(size / found.n_bytes)}", size / 1e6)
        for part, size in parts
    ]
    told = "All tensors of the checkpoint by part, layers of a kind together."
    return Figure("Where the bytes are", bars(rows, PAGE), told)


def method_rows(found: Inspection, possible: Sequence[Possibility]) -> list[MethodRow]:
    """The possible settings, from the largest to the smallest checkpoint."""
    n_weights = sum(math.prod(layer.shape) for layer in found.layers)
    planned = [
        (one, one.layer_bytes, one.n_bytes)
        for one in possible
        if one.layer_bytes is not None and one.n_bytes is not None
    ]
    return [
        MethodRow(
            setting=one.setting,
            methods=", ".join(one.methods),
            bits=f"{8 * layer_bytes / n_weights:.2f}",
            layers=megabytes(layer_bytes),
            whole=megabytes(n_bytes),
            kept=_percent(n_bytes / found.n_bytes),
            layers_percent=round(min(_HUNDRED, _HUNDRED * layer_bytes / found.n_bytes), 1),
            whole_percent=round(min(_HUNDRED, _HUNDRED * n_bytes / found.n_bytes), 1),
        )
        for one, layer_bytes, n_bytes in sorted(planned, key=lambda each: -each[2])
    ]


def _stats(found: Inspection) -> list[Stat]:
    layer_bytes = sum(layer.n_bytes for layer in found.layers)
    n_weights = sum(math.prod(layer.shape) for layer in found.layers)
    size, inside = (in_bytes(Measured(n_bytes)) for n_bytes in (found.n_bytes, layer_bytes))
    share = f"{_percent(layer_bytes / found.n_bytes)} of the bytes"
    stats = [
        Stat("Size", size.number, size.suffix, change="of all tensors"),
        Stat("Layers", str(len(found.layers)), change=f"in {counted(found.n_blocks, 'block')}"),
        Stat("In the layers", inside.number, inside.suffix, change=share),
    ]
    if n_weights:
        bits = 8 * layer_bytes / n_weights
        stats.append(Stat("Bits per weight", f"{bits:.2f}", change="in the layers"))
    return stats


def _spectra(spectra: Mapping[str, EffectiveRanks]) -> Spectra:
    if not spectra:
        return Spectra((), (), ())
    figures = (
        _ranks(
            spectra,
            "Directions that hold 90 % of the energy",
            "of the full rank",
            lambda it: it.holds_90 / it.full if it.full else 0.0,
            "The fewest singular values that hold 90 % of the sum of their squares, as a share of all that the weight "
            "has: where it is low, a low rank keeps much. This is the weight alone, without its inputs.",
        ),
        _ranks(
            spectra,
            "Stable rank",
            "stable rank",
            lambda it: it.stable,
            "The sum of the squared singular values over the largest of them: about 1 where one direction rules.",
        ),
    )
    return Spectra(figures, SPECTRA_HEAD, spectra_cells(spectra))


def _ranks(
    spectra: Mapping[str, EffectiveRanks],
    title: str,
    quantity: str,
    of: Callable[[EffectiveRanks], float],
    told: str,
) -> Figure:
    values = {name: of(ranks) for name, ranks in spectra.items()}
    number = ".0%" if max(values.values()) <= 1 else ".0f"
    lowest = min(values, key=values.__getitem__)
    told += f" The lowest is {values[lowest]:{number}}, in {lowest}."
    return Figure(title, heat_map(cells_of(values), quantity, number, PAGE), told)


def _percent(share: float) -> str:
    return f"{_HUNDRED * share:.1f} %"
