"""Names, orders and stacks of tensors: what a tensor of the source is called in a file, and how its rows lie there.

Shapes: o = outputs, h = heads, e = experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PretrainedConfig

from compress.errors import CheckpointError
from compress.exports.gguf.families import FAMILIES, Family, size_of

LONGEST = 63
"""Bytes of the longest name; ggml keeps 64, one of them a zero."""
_EXPERT = re.compile(
    r"(?P<stack>.+\.experts)\.(?P<number>\d+)\.(?P<part>\w+)(?P<leaf>\.weight|\.bias)?"
)
_STACK = re.compile(
    r"(?P<stack>.+\.experts)\.(?P<part>gate_up_proj|gate_proj|up_proj|down_proj)(\.weight)?"
)
_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_IN_FLOAT32 = ("ffn_gate_inp", "ffn_gate_inp_shexp")
"""Matrices that llama.cpp reads in fp32 alone: routers."""


@dataclass(frozen=True)
class Place:
    """Where a layer or tensor of the source goes."""

    name: str
    """The tensor's name in the file."""
    expert: int | None = None
    """Its number in a stack of experts; None for what is a tensor of its own."""


class Names:
    """The names in a file of a model of a configuration."""

    def __init__(self, config: PretrainedConfig) -> None:
        from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

        self.config, self.family = config, _family(config)
        architecture = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
        kind: MODEL_ARCH = architecture[self.family.architecture]
        self._map = get_tensor_name_map(kind, config.num_hidden_layers)

    def weight(self, layer: str) -> Place:
        """The place of a layer's weight. Raises CheckpointError for a layer that the architecture has not."""
        found = _EXPERT.fullmatch(layer)
        if found is None:
            return Place(self._name(f"{layer}.weight"))
        part = _PARTS.get(found["part"], found["part"])
        return Place(self._name(f"{found['stack']}.{part}.weight"), int(found["number"]))

    def tensor(self, name: str) -> list[tuple[Place, Callable[[Tensor], Tensor]]]:
        """The places of a tensor of the source, each with what takes its part of it.

        Raises CheckpointError for a tensor that the architecture has not.
        """
        layer, _, leaf = name.rpartition(".")
        if (found := _STACK.fullmatch(name)) is not None:
            return self._stack(found["stack"], found["part"])
        if leaf == "weight":
            place = self.weight(layer)
            change = self._shifted if self._is_norm(layer) else _unchanged
            return [(place, change)]
        return [(Place(self._name(name)), _unchanged)]

    def rows(self, name: str) -> Tensor | None:
        """The order (o,) in which a file has the rows of a weight or bias; None for the source's own."""
        if not self.family.permuted:
            return None
        heads = {
            "q_proj": self.config.num_attention_heads,
            "k_proj": self.config.num_key_value_heads,
        }
        parts = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")
        if parts[2] not in heads:
            return None
        h, size = heads[parts[2]], size_of(self.config, "head_dim")
        return torch.arange(h * size).reshape(h, 2, size // 2).transpose(1, 2).reshape(-1)

    @cached_property
    def n_experts(self) -> int:
        """The number of experts of a layer."""
        attribute = next(name for name, key in self.family.sizes.items() if key == "expert_count")
        return int(getattr(self.config, attribute))

    def _stack(self, stack: str, part: str) -> list[tuple[Place, Callable[[Tensor], Tensor]]]:
        if part != "gate_up_proj":
            return [(Place(self._name(f"{stack}.{part}.weight")), _unchanged)]
        return [
            (Place(self._name(f"{stack}.gate_proj.weight")), lambda whole: whole.chunk(2, 1)[0]),
            (Place(self._name(f"{stack}.up_proj.weight")), lambda whole: whole.chunk(2, 1)[1]),
        ]

    def _name(self, name: str) -> str:
        found = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise CheckpointError(
                f"gguf export: {name} has no name in the architecture {self.family.architecture}; choose another export"
            )
        if len(found.encode()) > LONGEST:
            raise CheckpointError(f"gguf export: {found} is longer than {LONGEST} bytes")
        return str(found)

    def _is_norm(self, layer: str) -> bool:
        return self.family.shifted_norms and layer.endswith("norm")

    @staticmethod
    def _shifted(weight: Tensor) -> Tensor:
        return weight.float() + 1


def is_float32(name: str, n_dimensions: int) -> bool:
    """Whether llama.cpp reads a tensor of a file in fp32 alone."""
    return n_dimensions < 2 or any(f".{part}." in name for part in _IN_FLOAT32)


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _family(config: PretrainedConfig) -> Family:
    return FAMILIES[config.model_type]
