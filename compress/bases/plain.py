"""Ordinary checkpoints whose weights were pruned or otherwise changed: nothing in them is packed."""

from __future__ import annotations

from typing import NoReturn

import torch

from compress.bases.base import Base, Loading
from compress.bases.folder import CheckpointFolder
from compress.errors import CheckpointError
from compress.forms.base import Form
from compress.models.checkpoint import some

_NARROWEST = 2
"""Bytes of a number; narrower ones are quantised."""
_INDEX = torch.int64
"""Of tables that models look something up in, such as the experts of each token; nothing is packed in it."""


class PlainBase(Base, name="plain"):
    """Every weight is one tensor."""

    ordinary = True
    loads_itself = True
    loading = Loading(packages=(), imports=(), arguments={}, peft=True, vllm=())

    @classmethod
    def recognises(cls, folder: CheckpointFolder) -> bool:
        """Whether nothing is said of a quantisation."""
        return folder.quantisation is None

    @property
    def grid(self) -> str:
        """Empty: ordinary weights are on no grid."""
        return ""

    @property
    def description(self) -> str:
        """The description that `inspect` gives ordinary models too."""
        return "ordinary weights"

    def _find_layers(self) -> tuple[str, ...]:
        odd = [
            name
            for name in self.reader
            if len(self.reader.shape(name)) > 1 and _holds_codes(self.reader.dtype(name))
        ]
        if odd:
            dtype = str(self.reader.dtype(odd[0])).removeprefix("torch.")
            raise CheckpointError(
                f"{self.folder}: {some(odd)} are stored as {dtype}, so they are packed or quantised, but no "
                "quantization_config says how; add the config that belongs to them"
            )
        return ()

    def form(self, name: str) -> Form:
        """Raises KeyError: no layer is packed."""
        self._refuse(name)

    def shape(self, name: str) -> tuple[int, int]:
        """Raises KeyError: no layer is packed."""
        self._refuse(name)

    def _refuse(self, name: str) -> NoReturn:
        raise KeyError(f"{name}: no layer of an ordinary checkpoint is packed")


def _holds_codes(dtype: torch.dtype) -> bool:
    return dtype.itemsize < _NARROWEST if dtype.is_floating_point else dtype != _INDEX
