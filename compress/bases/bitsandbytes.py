"""Checkpoints of transformers with bitsandbytes in 4 bits: codes of a table of 16 numbers, NF4 or FP4.

Tensors of a layer: weight, two codes a byte in the order of the rows of (o, i), the first in the high bits, stored as
bytes or as another dtype's (`bnb_4bit_quant_storage`); weight.quant_map (16,), what each code means, -1 to 1;
weight.absmax (B,) fp32, by which each block of `blocksize` weights is multiplied; weight.quant_state.bitsandbytes__nf4
(or __fp4), JSON as bytes: shape, blocksize, dtype. With double quantisation absmax is bytes, codes of
weight.nested_quant_map (256,), times weight.nested_absmax for each block of `nested_blocksize`, plus `nested_offset`.
Dettmers et al. 2023, arXiv:2305.14314, section 3; facts: bitsandbytes' `QuantState` and `dequantize_4bit`.
LLM.int8 checkpoints are refused: activations are quantised too, which no path on top can see.
Shapes: o = out_features, i = in_features, B = ceil(o i / blocksize).
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from compress.bases.base import Base, refuse_bad_scales
from compress.errors import CheckpointError
from compress.forms import Dense, Form

KINDS = ("nf4", "fp4")
CODES = 16
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_STATE = "weight.quant_state.bitsandbytes__"
_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")


class BitsandbytesBase(Base):
    """Layers as bytes of codes, with a table of what they mean and the size of every block beside them."""

    format = "bitsandbytes"
    parts = (
        *("weight.absmax", "weight", "weight.quant_map", *_NESTED),
        *(f"{_STATE}{kind}" for kind in KINDS),
    )

    def _find_layers(self) -> tuple[str, ...]:
        if self.settings.get("load_in_8bit") or self.settings.get("_load_in_8bit"):
            raise CheckpointError(
                f"{self.folder}: load_in_8bit (LLM.int8) quantises activations too, which no path on top can see; "
                f"bitsandbytes in 4 bits ({', '.join(KINDS)}) is read"
            )
        return super()._find_layers()

    @property
    def description(self) -> str:
        """As in "bitsandbytes, nf4, double quantised"."""
        kind = self.settings.get("bnb_4bit_quant_type", "4 bits")
        double = self.settings.get("bnb_4bit_use_double_quant")
        return ", ".join([self.format, str(kind), *(["double quantised"] if double else [])])

    def shape(self, name: str) -> tuple[int, int]:
        """As the layer's quant_state says, which its codes have to agree with."""
        o, i = self._state(name)["shape"]
        n_bytes = self.reader.nbytes(f"{name}.weight") if f"{name}.weight" in self.reader else 0
        if n_bytes != -(-o * i // 2):
            raise CheckpointError(
                f"{self.folder}: {name}.weight has {n_bytes} bytes; ({o}, {i}) in 4 bits makes {-(-o * i // 2)}"
            )
        return o, i

    def form(self, name: str) -> Form:
        """Its weight in the dtype that the layer had before; no form of ours has tables of its own."""
        (o, i), state = self.shape(name), self._state(name)
        packed = self._tensor(name, "weight").flatten().view(torch.uint8)
        codes = torch.stack([packed >> 4, packed & 0xF], dim=1).flatten()[: o * i]
        self._refuse_shape(name, "weight.quant_map", (CODES,), "4 bits")
        table = self._numbers(name, "weight.quant_map")
        sizes = self._sizes(name, -(-o * i // state["blocksize"]), state)
        weight = table[codes.int()] * _spread(sizes, state["blocksize"], o * i)
        return Dense(weight.reshape(o, i).to(DTYPES[state["dtype"]]))

    def _sizes(self, name: str, n_blocks: int, state: dict[str, Any]) -> Tensor:
        """(B,) fp32, what each block is multiplied by."""
        self._refuse_shape(name, "weight.absmax", (n_blocks,), f"blocks of {state['blocksize']}")
        if "nested_blocksize" not in state:
            return self._numbers(name, "weight.absmax")
        codes, size = self._tensor(name, "weight.absmax"), state["nested_blocksize"]
        if codes.dtype != torch.uint8:
            raise CheckpointError(
                f"{self.folder}: {name}.weight.absmax is {codes.dtype}; double quantisation makes it bytes"
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
        """What the layer says of itself. Raises CheckpointError for what cannot be."""
        found = [kind for kind in KINDS if f"{name}.{_STATE}{kind}" in self.reader]
        if not found:
            self._tensor(name, f"{_STATE}{KINDS[0]}")
        part = f"{_STATE}{found[0]}"
        try:
            state = json.loads(bytes(self._tensor(name, part).tolist()))
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                f"{self.folder}: {name}.{part} is no JSON ({error}); the checkpoint is corrupt, get it again"
            ) from error
        if not _is_state(state):
            raise CheckpointError(
                f"{self.folder}: {name}'s quant_state is {state}; it has a shape of two, a blocksize, a dtype of "
                f"{', '.join(DTYPES)}, and a nested_offset if it has a nested_blocksize"
            )
        return dict(state)


def _is_state(state: object) -> bool:
    if not isinstance(state, dict) or state.get("dtype") not in DTYPES:
        return False
    shape, nested = state.get("shape"), state.get("nested_blocksize", 1)
    sizes = [*shape, state.get("blocksize"), nested] if isinstance(shape, list) else []
    whole = len(sizes) == 4 and all(type(n) is int and n >= 1 for n in sizes)
    return whole and ("nested_blocksize" not in state or type(state.get("nested_offset")) is float)


def _spread(sizes: Tensor, block: int, n: int) -> Tensor:
    """(ceil(n / block),) -> (n,): each for the numbers of its block."""
    return sizes.repeat_interleave(block)[:n]
