"""compressed-tensors checkpoints (llm-compressor): integers, 8-bit and 4-bit floating point, and dense ones.

A layer has the format of its group of settings: pack-quantized (see `packed`); float-quantized, of old
naive-quantized: weight (o, i) E4M3, times weight_scale for a tensor (1,), for each row (o, 1), or for blocks;
nvfp4-pack-quantized: weight_packed (o, i / 2) uint8, times weight_scale (o, i / 16) E4M3, over weight_global_scale;
mxfp4-pack-quantized: the same with weight_scale (o, i / 32) E8M0 alone; dense, with or without a sparsity.
Facts: compressed-tensors' compressors, `QuantizationStrategy` and `dequantize`.
Shapes: o = out_features, i = in_features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from compress.bases.base import Loading, fits, is_whole, names_in, table_in
from compress.bases.floats import Block
from compress.bases.packed import PackedWords
from compress.bases.pairs import MXFP4_GROUP, NVFP4_GROUP, Fp4Pairs
from compress.bases.scaled import ScaledWeights
from compress.errors import CheckpointError
from compress.forms.base import Form
from compress.forms.dense import Dense

DENSE, MIXED = "dense", "mixed-precision"


@dataclass(frozen=True)
class Kind:
    """Settings of weights that go with a format."""

    type: str
    bits: tuple[int, ...]
    strategies: tuple[str, ...]
    group_size: int | None = None
    """The only one there is."""

    def __str__(self) -> str:
        bits = f"{self.bits[0]}" if len(self.bits) == 1 else f"{self.bits[0]} to {self.bits[-1]}"
        groups = "" if self.group_size is None else f", groups of {self.group_size}"
        return f"{self.type} of {bits} bits by {' or '.join(self.strategies)}{groups}"


_FLOAT8 = Kind("float", (8,), ("tensor", "channel", "block"))
PACKED, NVFP4, MXFP4 = "pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"
KINDS: Mapping[str, Kind] = {
    PACKED: Kind("int", tuple(range(2, 9)), ("group", "channel")),
    "float-quantized": _FLOAT8,
    "naive-quantized": _FLOAT8,
    NVFP4: Kind("float", (4,), ("tensor_group",), NVFP4_GROUP),
    MXFP4: Kind("float", (4,), ("group",), MXFP4_GROUP),
}
"""What the weights of a format are."""
_SUPPORTED = f"supported formats of compressed-tensors: {', '.join(KINDS)}, {DENSE}"


class CompressedTensorsBase(PackedWords, ScaledWeights, Fp4Pairs, name="compressed-tensors"):
    """Layers as codes with scales beside them, each in the format of its group of settings."""

    published = True
    parts = (
        *("weight_scale", "weight_packed", "weight", "weight_shape", "weight_zero_point"),
        *("weight_g_idx", "weight_global_scale"),
        *("input_scale", "input_zero_point", "input_global_scale", "input_g_idx"),
    )
    idle_parts = ("k_scale", "v_scale", "q_scale", "output_scale", "k_zero_point", "v_zero_point")
    loading = Loading(
        packages=("compressed-tensors",), imports=(), arguments={}, peft=True, vllm=()
    )

    def _find_layers(self) -> tuple[str, ...]:
        self._refuse_other_formats()
        ends = (".weight_scale", ".weight_packed")
        dense = not any(key.endswith(ends) for key in self.reader)
        if dense and not self.settings.get("config_groups"):
            return ()
        layers = super()._find_layers()
        self._refuse_bare({part for name in layers for part in self.tensors_of(name)})
        self._refuse_ignored(layers)
        return layers

    def _refuse_other_formats(self) -> None:
        formats = [self.settings.get("format")]
        formats += [group.get("format") for group in self._groups()]
        odd = [name for name in formats if name not in (None, *KINDS, DENSE, MIXED)]
        sparsity = table_in(self.settings, "sparsity_config")
        if sparsity.get("format") not in (None, DENSE):
            odd.append(f"sparse {sparsity['format']}")
        if self.settings.get("transform_config"):
            odd.append("with transforms of the hidden states")
        if odd:
            raise CheckpointError(
                f"{self.folder}: format {odd[0]!r} is not supported; {_SUPPORTED}"
            )
        for group in self._groups():
            for what in ("input_activations", "output_activations"):
                if group.get(what) and table_in(group, what).get("type", "int") != "float":
                    raise CheckpointError(
                        f"{self.folder}: {what} are quantised too, and a correction cannot account for that; only "
                        "checkpoints whose weights alone are quantised, or whose activations are floating point of "
                        "few bits, are read"
                    )

    def _refuse_ignored(self, layers: tuple[str, ...]) -> None:
        """Raises CheckpointError for a layer that is stored in few bits, and that readers of the config leave alone."""
        for target in names_in(self.settings, "ignore"):
            odd = [name for name in layers if target != "Linear" and _is_target(target, name)]
            if odd:
                raise CheckpointError(
                    f"{self.folder}: {odd[0]} is quantised, but ignore in its config has {target!r}, so that readers "
                    "take it for ordinary weights; download the checkpoint again"
                )

    def _groups(self) -> Iterator[Mapping[str, Any]]:
        groups = table_in(self.settings, "config_groups")
        for name in groups:
            yield table_in(groups, name)

    @property
    def grid(self) -> str:
        """Bits and group size of each kind of layer, and sparsity: "4 bits, groups of 64"."""
        kinds = {
            self._told(group, weights)
            for group in self._groups()
            if (weights := table_in(group, "weights"))
        }
        sparsity = table_in(self.settings, "sparsity_config").get("sparsity_structure")
        return ", ".join([*sorted(kinds), *([f"sparse {sparsity}"] if sparsity else [])])

    def _told(self, group: Mapping[str, Any], weights: Mapping[str, Any]) -> str:
        name, size = self._format_of(group), weights.get("group_size")
        if name in (NVFP4, MXFP4):
            return f"{name.upper().partition('-')[0]}, groups of {size}"
        rows = f"groups of {size}" if size else "whole rows"
        if weights.get("type", "int") == "int":
            return f"{weights.get('num_bits')} bits, {rows}"
        sizes = weights.get("block_structure")
        blocks = f"blocks of {' x '.join(map(str, sizes))}" if isinstance(sizes, list) else "blocks"
        by = {"tensor": "one scale a tensor", "block": blocks}
        return f"FP{weights.get('num_bits')}, {by.get(str(weights.get('strategy')), rows)}"

    @property
    def remarks(self) -> tuple[str, ...]:
        """That engines round activations, or the cache of keys and values."""
        inputs = {
            it.get("num_bits")
            for group in self._groups()
            if (it := table_in(group, "input_activations"))
        }
        found = [f"engines round activations to {bits}-bit floating point too" for bits in inputs]
        if self.settings.get("kv_cache_scheme"):
            found.append("engines round the cache of keys and values too (kv_cache_scheme)")
        return tuple(found)

    @property
    def producer(self) -> str | None:
        """The library's version, if it is said."""
        version = self.settings.get("version")
        return f"compressed-tensors:{version}" if version else None

    def shape(self, name: str) -> tuple[int, int]:
        """(o, i), with which all of the layer's tensors must agree."""
        told, weights = self._settings_of(name)
        if told == PACKED:
            return self._packed_shape(name, weights)
        if told == NVFP4:
            return self._nvfp4_shape(name, "weight_packed", "weight_global_scale")
        if told == MXFP4:
            return self._pairs_shape(name, "weight_packed", MXFP4_GROUP, torch.uint8)
        self._shape_of(name, "weight")
        o, i = self._float8_shape(*_float8(name), self._block(name, weights))
        return o, i

    def form(self, name: str) -> Form:
        """The quantised weight where its codes are integers, else the dense one in fp32."""
        told, weights = self._settings_of(name)
        self.shape(name)
        if told == PACKED:
            return self._packed_form(name, weights)
        if told == NVFP4:
            scales = self._nvfp4_scales(name) / self._global_scale(name, "weight_global_scale")
            return Dense(self._unpaired(name, "weight_packed", scales))
        if told == MXFP4:
            return Dense(self._unpaired(name, "weight_packed", self._mxfp4_scales(name)))
        return Dense(self._scaled(*_float8(name), self._block(name, weights)))

    def _block(self, name: str, weights: Mapping[str, Any]) -> Block:
        """Rows and columns that share a scale."""
        o, i, *_ = (*self._shape_of(name, "weight"), 1, 1)
        strategy, sizes = weights.get("strategy"), weights.get("block_structure")
        if strategy != "block":
            return (o if strategy == "tensor" else 1), i
        if isinstance(sizes, list) and len(sizes) == 2 and all(is_whole(n, 1) for n in sizes):
            return sizes[0], sizes[1]
        raise CheckpointError(
            f"{self.folder}: {name} has block_structure {sizes!r}; it must be two whole numbers"
        )

    def _format_of(self, group: Mapping[str, Any]) -> str:
        return str(group.get("format") or self.settings.get("format") or PACKED)

    def _settings_of(self, name: str) -> tuple[str, Mapping[str, Any]]:
        """The format, and the `weights` settings, of the group whose targets name the layer."""
        group = self._group_of(name)
        weights, told = table_in(group, "weights"), self._format_of(group)
        kind = KINDS.get(told, KINDS[PACKED])
        if (
            weights.get("type", "int") != kind.type
            or weights.get("num_bits") not in kind.bits
            or weights.get("strategy") not in kind.strategies
            or (kind.group_size is not None and weights.get("group_size") != kind.group_size)
        ):
            raise CheckpointError(
                f"{self.folder}: {name} is quantised by {weights.get('strategy')!r} to {weights.get('num_bits')} bits "
                f"of {weights.get('type', 'int')!r} in groups of {weights.get('group_size')}; in the format {told}, "
                f"supported: {kind}"
            )
        return told, weights

    def _group_of(self, name: str) -> Mapping[str, Any]:
        of_class = None
        for group in self._groups():
            targets = group.get("targets") or []
            if not isinstance(targets, list):
                raise CheckpointError(
                    f"{self.folder}: targets of a group are {targets!r}; they are a list"
                )
            if any(_is_target(str(target), name) for target in targets if target != "Linear"):
                return group
            if of_class is None and "Linear" in targets:
                of_class = group
        if of_class is not None:  # a name goes before the class, whichever stands first
            return of_class
        raise CheckpointError(
            f"{self.folder}: no config_groups entry has {name}, which is packed, among its targets"
        )


def _float8(name: str) -> tuple[str, str]:
    """The names of a layer's numbers and of their scales."""
    return f"{name}.weight", f"{name}.weight_scale"


def _is_target(target: str, name: str) -> bool:
    """A target is a class of modules, a name or the end of one, or `re:` and a regular expression."""
    if target.startswith("re:"):
        return fits(target.removeprefix("re:"), name)
    return target == "Linear" or name == target or name.endswith(f".{target}")
