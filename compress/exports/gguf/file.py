"""Writes a GGUF file of tensors that come one by one, with one of them in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.errors import CheckpointError

if TYPE_CHECKING:
    from gguf import GGUFWriter

FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Types of numbers that are no codes."""


@dataclass(frozen=True)
class _Stored:
    """A tensor's bytes in the scratch file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    """In bytes along the last dimension."""
    offset: int


class GgufFile:
    """Tensors go to a scratch file as they come; the file appears in `close`, whole."""

    def __init__(self, folder: Path, architecture: str, stem: str = "model") -> None:
        self.architecture = architecture
        self.n_bytes: dict[str, int] = {}
        """Bytes of tensors by type."""
        self._stored: dict[str, _Stored] = {}
        self._scratch = folder / f"{stem}.scratch"
        self._end = 0

    @property
    def names(self) -> frozenset[str]:
        """Names of the tensors added so far."""
        return frozenset(self._stored)

    def main_type(self) -> str:
        """The type that most bytes of codes have; of floats, where there are no codes."""
        codes = {kind: n for kind, n in self.n_bytes.items() if kind not in FLOATS.values()}
        found = codes or self.n_bytes
        return max(found, key=lambda kind: found[kind])

    def add(self, name: str, kind: str, data: NDArray[np.uint8]) -> None:
        """Write a tensor, given its type ("Q4_0") and its bytes (..., bytes along the inputs).

        Raises CheckpointError for a name that was written before.
        """
        if name in self._stored:
            raise CheckpointError(f"gguf export: {name} is written twice")
        with self._scratch.open("ab" if self._stored else "wb") as stream:
            np.ascontiguousarray(data).tofile(stream)
        self._stored[name] = _Stored(name, kind, data.shape, self._end)
        self._end += data.nbytes
        self.n_bytes[kind] = self.n_bytes.get(kind, 0) + data.nbytes

    def add_floats(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of floats as it is."""
        flat = tensor.detach().cpu().contiguous()
        self.add(name, FLOATS[flat.dtype], flat.view(torch.uint8).numpy())

    def close(self, path: Path, describe: Callable[[GGUFWriter], None]) -> None:
        """Write the file; `describe` adds its keys."""
        from gguf import GGMLQuantizationType, GGUFWriter

        partial = path.with_name(f"{path.name}.partial")
        writer = GGUFWriter(partial, self.architecture)
        describe(writer)
        for one in self._stored.values():
            data = np.memmap(self._scratch, np.uint8, "r", one.offset, one.shape)
            writer.add_tensor(one.name, data, raw_dtype=GGMLQuantizationType[one.kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.rename(path)
        self._scratch.unlink()
