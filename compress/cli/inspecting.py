"""inspect: what is in a checkpoint, and what methods could do to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from compress.cli.command import Given
from compress.cli.showing import show_cells, shown_progress
from compress.cli.writing import Written, refuse_place, write_whole
from compress.errors import RecipeError

if TYPE_CHECKING:
    from compress.inspection.checkpoint import Inspection
    from compress.inspection.possibilities import Possibility
    from compress.inspection.spectra import EffectiveRanks
    from compress.planning.rows import Rows


MARK = "<!-- written by compress inspect -->"
"""Ends the page, so that it is known again before it is replaced."""
_PAGE = Written("page", "compress inspect", lambda text: text.rstrip().endswith(MARK))


def inspect(given: Given) -> None:
    """Show what is in a checkpoint."""
    known = given.own
    if known.html is not None:
        refuse_place("--html", known.html, _PAGE)
    from compress.inspection import checkpoint
    from compress.inspection.possibilities import possibilities
    from compress.inspection.spectra import weight_spectra
    from compress.planning.rows import Rows

    with shown_progress() as progress:
        found = checkpoint.inspect(known.model, progress=progress)
        if known.spectra and found.ordinary is None:
            raise RecipeError(
                f"--spectra: {known.model} is compressed ({found.format}); spectra are of ordinary weights"
            )
        wanted = found.ordinary if known.spectra else None
        spectra = dict(weight_spectra(wanted, progress=progress)) if wanted else {}
        possible = [] if found.ordinary is None else possibilities(found.ordinary)
    _show_layers(found, Rows(known.layers))
    if spectra:
        _show_spectra(spectra, Rows(known.layers))
    if possible:
        _show_methods(found, possible)
    if known.html is not None:
        # Pictures take a while to import, and most inspections go without.
        from compress.inspection.page import inspection_page

        page = inspection_page(known.model, found, possible, spectra)
        write_whole(known.html, f"{page.rstrip()}\n{MARK}\n")
        print(f"the picture is {known.html}")


def _show_layers(found: Inspection, rows: Rows) -> None:
    from compress.inspection import tables as tables
    from compress.planning.rows import Rows

    cells = (
        tables.each_layer(found) if rows is Rows.EACH else tables.layer_cells(found, found.layers)
    )
    n = tables.n_layer_columns(found)
    show_cells(tables.headline(found), tables.LAYER_HEAD[:n], [row[:n] for row in cells])
    kinds = tables.kind_cells(found)
    if kinds:
        print()
        show_cells(tables.mixture_line(found), tables.KIND_HEAD, kinds)
    for reason, others in tables.other_cells(found):
        print()
        show_cells(f"not compressed: {reason}", tables.OTHER_HEAD, others)


def _show_spectra(spectra: Mapping[str, EffectiveRanks], rows: Rows) -> None:
    from compress.inspection import tables as tables
    from compress.planning.rows import Rows

    each = tables.each_spectrum if rows is Rows.EACH else tables.spectra_cells
    print()
    title = "effective ranks" + ("" if rows is Rows.EACH else ", medians over the layers")
    show_cells(title, tables.SPECTRA_HEAD, each(spectra))


def _show_methods(found: Inspection, possible: Sequence[Possibility]) -> None:
    """What each method could do, by its own plan."""
    from compress.inspection import tables as tables

    n_weights = sum(math.prod(layer.shape) for layer in found.layers)
    rows = tables.method_cells(possible, found.n_bytes, n_weights)
    print()
    show_cells("what methods would make of it", tables.METHODS_HEAD, rows)
    for line in tables.refused_lines(possible):
        print(f"refused: {line}")
    print(tables.group_line(found))
    print("break-even rank: two factors of a lower rank take fewer bytes than the weight")
