"""GPTQ checkpoints of gptqmodel, auto-gptq, auto-round and our own: v1 and v2, 2, 3, 4 and 8 bits.

Tensors of a layer: qweight (i * bits / 32, o) int32, codes along the inputs; qzeros (G, o * bits / 32) int32, along the
outputs, in v1 less one; scales (G, o); g_idx (i,) int32. The last group may be shorter.
Shapes: o = out_features, i = in_features, G = number of groups of inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.bases.base import (
    Base,
    Loading,
    exact_in_fp16,
    fits,
    is_whole,
    on_grid,
    refuse_bad_groups,
    refuse_bad_scales,
    table_in,
)
from compress.bases.folder import CheckpointFolder
from compress.errors import CheckpointError
from compress.forms.base import Form
from compress.forms.packing import CODES_A_ROW, WORD, pack, unpack
from compress.forms.quantised import Quantised

BITS = (2, 3, 4, 8)
SERVED_BITS = (4, 8)
SERVED_GROUPS = (32, 64, 128)
"""Besides whole rows: what the kernels of vLLM and SGLang take."""
ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
"""The number to add to a stored zero point, by checkpoint_format."""


class GptqBase(Base, name="gptq"):
    """Layers as GPTQ's four tensors."""

    parts = ("qweight", "scales", "qzeros", "g_idx")
    loading = Loading(
        packages=("gptqmodel", "optimum"), imports=(), arguments={}, peft=True, vllm=()
    )

    @classmethod
    def recognises(cls, folder: CheckpointFolder) -> bool:
        """Whether its quantisation is named gptq, or unnamed (old files) with `bits`, and without AWQ's `w_bit`."""
        if folder.quant_method is not None or folder.quantisation is None:
            return super().recognises(folder)
        return "bits" in folder.quantisation and "w_bit" not in folder.quantisation

    @property
    def grid(self) -> str:
        """Bits, group size, order and version: "4 bits, groups of 128, by act-order"."""
        size, kind = self.settings.get("group_size"), self.settings.get("checkpoint_format")
        groups = "whole rows" if size == -1 else f"groups of {size}"
        version = ", v2" if kind == "gptq_v2" else ""
        order = ", by act-order" if self.settings.get("desc_act") else ""
        return f"{self.settings.get('bits')} bits, {groups}{order}{version}"

    @property
    def unserved(self) -> tuple[str, ...]:
        """Widths, zero points, orders and groups that vLLM and SGLang refuse."""
        bits, size = self.settings.get("bits"), self.settings.get("group_size")
        found = {
            f"{bits} bits": bits not in SERVED_BITS,
            "zero points": not self.settings.get("sym", True),
            "activation order (desc_act)": bool(self.settings.get("desc_act")),
            f"groups of {size}": size not in (*SERVED_GROUPS, -1),
        }
        return tuple(
            f"vLLM and SGLang take no GPTQ with {what}" for what, is_so in found.items() if is_so
        )

    @property
    def producer(self) -> str | None:
        """The name that gptqmodel, auto-round and this toolkit write; auto-gptq writes none."""
        meta = self.settings.get("meta")
        quantizer = meta.get("quantizer") if isinstance(meta, Mapping) else None
        if quantizer:
            return ", ".join(map(str, quantizer)) if isinstance(quantizer, list) else str(quantizer)
        if "autoround_version" in self.settings:
            return f"auto-round:{self.settings['autoround_version']}"
        return None

    def shape(self, name: str) -> tuple[int, int]:
        """(o, i), from the shape of qweight."""
        settings = GptqSettings.for_layer(self.settings, name)
        shape = self._shape_of(name, "qweight")
        dtype = self.reader.dtype(f"{name}.qweight")
        if len(shape) != 2 or dtype != torch.int32 or shape[0] * WORD % settings.bits:
            raise CheckpointError(
                f"{self.folder}: {name}.qweight is {dtype} {shape}; {settings.bits} bits are packed in int32, "
                f"(inputs * {settings.bits} / 32, outputs)"
            )
        return shape[1], shape[0] * WORD // settings.bits

    def form(self, name: str) -> Form:
        """The quantised weight, its codes as stored. Zero points are unpacked, to see whether the grid is symmetric."""
        settings = GptqSettings.for_layer(self.settings, name)
        (o, i), bits = self.shape(name), settings.bits
        size = i if settings.group_size == -1 else settings.group_size
        n_groups = -(-i // size)
        facts = f"{i} inputs in groups of {size}, {o} outputs and {bits} bits"
        self._refuse_shape(name, "scales", (n_groups, o), facts)
        self._refuse_shape(name, "qzeros", (n_groups, o * bits // WORD), facts)
        if not settings.in_order or f"{name}.g_idx" in self.reader:
            groups_i = self._tensor(name, "g_idx")
        else:
            groups_i = torch.arange(i) // size
        where = f"{self.folder}: {name}"
        refuse_bad_groups(where, groups_i, i, n_groups)
        groups_i = groups_i.to(torch.int64)
        scales_go = self._tensor(name, "scales")
        refuse_bad_scales(where, scales_go)
        zeros_og = unpack(self._words(name, "qzeros").T.contiguous(), bits, o)
        zeros_og = (zeros_og + settings.zero_offset) & ((1 << bits) - 1)
        qweight = self._tensor(name, "qweight")
        if i % CODES_A_ROW == 0 and exact_in_fp16(scales_go):
            return _as_packed(qweight, scales_go, zeros_og, (bits, size), groups_i)
        codes_oi = unpack(qweight, bits, i).T
        grid = {"bits": bits, "group_size": size}
        return on_grid(codes_oi, scales_go.T, zeros_og, **grid, groups_i=groups_i)


def _as_packed(
    qweight: Tensor, scales_go: Tensor, zeros_og: Tensor, grid: tuple[int, int], groups_i: Tensor
) -> Quantised:
    """The form whose layout of codes is GPTQ's own."""
    bits, size = grid
    tensors = {"qweight": qweight, "scales": scales_go.to(torch.float16)}
    if not bool((zeros_og == 1 << (bits - 1)).all()):
        tensors["qzeros"] = pack(zeros_og, bits).T.contiguous()
    if not torch.equal(groups_i, torch.arange(len(groups_i)) // size):
        tensors["g_idx"] = groups_i.to(torch.int32)
    return Quantised((qweight.shape[1], len(groups_i)), bits, size, tensors)


@dataclass(frozen=True)
class GptqSettings:
    """The settings of a layer that its tensors do not tell."""

    bits: int
    group_size: int
    """-1: a whole row."""
    zero_offset: int
    """The number to add to a stored zero point: 1 in v1, 0 in v2."""
    in_order: bool
    """Whether g_idx may be absent."""

    @classmethod
    def for_layer(cls, config: Mapping[str, Any], name: str) -> GptqSettings:
        """The settings of one layer, after the `dynamic` overrides of a quantization_config. Raises CheckpointError."""
        settings = dict(config)
        overrides = table_in(config, "dynamic")
        for rule in overrides:
            if not rule.startswith("-:") and fits(rule.removeprefix("+:"), name):
                settings |= table_in(overrides, rule)
        kind = str(settings.get("checkpoint_format") or settings.get("format") or "gptq")
        if kind not in ZERO_OFFSETS:
            raise CheckpointError(
                f"{name}: checkpoint_format {kind!r} is not supported; supported: {', '.join(ZERO_OFFSETS)}"
            )
        bits, size = settings.get("bits"), settings.get("group_size", -1)
        if bits not in BITS or not is_whole(bits, 1):
            raise CheckpointError(
                f"{name}: {bits!r} bits are not supported; supported: {', '.join(map(str, BITS))}"
            )
        if not is_whole(size, 1) and size != -1:
            raise CheckpointError(f"{name}: group_size must be -1, or 1 or more; got {size!r}")
        in_order = not settings.get("desc_act", False)
        return cls(int(bits), size, ZERO_OFFSETS[kind], in_order)
