"""Low-rank corrections as a GGUF adapter: W + B A, with a scaling of exactly 1 for every layer.

llama.cpp divides the adapter's one alpha by the rank of each layer, so no alpha is right where ranks differ; an alpha
of 0 means a scaling of 1.

Shapes: o = out_features, i = in_features, r = rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from compress.errors import CheckpointError
from compress.exports.base import LayerExport
from compress.exports.contents import StoredTensor
from compress.exports.gguf.file import GgufFile
from compress.exports.gguf.names import Names
from compress.families.low_rank import Factors, as_low_rank
from compress.forms.low_rank import LowRank

if TYPE_CHECKING:
    from gguf import GGUFWriter, ReaderTensor

FILE = "adapter.gguf"
_DOWN, _UP = ".lora_a", ".lora_b"


class AdapterFile:
    """Writes the factors of one layer after the other."""

    def __init__(self, folder: Path, names: Names) -> None:
        self.folder, self.names = folder, names
        self.rounded: torch.dtype | None = None
        self._file = GgufFile(folder, names.family.architecture, "adapter")

    def add(self, layer: LayerExport, correction: Factors) -> None:
        """Add a layer's factors (r, i) and (o, r): those on grids by their values, for ggml has no such type."""
        form = as_low_rank(correction)
        if form.up.bias is not None:
            raise CheckpointError(
                f"gguf export: {layer.name}: its correction shifts the mean of the outputs, and adapters hold none; "
                "choose native, or --centre none"
            )
        if form is not correction:
            self.rounded = form.up.weight.dtype
        place = self.names.weight(layer.name)
        up, order = form.up.weight.detach(), self.names.rows(f"{layer.name}.weight")
        self._file.add_floats(f"{place.name}{_DOWN}", form.down.weight)
        self._file.add_floats(f"{place.name}{_UP}", up if order is None else up[order])

    def close(self, name: str) -> None:
        """Finish; `name`: what the adapter is called."""

        def describe(writer: GGUFWriter) -> None:
            writer.add_type("adapter")
            writer.add_name(name)
            writer.add_string("adapter.type", "lora")
            writer.add_float32("adapter.lora.alpha", 0.0)

        self._file.close(self.folder / FILE, describe)


def read_factors(folder: Path) -> dict[str, LowRank]:
    """The factors of every layer by the name of its weight in the file; none where there is no adapter."""
    pairs = _pairs(folder)
    return {
        name: LowRank.from_factors(floats_of(up), floats_of(down))
        for name, (down, up) in pairs.items()
    }


def least_rank(folder: Path) -> int | None:
    """The lowest rank of a correction; None where there is no adapter."""
    return min((int(down.shape[1]) for down, _ in _pairs(folder).values()), default=None)


def corrections_in(folder: Path) -> tuple[StoredTensor, ...]:
    """The low-rank correction of every layer, by the name of its weight in the file."""
    return tuple(
        StoredTensor(
            name=name.removesuffix(".weight"),
            shape=(int(up.shape[1]), int(down.shape[0])),
            stored=f"rank {int(down.shape[1])}",
            n_bytes=int(down.n_bytes) + int(up.n_bytes),
        )
        for name, (down, up) in _pairs(folder).items()
    )


def _pairs(folder: Path) -> dict[str, tuple[ReaderTensor, ReaderTensor]]:
    from gguf import GGUFReader

    path = folder / FILE
    if not path.is_file():
        return {}
    tensors = {tensor.name: tensor for tensor in GGUFReader(str(path)).tensors}
    names = [name.removesuffix(_DOWN) for name in tensors if name.endswith(_DOWN)]
    absent = [name for name in names if f"{name}{_UP}" not in tensors]
    if absent or len(tensors) != 2 * len(names):
        raise CheckpointError(f"{path}: it holds something else than pairs of lora_a and lora_b")
    return {name: (tensors[f"{name}{_DOWN}"], tensors[f"{name}{_UP}"]) for name in names}


def floats_of(tensor: ReaderTensor) -> torch.Tensor:
    """A tensor of a file that holds floats, in their dtype; a copy."""
    from gguf import GGMLQuantizationType

    data = torch.from_numpy(np.array(tensor.data))
    if tensor.tensor_type == GGMLQuantizationType.BF16:
        return data.view(torch.bfloat16)
    return data
