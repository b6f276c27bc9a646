"""The saved statistics of a model as `imatrix.gguf`, for those who quantise with llama-quantize."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from calibration.statistics.gram import Gram
from calibration.store import Store
from compress.errors import RecipeError
from compress.exports.gguf.families import FAMILIES, family_of
from compress.exports.gguf.imatrix import Text, write_imatrix
from compress.prepare.prepare import Prepared


def refuse_imatrix(prepared: Prepared) -> None:
    """Raises RecipeError for a model whose layers have no names in GGUF files here."""
    config = prepared.model.config
    if family_of(config) is None:
        raise RecipeError(
            f"{config.model_type} is none of the families that have names in GGUF files here: {', '.join(FAMILIES)}",
            option="imatrix",
        )


def save_imatrix(prepared: Prepared, store: Store, path: Path) -> int:
    """Write the file of complete statistics; the number of matrices. Raises InputError for statistics that changed."""
    text = Text(
        sources=[str(source["source"]) for source in prepared.tokens.provenance["sources"]],
        n_sequences=len(prepared.tokens.input_ids),
        seq_len=prepared.tokens.input_ids.shape[1],
    )
    return write_imatrix(path, prepared.model.config, _inputs(prepared, store), text)


def _inputs(prepared: Prepared, store: Store) -> Iterator[tuple[str, Gram]]:
    for block in range(prepared.plan.n_blocks):
        for shared in store.load(block, prepared.device):
            for name in shared.names:
                yield name, shared.stats[Gram]
