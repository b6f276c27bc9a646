"""What a plan will be in a file: the type of each layer, the bytes of everything, and what the format refuses.

Shapes: o = out_features, i = in_features.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping

from transformers import PretrainedConfig

from compress.exports.codes import dense_bytes, innermost, quantiser_of
from compress.exports.gguf.blocks import BlockType, offset_type, problem_of_groups, symmetric_type
from compress.exports.gguf.names import Names, is_float32
from compress.exports.gguf.rope import rope_tensors
from compress.exports.planned import Planned
from compress.families.base import Compressor
from compress.families.correction import Correction
from compress.families.quantiser import Quantiser
from compress.solvers.grid import Symmetry

FLOAT32_BYTES = 4
_OF_STACK = re.compile(r"(?P<stack>.+\.experts)\.\d+\.(?P<part>\w+)")


def type_for(quantiser: Quantiser) -> BlockType | None:
    """The type that holds the codes of a quantiser; None if none does."""
    if quantiser.symmetry is Symmetry.SYMMETRIC:
        return symmetric_type(quantiser.bits)
    return offset_type(quantiser.bits)


def problem_of_method(compressor: Compressor) -> str:
    """Why no type holds what a method makes; empty if one does."""
    quantiser = quantiser_of(compressor)
    if quantiser is None:
        return f"{innermost(compressor).name} does not quantise"
    if type_for(quantiser) is None:
        return (
            f"{quantiser.bits} bits and {quantiser.symmetry}: blocks with an offset hold 4 bits or 5; take --symmetry "
            "symmetric"
        )
    if not quantiser.in_order:
        return "groups out of order, and a block is 32 neighbouring inputs"
    return ""


def dense_reason(compressor: Compressor, shape: tuple[int, int]) -> str:
    """Why a weight (o, i) is stored in floats; empty if it is stored in blocks."""
    quantiser = quantiser_of(compressor)
    if quantiser is None:
        return ""
    return problem_of_groups(quantiser.group_of(shape[1]), shape[1])


def planned_bytes(plan: Planned, export: str) -> int:
    """Bytes of all tensors that an export of a plan will write, those of its adapter included."""
    assert plan.config is not None  # a plan of a model has one
    names, total = Names(plan.config), plan.rest_bytes(export)
    for layer in plan.layers:
        if dense_reason(layer.compressor, layer.shape):
            total += dense_bytes(plan, layer.shape)
            continue
        quantiser = quantiser_of(layer.compressor)
        kind = None if quantiser is None else type_for(quantiser)
        if kind is None:
            raise ValueError(f"{layer.name}: {problem_of_method(layer.compressor)}")
        total += kind.bytes_of(layer.shape)
        if isinstance(layer.compressor, Correction):
            # Of its own rank: what pads an adapter for servers that know one rank alone, llama.cpp needs not.
            total += layer.compressor.adapter_bytes(layer.shape)
    for tensor in plan.kept_in(export):
        places = names.tensor(tensor.name)
        if is_float32(places[0][0].name, len(tensor.shape)):
            total += FLOAT32_BYTES * math.prod(tensor.shape) - tensor.n_bytes
    extra = sum(tensor.numel() for tensor in rope_tensors(plan.config).values())
    return total + FLOAT32_BYTES * extra


def problem_of_stacks(
    compressors: Mapping[str, Compressor],
    shapes: Mapping[str, tuple[int, int]],
    config: PretrainedConfig,
) -> str:
    """Why experts cannot be stacked in one tensor for all of a layer; empty if they can."""
    types: dict[str, list[str]] = defaultdict(list)
    for name, compressor in compressors.items():
        if (found := _OF_STACK.fullmatch(name)) is not None:
            quantiser = quantiser_of(compressor)
            kind = None if quantiser is None else type_for(quantiser)
            dense = dense_reason(compressor, shapes[name])
            told = "floats" if dense or kind is None else kind.name
            types[f"{found['stack']}.*.{found['part']}"].append(told)
    for name, kinds in types.items():
        n = Names(config).n_experts
        if len(set(kinds)) > 1:
            return f"{name} would be {' and '.join(sorted(set(kinds)))}; one tensor holds all experts, and has one type"
        if len(kinds) != n:
            return f"{len(kinds)} of the {n} experts of {name} are compressed; one tensor of one type holds all"
    return ""
