"""Checkpoints of transformers with bitsandbytes in 4 bits: codes of a table of 16 numbers, NF4 or FP4.

Tensors of a layer: weight, two codes a byte in the order of the rows of (o, i), the first in the high bits, stored as
bytes or as another dtype's (`bnb_4bit_quant_storage`); weight.quant_map (16,), what each code means, -1 to 1, which the
library writes and never reads, so that it has to be its own table;
weight.absmax (B,) fp32, by which each block of `blocksize` weights is multiplied; weight.quant_state.bitsandbytes__nf4
(or __fp4), JSON as bytes: shape, blocksize, dtype. With double quantisation absmax is bytes, codes of
weight.nested_quant_map (256,), times weight.nested_absmax for each block of `nested_blocksize`, plus `nested_offset`.
Dettmers et al. 2023, arXiv:2305.14314, section 3; facts: bitsandbytes' `QuantState` and `dequantize_4bit`.
LLM.int8 checkpoints are refused: activations are quantised too, which no correction on top can see.
Shapes: o = out_features, i = in_features, B = ceil(o i / blocksize).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compress.bases.base import Base, Loading, is_whole, refuse_bad_scales
from compress.errors import CheckpointError
from compress.forms.base import Form
from compress.forms.dense import Dense

CODES: Mapping[str, tuple[float, ...]] = {
    "nf4": (
        *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.09105004, 0.0),
        *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.562617, 0.7229568, 1.0),
    ),
    "fp4": (
        *(0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4),
        *(0.0, -1 / 192, -2 / 3, -1.0, -1 / 3, -1 / 2, -1 / 6, -1 / 4),
    ),
}
"""The values of the 16 codes: quantiles of a normal distribution (NF4, appendix E); sign, exponent, mantissa (FP4)."""
CLOSE = 1e-4
"""The most that a stored table may differ from the library's."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_STATE = "weight.quant_state.bitsandbytes__"
_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")


