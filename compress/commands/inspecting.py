"""inspect: what is in a checkpoint, and what methods could do to it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from compress.commands.command import Command, show_cells, shown_progress
from compress.errors import RecipeError
from compress.flags import Parser

if TYPE_CHECKING:
    from compress.inspecting import Inspection


def _inspect(given: list[str]) -> None:
    parser = Parser("compress inspect", INSPECT.about, "MODEL [options]")
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a folder, a hub id, a .gguf file, or demo; compressed or not",
    )
    parser.add_argument("--layers", action="store_true", help="a row for each layer")
    parser.add_argument(
        "--spectra", action="store_true", help="effective ranks of the weights; reads all of them"
    )
    known = parser.parse_args(given)
    from compress import inspection_tables as tables
    from compress.inspecting import inspect
    from compress.weight_spectra import weight_spectra

    with shown_progress() as progress:
        found = inspect(known.model, progress=progress)
        if known.spectra and found.ordinary is None:
            raise RecipeError(
                f"--spectra: {known.model} is compressed ({found.format}); spectra are of ordinary weights"
            )
        wanted = found.ordinary if known.spectra else None
        spectra = dict(weight_spectra(wanted, progress=progress)) if wanted else {}
    cells = tables.each_layer(found) if known.layers else tables.layer_cells(found, found.layers)
    n = 6 if found.ordinary is None else 7  # a rank that saves bytes is of ordinary weights
    show_cells(tables.headline(found), tables.LAYER_HEAD[:n], [row[:n] for row in cells])
    for reason, rows in tables.other_cells(found):
        print()
        show_cells(f"not compressed: {reason}", tables.OTHER_HEAD, rows)
    if spectra:
        each = tables.each_spectrum if known.layers else tables.spectra_cells
        print()
        title = "effective ranks" + ("" if known.layers else ", medians over the layers")
        show_cells(title, tables.SPECTRA_HEAD, each(spectra))
    if found.ordinary is not None:
        _show_methods(found)


def _show_methods(found: Inspection) -> None:
    """What each method could do, by its own plan."""
    from compress import inspection_tables as tables
    from compress.possibilities import possibilities

    assert found.ordinary is not None
    possible = possibilities(found.ordinary)
    n_weights = sum(math.prod(layer.shape) for layer in found.layers)
    rows = tables.method_cells(possible, found.n_bytes, n_weights)
    print()
    show_cells("what methods would make of it", tables.METHODS_HEAD, rows)
    for line in tables.refused_lines(possible):
        print(f"refused: {line}")
    print(tables.group_line(found))
    print("rank <: two factors of a lower rank take fewer bytes than the weight")


INSPECT = Command(_inspect, "Show what is in a checkpoint, and what methods could do to it.")
