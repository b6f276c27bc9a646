"""AWQ checkpoints of AutoAWQ and of tools that write its layout for matrix products ("gemm"), 4 bits.

Tensors of a layer: qweight (i, o / 8) int32, qzeros (G, o / 8) int32, scales (G, o) fp16. A word holds eight outputs,
in the order ORDER from its lowest bits on: Lin et al. 2023, arXiv:2306.00978; facts: AutoAWQ's `WQLinear_GEMM`.
Zeros are stored as they are.
Shapes: o = out_features, i = in_features, G = number of groups of inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.bases.base import Base, Loading, is_whole, on_grid, refuse_bad_scales
from compress.bases.folder import CheckpointFolder
from compress.bases.packed import fields
from compress.errors import CheckpointError
from compress.forms.base import Form

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of a word's eight outputs lies in its first four bits, its second, and so on."""
VERSIONS = ("gemm",)
_OUTPUTS = len(ORDER)


class AwqBase(Base, name="awq"):
    """Layers as AWQ's three tensors, packed along the outputs."""

    parts = ("qweight", "scales", "qzeros")
    loading = Loading(
        packages=("gptqmodel", "accelerate"), imports=(), arguments={}, peft=True, vllm=()
    )

    @classmethod
    def recognises(cls, folder: CheckpointFolder) -> bool:
        """Whether its quantisation is named awq, or unnamed (old files) with `w_bit`."""
        if folder.quant_method is not None or folder.quantisation is None:
            return super().recognises(folder)
        return "w_bit" in folder.quantisation

    def _find_layers(self) -> tuple[str, ...]:
        named = self.settings.get("version") or self.settings.get("format") or VERSIONS[0]
        version = str(named).lower()
        bits = self.settings.get("bits", self.settings.get("w_bit"))
        if version not in VERSIONS:
            raise CheckpointError(
                f"{self.folder}: version {version!r} of awq is not supported; supported: {', '.join(VERSIONS)}"
            )
        if bits != BITS:
            raise CheckpointError(
                f"{self.folder}: {bits!r} bits of awq are not supported; supported: {BITS}"
            )
        return super()._find_layers()

    @property
    def _group_size(self) -> int:
        size = self.settings.get("group_size", self.settings.get("q_group_size", -1))
        if not isinstance(size, int) or (not is_whole(size, 1) and size != -1):
            raise CheckpointError(
                f"{self.folder}: group_size must be -1, or 1 or more; got {size!r}"
            )
        return size

    @property
    def grid(self) -> str:
        """Bits and group size: "4 bits, groups of 128"."""
        size = self._group_size
        return f"{BITS} bits, {'whole rows' if size == -1 else f'groups of {size}'}"

    def shape(self, name: str) -> tuple[int, int]:
        """(o, i), from the shape of qweight."""
        shape = self._shape_of(name, "qweight")
        dtype = self.reader.dtype(f"{name}.qweight")
        if len(shape) != 2 or dtype != torch.int32:
            raise CheckpointError(
                f"{self.folder}: {name}.qweight is {dtype} {shape}; awq packs codes in int32, (inputs, outputs / 8)"
            )
        return shape[1] * _OUTPUTS, shape[0]

    def form(self, name: str) -> Form:
        """The quantised weight, its codes packed along the inputs instead of the outputs."""
        o, i = self.shape(name)
        size = i if self._group_size == -1 else self._group_size
        n_groups = -(-i // size)
        facts = f"{i} inputs in groups of {size} and {o} outputs"
        self._refuse_shape(name, "scales", (n_groups, o), facts)
        self._refuse_shape(name, "qzeros", (n_groups, o // _OUTPUTS), facts)
        scales_go = self._tensor(name, "scales")
        refuse_bad_scales(f"{self.folder}: {name}", scales_go)
        groups_i = torch.arange(i) // size
        codes_io, zeros_go = (_in_order(self._words(name, part)) for part in ("qweight", "qzeros"))
        grid = {"bits": BITS, "group_size": size}
        return on_grid(codes_io.T, scales_go.T, zeros_go.T, **grid, groups_i=groups_i)


def _in_order(words_nm: Tensor) -> Tensor:
    """(n, o / 8) words -> (n, o) codes, outputs in their own order."""
    found = fields(words_nm, BITS).reshape(words_nm.shape[0], -1, _OUTPUTS)
    places = [ORDER.index(k) for k in range(_OUTPUTS)]
    return found[:, :, places].reshape(words_nm.shape[0], -1)
