"""An original that exists in few bits alone, read as the ordinary checkpoint that it stands for.

Each weight is dequantised when it is asked for, and rounded to the model's own dtype, as transformers does when it
dequantises on loading; nothing is kept. So everything else sees ordinary weights under their plain names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.bases.base import Base
from compress.bases.detecting import kind_of
from compress.bases.folder import CheckpointFolder
from compress.errors import CheckpointError
from compress.models.checkpoint import Reader, Tensors
from compress.models.model_config import is_dense, is_leftover

WEIGHT = ".weight"


class Dequantised(Tensors):
    """The tensors that an ordinary checkpoint of the model has. Sizes are those of ordinary weights, too."""

    def __init__(self, base: Base) -> None:
        """Raises CheckpointError naming the first tensor whose header does not fit the others or the config."""
        self.base, self.folder = base, base.folder
        self.own_dtype = _dtype_in(base)
        """The dtype of dequantised weights."""
        self._layers = {f"{name}{WEIGHT}": name for name in base.layers}
        self._plain = dict.fromkeys(base.plain)
        self._shapes: dict[str, tuple[int, ...]] = {
            **{tensor: base.shape(name) for tensor, name in self._layers.items()},
            **{name: base.stack_shape(name) for name in base.stacks},
        }

    def __getitem__(self, name: str) -> Tensor:
        """The tensor, in memory of its own. Raises KeyError; CheckpointError as the format does."""
        if name in self._plain:
            return self.base.reader[name]
        if name in self.base.stacks:
            return self._rounded(name, self.base.stack(name))
        return self._rounded(name, self.base.form(self._layers[name]).dense())

    def _rounded(self, name: str, weight: Tensor) -> Tensor:
        found = weight.to(self.own_dtype).contiguous()
        if not bool(torch.isfinite(found).all()):
            dtype = str(self.own_dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{self.folder}: {name} reaches beyond {dtype}, the dtype in its config.json; download the checkpoint "
                "again"
            )
        return found

    def __iter__(self) -> Iterator[str]:
        yield from self._plain
        yield from self._shapes

    def __len__(self) -> int:
        return len(self._plain) + len(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._plain or name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that the model gives a tensor."""
        return self._shapes[name] if name in self._shapes else self.base.reader.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor as it is given."""
        return self.own_dtype if name in self._shapes else self.base.reader.dtype(name)

    @cached_property
    def fingerprint(self) -> str:
        """Of the files."""
        return self.base.reader.fingerprint

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return self.base.reader.total_bytes

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks for reports: what the original is stored as, its bytes, and what of it engines do otherwise."""
        dtype = str(self.own_dtype).removeprefix("torch.")
        return (
            f"the original is stored in few bits ({self.base.description}): its dequantised weights count as the "
            f"original, {self.total_bytes:,} bytes in {dtype}, of which the files hold {self.stored_bytes:,}",
            *(
                f"the original: {remark}; this run computes without it"
                for remark in self.base.remarks
            ),
        )


def open_original(folder: Path) -> Tensors:
    """The tensors of a model's folder: ordinary ones as they are, and those of few bits dequantised one at a time.

    Raises CheckpointError for a format in which no model is published, and for a checkpoint that is not whole.
    """
    found = CheckpointFolder(Path(folder))
    kind = kind_of(found)
    if kind.ordinary:
        return Reader(found.path)
    if not kind.published:
        raise CheckpointError(
            f"{folder}: already compressed ({kind.format}); name the model that it was made from"
        )
    if found.quantisation is not None and is_leftover(found.path, found.quantisation):
        return found.reader
    base = kind(found)
    return Dequantised(base) if base.layers or base.stacks else base.reader


def _dtype_in(base: Base) -> torch.dtype:
    """The dtype that config.json names, of the text model where there are others; bfloat16 if it names none."""
    found = _named(base.config)
    inner = base.config.get("text_config")
    if found is None and isinstance(inner, Mapping):
        found = _named(inner)
    dtype = getattr(torch, str(found or "bfloat16").removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not is_dense(dtype):
        raise CheckpointError(
            f"{base.folder}: config.json has dtype {found!r}, which no model computes in; float32, bfloat16 and "
            "float16 are right"
        )
    return dtype


def _named(config: Mapping[str, Any]) -> object:
    return config.get("dtype") or config.get("torch_dtype")