class BitsandbytesBase(Base, name="bitsandbytes"):
    """Layers as bytes of codes, with a table of what they mean and the size of every block beside them."""

    parts = (
        *("weight.absmax", "weight", "weight.quant_map", *_NESTED),
        *(f"{_STATE}{kind}" for kind in CODES),
    )
    loading = Loading(
        packages=("bitsandbytes", "accelerate"), imports=(), arguments={}, peft=True, vllm=()
    )

    def _find_layers(self) -> tuple[str, ...]:
        if self.settings.get("load_in_8bit") or self.settings.get("_load_in_8bit"):
            raise CheckpointError(
                f"{self.folder}: load_in_8bit (LLM.int8) quantises activations too, and a correction cannot account "
                "for that; "
                f"bitsandbytes in 4 bits ({', '.join(CODES)}) is read"
            )
        return super()._find_layers()

    @property
    def grid(self) -> str:
        """The data type, and whether scales are quantised too: "nf4, double quantised"."""
        kind = self.settings.get("bnb_4bit_quant_type", "4 bits")
        double = self.settings.get("bnb_4bit_use_double_quant")
        return ", ".join([str(kind), *(["double quantised"] if double else [])])

    def shape(self, name: str) -> tuple[int, int]:
        """(o, i), from the layer's quant_state."""
        o, i = self._state(name)["shape"]
        return o, i

    def form(self, name: str) -> Form:
        """The dense weight in the dtype that the layer had before: no form of the toolkit has a table of values."""
        state = self._state(name)
        o, i = state["shape"]
        packed, n_bytes = self._tensor(name, "weight"), -(-o * i // 2)
        if packed.nbytes != n_bytes:
            raise CheckpointError(
                f"{self.folder}: {name}.weight has {packed.nbytes} bytes; ({o}, {i}) in 4 bits take {n_bytes}"
            )
        pairs = packed.flatten().view(torch.uint8)
        codes = torch.stack([pairs >> 4, pairs & 0xF], dim=1).flatten()[: o * i]
        sizes = self._sizes(name, -(-o * i // state["blocksize"]), state)
        table = self._table(name, state["quant_type"])
        weight = table[codes.int()] * _spread(sizes, state["blocksize"], o * i)
        found = weight.reshape(o, i).to(DTYPES[state["dtype"]])
        if not bool(torch.isfinite(found).all()):
            raise CheckpointError(
                f"{self.folder}: {name}.weight reaches beyond {state['dtype']}, which its quant_state names; "
                "the checkpoint is corrupt, download it again"
            )
        return Dense(found)

    def _table(self, name: str, kind: str) -> Tensor:
        """(16,) fp32, as stored. Raises CheckpointError if it is not the library's, which reads no other."""
        self._refuse_shape(name, "weight.quant_map", (len(CODES[kind]),), "4 bits")
        table = self._numbers(name, "weight.quant_map")
        if float((table - torch.tensor(CODES[kind])).abs().max()) > CLOSE:
            raise CheckpointError(
                f"{self.folder}: {name}.weight.quant_map is not the table of {kind}, by which bitsandbytes reads the "
                "codes whatever is stored; the checkpoint is corrupt, download it again"
            )
        return table

    def _sizes(self, name: str, n_blocks: int, state: dict[str, Any]) -> Tensor:
        """(B,) fp32, what each block is multiplied by."""
        self._refuse_shape(name, "weight.absmax", (n_blocks,), f"blocks of {state['blocksize']}")
        if "nested_blocksize" not in state:
            return self._numbers(name, "weight.absmax")
        codes, size = self._tensor(name, "weight.absmax"), state["nested_blocksize"]
        if codes.dtype != torch.uint8:
            raise CheckpointError(
                f"{self.folder}: {name}.weight.absmax is {codes.dtype}; it must be uint8 with double quantisation"
            )
        facts = f"{n_blocks} blocks, quantised themselves in blocks of {size},"
        self._refuse_shape(name, "weight.nested_absmax", (-(-n_blocks // size),), facts)
        self._refuse_shape(name, "weight.nested_quant_map", (256,), "bytes")
        outer, table = (self._numbers(name, part) for part in _NESTED)
        return table[codes.int()] * _spread(outer, size, n_blocks) + float(state["nested_offset"])

    def _numbers(self, name: str, part: str) -> Tensor:
        numbers = self._tensor(name, part)
        refuse_bad_scales(f"{self.folder}: {name}.{part}", numbers)
        return numbers.float()

    def _state(self, name: str) -> dict[str, Any]:
        """The layer's quant_state. Raises CheckpointError if it is missing, or contradicts itself."""
        found = [kind for kind in CODES if f"{name}.{_STATE}{kind}" in self.reader]
        if len(found) != 1:
            raise CheckpointError(
                f"{self.folder}: {name} has {len(found)} of {', '.join(_STATE + kind for kind in CODES)}; a layer has "
                "one; the checkpoint is corrupt, download it again"
            )
        part = f"{_STATE}{found[0]}"
        try:
            state = json.loads(bytes(self._tensor(name, part).tolist()))
        except (ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{self.folder}: {name}.{part} is not valid JSON ({error}); the checkpoint is corrupt, download it "
                "again"
            ) from error
        wrong = _wrong_in(state, found[0])
        if wrong:
            raise CheckpointError(
                f"{self.folder}: {name}.{part} is {state}; right would be: {wrong}; download the checkpoint again"
            )
        return dict(state)


def _wrong_in(state: object, kind: str) -> str:
    """The first thing that a quant_state of this kind should have and lacks; empty if all is well."""
    if not isinstance(state, dict):
        return "it is a table of names and values"
    sizes, nested = state.get("shape"), "nested_blocksize" in state
    offset = state.get("nested_offset")
    fit = {
        f"quant_type is {kind!r}, as the tensor's name says": state.get("quant_type") == kind,
        f"dtype is one of {', '.join(DTYPES)}": str(state.get("dtype")) in DTYPES,
        "shape is two sizes": isinstance(sizes, list)
        and len(sizes) == 2
        and all(is_whole(n, 1) for n in sizes),
        "blocksize is 1 or more": is_whole(state.get("blocksize"), 1),
        "nested_blocksize is 1 or more": not nested or is_whole(state["nested_blocksize"], 1),
        "nested_offset is a finite number": not nested
        or (isinstance(offset, int | float) and math.isfinite(offset)),
    }
    return next((text for text, fits in fit.items() if not fits), "")


def _spread(sizes: Tensor, block: int, n: int) -> Tensor:
    """(ceil(n / block),) -> (n,): each for the numbers of its block."""
    return sizes.repeat_interleave(block)[:n]
