"""The squares of layers' inputs as `imatrix.gguf`, by which llama-quantize weighs errors.

Shapes: i = inputs of a layer; e = experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PretrainedConfig

from calibration.statistics.gram import Gram
from compress.exports.gguf.file import GgufFile
from compress.exports.gguf.names import Names

if TYPE_CHECKING:
    from gguf import GGUFWriter

_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Text:
    """The text that the inputs are of."""

    sources: Sequence[str]
    n_sequences: int
    seq_len: int


def write_imatrix(
    path: Path, config: PretrainedConfig, inputs: Iterable[tuple[str, Gram]], text: Text
) -> int:
    """Write what the Gram matrices' diagonals are; the number of matrices. `inputs`: layers by name in the model.

    Experts that no token reached count 0 tokens, of which readers make ones.
    """
    names, found = Names(config), dict[str, dict[int | None, tuple[Tensor, int]]]()
    for layer, gram in inputs:
        place = names.weight(layer)
        squares_i = gram.sum_ii.diagonal().float().cpu()
        found.setdefault(place.name, {})[place.expert] = squares_i, gram.n_tokens
    file = GgufFile(path.parent, names.family.architecture, path.stem)
    for name, parts in found.items():
        n_parts = 1 if None in parts else names.n_experts
        example = next(iter(parts.values()))[0]
        sums, counts = torch.zeros(n_parts, len(example)), torch.zeros(n_parts, 1)
        for number, (squares_i, n_tokens) in parts.items():
            sums[number or 0], counts[number or 0] = squares_i, n_tokens
        file.add_floats(f"{name}{_SUMS}", sums)
        file.add_floats(f"{name}{_COUNTS}", counts)

    def describe(writer: GGUFWriter) -> None:
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", list(text.sources))
        writer.add_uint32("imatrix.chunk_count", text.n_sequences)
        writer.add_uint32("imatrix.chunk_size", text.seq_len)

    file.close(path, describe)
    return len(found)
