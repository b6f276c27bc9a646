"""Integer codes on a grid, packed.

Shapes: o = out_features, i = in_features, G = number of groups.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from .base import Builder, Form, Spec, scales_spec, told_scales
from .dense import Dense
from .packing import pack, unpack, words_for


class Quantised(Form, name="quantised"):
    """Integer codes on a grid: W[o, i] = scales[g, o] * (codes[i, o] - zeros[g, o]), g = the group of input i.

    Symmetric: no zeros are stored, they are all 2**(bits - 1); a scale may then be negative, which puts the longer
    side of the grid, -2**(bits - 1), where the weights need it. Affine: W = scales * codes + offsets, with the weight
    at code 0 stored in the place of an integer zero. Without `g_idx`, input i is in group i // group_size (the last
    group may be shorter). Tensors: qweight (ceil(i / 32) * bits, o) int32, scales (G, o) fp16 or bf16, qzeros
    (G, ceil(o / 32) * bits) int32, offsets (G, o) as scales, g_idx (i,) int32.
    """

    qweight: Tensor
    scales: Tensor
    qzeros: Tensor | None
    offsets: Tensor | None
    g_idx: Tensor | None

    def __init__(
        self, shape: tuple[int, int], bits: int, group_size: int, tensors: Mapping[str, Tensor]
    ) -> None:
        super().__init__(shape)
        self.bits, self.group_size = bits, group_size
        for name in ("qweight", "scales", "qzeros", "offsets", "g_idx"):
            self.register_buffer(name, tensors.get(name))

    @classmethod
    def from_codes(
        cls,
        codes_oi: Tensor,
        scales_og: Tensor,
        zeros_og: Tensor | None,
        *,
        bits: int,
        group_size: int,
        groups_i: Tensor | None = None,
    ) -> Self:
        """Pack codes (o, i), scales (o, G) and zeros (o, G, None when symmetric); `groups_i` (i,) if not in order."""
        o, i = codes_oi.shape
        tensors = {
            "qweight": pack(codes_oi.T, bits),
            "scales": scales_og.T.to(torch.float16).contiguous(),
        }
        if zeros_og is not None:
            tensors["qzeros"] = pack(zeros_og, bits).T.contiguous()
        if groups_i is not None:
            tensors["g_idx"] = groups_i.to(torch.int32)
        return cls((o, i), bits, group_size, tensors)

    def with_offsets(self, offsets_og: Tensor) -> "Quantised":
        """The affine form of these codes and scales, with offsets (o, G) in the place of zeros."""
        tensors = {"qweight": self.qweight, "scales": self.scales}
        tensors["offsets"] = offsets_og.T.to(self.scales.dtype).contiguous()
        if self.g_idx is not None:
            tensors["g_idx"] = self.g_idx
        return Quantised(self.shape, self.bits, self.group_size, tensors)

    @classmethod
    def joined(cls, parts: Sequence["Quantised"]) -> "Quantised":
        """Forms of the same settings with their rows one below the other; symmetric, groups in order."""
        if not all(part.symmetric and part.g_idx is None for part in parts):
            raise ValueError("only symmetric grids with their groups in order are joined")
        first, o = parts[0], sum(part.shape[0] for part in parts)
        tensors = {
            name: torch.cat([getattr(part, name) for part in parts], 1)
            for name in ("qweight", "scales")
        }
        return Quantised((o, first.shape[1]), first.bits, first.group_size, tensors)

    @classmethod
    def empty(cls, spec: Spec, shape: tuple[int, int], build: Builder) -> Self:  # noqa: D102
        (o, i), bits, group_size = shape, int(spec["bits"]), int(spec["group_size"])
        n_groups = -(-i // group_size)
        sizes = {"qweight": (words_for(i, bits), o)}
        affine = bool(spec.get("affine", False))
        if not (spec["symmetric"] or affine):
            sizes["qzeros"] = (n_groups, words_for(o, bits))
        tensors = {name: build.tensor(*size, dtype=torch.int32) for name, size in sizes.items()}
        tensors["scales"] = build.scales(spec, n_groups, o)
        if affine:
            tensors["offsets"] = build.scales(spec, n_groups, o)
        if not spec["ordered"]:
            tensors["g_idx"] = build.tensor(i, dtype=torch.int32)
        return cls(shape, bits, group_size, tensors)

    @property
    def symmetric(self) -> bool:
        """Whether every zero is 2**(bits - 1), and none is stored."""
        return self.qzeros is None and self.offsets is None

    @property
    def affine(self) -> bool:
        """Whether each group stores an offset, and has no integer zero."""
        return self.offsets is not None

    def codes(self) -> Tensor:
        """The unpacked codes: (i, o) int32."""
        return unpack(self.qweight, self.bits, self.shape[1])

    def zeros(self) -> Tensor:
        """The unpacked zero points: (G, o) int32. Raises ValueError for an affine grid, which has none."""
        if self.offsets is not None:
            raise ValueError("an affine grid has offsets, and no integer zero points")
        if self.qzeros is None:
            return torch.full_like(self.scales, 1 << (self.bits - 1), dtype=torch.int32)
        return unpack(self.qzeros.T.contiguous(), self.bits, self.shape[0]).T

    def groups(self) -> Tensor:
        """(i,) int64: the group of each input."""
        if self.g_idx is not None:
            return self.g_idx.to(torch.int64)
        return torch.arange(self.shape[1], device=self.qweight.device) // self.group_size

    def dense(self) -> Tensor:  # noqa: D102
        values_io, every = self.codes().float(), slice(None)
        i, o = values_io.shape
        if self.g_idx is None and i % self.group_size == 0:
            self._apply_(values_io.view(-1, self.group_size, o), every, (every, None))
        else:
            self._apply_(values_io, every, self.groups())
        return values_io.T  # as it lies in memory: transposing it costs more than all of the above

    def rows(self, index: Tensor) -> Tensor:  # noqa: D102
        codes_in = unpack(self.qweight[:, index], self.bits, self.shape[1]).float()
        return self._apply_(codes_in, index, self.groups()).T

    def _apply_(self, values: Tensor, rows: Tensor | slice, groups: Any) -> Tensor:
        """Codes of these rows, in place, to weights; `groups` picks from (G, n) what belongs to each."""
        scales = self.scales[:, rows].float()[groups]
        if self.offsets is not None:
            return values.mul_(scales).add_(self.offsets[:, rows].float()[groups])
        if self.qzeros is None:
            return values.sub_(1 << (self.bits - 1)).mul_(scales)
        return values.sub_(self.zeros()[:, rows].float()[groups]).mul_(scales)

    def spec(self) -> dict[str, Any]:  # noqa: D102
        return {
            "form": self.kind,
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "ordered": self.g_idx is None,
            **({"affine": True} if self.affine else {}),
            **scales_spec(self.scales),
        }

    def unpacked(self, dtype: torch.dtype) -> Form:  # noqa: D102
        return Dense(self.dense().to(dtype))

    def describe(self) -> str:  # noqa: D102
        kind = " affine" if self.affine else "" if self.symmetric else " asymmetric"
        return f"{self.label()}{kind}{told_scales(self.scales)}"

    def label(self) -> str:  # noqa: D102
        return f"{self.bits}-bit g{self.group_size}"
