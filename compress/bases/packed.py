"""compressed-tensors checkpoints (llm-compressor): pack-quantized, and dense ones that are described as sparse.

Tensors of a layer: weight_packed (o, ceil(i / k)) int32, k = 32 // bits codes a word along the inputs, the first in the
lowest bits, each with 2**(bits - 1) added; weight_scale (o, G); weight_shape (2,): o and i; weight_zero_point
(ceil(o / k), G) int32, packed along the outputs likewise, absent from symmetric grids; weight_g_idx (i,), where
activation order has mixed the groups.
Facts: compressed-tensors' `pack_quantized` compressor; a zero point and its code are both shifted, so that the stored
numbers can be subtracted as they are.
Shapes: o = out_features, i = in_features, G = number of groups of inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from compress.bases.base import (
    Base,
    Loading,
    fits,
    is_whole,
    on_grid,
    refuse_bad_groups,
    refuse_bad_scales,
    table_in,
)
from compress.errors import CheckpointError
from compress.forms.base import Form

PACKED, DENSE = "pack-quantized", "dense"
STRATEGIES = ("group", "channel")
_WORD = 32
_SUPPORTED = "supported formats of compressed-tensors: pack-quantized, dense"


class PackedBase(Base, name="compressed-tensors"):
    """Layers as words of codes, with their shape beside them."""

    parts = (
        *("weight_packed", "weight_scale", "weight_shape"),
        *("weight_zero_point", "weight_g_idx"),
    )
    loading = Loading(
        packages=("compressed-tensors",), imports=(), arguments={}, peft=True, vllm=()
    )

    def _find_layers(self) -> tuple[str, ...]:
        self._refuse_other_formats()
        dense = not any(key.endswith(".weight_packed") for key in self.reader)
        if dense and not self.settings.get("config_groups"):
            return ()
        return super()._find_layers()

    def _refuse_other_formats(self) -> None:
        formats = [self.settings.get("format")]
        formats += [group.get("format") for group in self._groups()]
        odd = [name for name in formats if name not in (None, PACKED, DENSE)]
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
                if group.get(what):
                    raise CheckpointError(
                        f"{self.folder}: {what} are quantised too, and a correction cannot account for that; only "
                        "checkpoints "
                        "whose weights alone are quantised are read"
                    )

    def _groups(self) -> Iterator[Mapping[str, Any]]:
        groups = table_in(self.settings, "config_groups")
        for name in groups:
            yield table_in(groups, name)

    @property
    def grid(self) -> str:
        """Bits and group size of each kind of layer, and sparsity: "4 bits, groups of 64"."""
        kinds = {self._kind(it) for group in self._groups() if (it := table_in(group, "weights"))}
        sparsity = table_in(self.settings, "sparsity_config").get("sparsity_structure")
        return ", ".join([*sorted(kinds), *([f"sparse {sparsity}"] if sparsity else [])])

    @staticmethod
    def _kind(weights: Mapping[str, Any]) -> str:
        size = weights.get("group_size")
        return f"{weights.get('num_bits')} bits, {f'groups of {size}' if size else 'whole rows'}"

    @property
    def producer(self) -> str | None:
        """The library's version, if it is said."""
        version = self.settings.get("version")
        return f"compressed-tensors:{version}" if version else None

    def shape(self, name: str) -> tuple[int, int]:
        """(o, i), from weight_shape, with which the packed words must agree."""
        stored = self._tensor(name, "weight_shape")
        if stored.shape != (2,) or stored.dtype.is_floating_point or int(stored.min()) < 1:
            raise CheckpointError(
                f"{self.folder}: {name}.weight_shape is {stored.tolist()}; it is [outputs, inputs]"
            )
        (o, i), bits = (int(n) for n in stored), self._bits(name)
        columns = -(-i // (_WORD // bits))
        self._refuse_shape(name, "weight_packed", (o, columns), f"({o}, {i}) and {bits} bits")
        return o, i

    def form(self, name: str) -> Form:
        """The quantised weight, its codes packed in the toolkit's order."""
        (o, i), weights, bits = self.shape(name), self._weights(name), self._bits(name)
        size = weights.get("group_size")
        if weights.get("strategy") == "channel" or size in (None, 0, -1):
            size = i
        if not is_whole(size, 1):
            raise CheckpointError(
                f"{self.folder}: {name} has group_size {size!r}; it must be at least 1, or -1 for whole rows"
            )
        n_groups = -(-i // size)
        facts = f"{o} outputs and {i} inputs in groups of {size}"
        self._refuse_shape(name, "weight_scale", (o, n_groups), facts)
        scales_og = self._tensor(name, "weight_scale")
        refuse_bad_scales(f"{self.folder}: {name}", scales_og)
        groups_i = self._groups_of_inputs(name, i, size)
        refuse_bad_groups(f"{self.folder}: {name}", groups_i, i, n_groups)
        groups_i = groups_i.to(torch.int64)
        return on_grid(
            fields(self._words(name, "weight_packed"), bits)[:, :i],
            scales_og,
            self._zeros(name, (o, n_groups), bits),
            bits=bits,
            group_size=size,
            groups_i=groups_i,
        )

    def _zeros(self, name: str, shape: tuple[int, int], bits: int) -> Tensor:
        (o, n_groups), part = shape, "weight_zero_point"
        if f"{name}.{part}" not in self.reader:
            if not self._weights(name).get("symmetric", True):
                self._tensor(name, part)
            return torch.full(shape, 1 << (bits - 1), dtype=torch.int32)
        if (
            self.reader.dtype(f"{name}.{part}") != torch.int32
        ):  # of a symmetric grid: nought, unpacked
            zeros = self._tensor(name, part)
            self._refuse_shape(name, part, shape, "its scales")
            if zeros.dtype.is_floating_point:
                raise CheckpointError(
                    f"{self.folder}: {name}.{part} is stored as {zeros.dtype}; zero points are integers"
                )
            return zeros.to(torch.int32) + (1 << (bits - 1))
        rows = -(-o // (_WORD // bits))
        self._refuse_shape(name, part, (rows, n_groups), f"{o} outputs and {bits} bits")
        return fields(self._words(name, part).T, bits).T[:o]

    def _groups_of_inputs(self, name: str, n_inputs: int, size: int) -> Tensor:
        in_order = torch.arange(n_inputs) // size
        if f"{name}.weight_g_idx" not in self.reader:
            return in_order
        found = self._tensor(name, "weight_g_idx")
        return in_order if bool((found == -1).all()) else found  # -1: never set

    def _bits(self, name: str) -> int:
        bits = self._weights(name).get("num_bits")
        if not isinstance(bits, int) or bits not in range(2, 9):
            raise CheckpointError(f"{self.folder}: {name} has {bits!r} bits; 2 to 8 are supported")
        return bits

    def _targets(self, group: Mapping[str, Any]) -> list[Any]:
        found = group.get("targets") or []
        if not isinstance(found, list):
            raise CheckpointError(
                f"{self.folder}: targets of a group are {found!r}; they are a list"
            )
        return found

    def _weights(self, name: str) -> Mapping[str, Any]:
        """The `weights` settings of the group whose targets name the layer."""
        for group in self._groups():
            if any(_is_target(str(target), name) for target in self._targets(group)):
                weights = table_in(group, "weights")
                if weights.get("strategy") in STRATEGIES and weights.get("type", "int") == "int":
                    return weights
                raise CheckpointError(
                    f"{self.folder}: {name} is quantised by {weights.get('strategy')!r} to "
                    f"{weights.get('type')!r}; supported: int by {' or '.join(STRATEGIES)}"
                )
        raise CheckpointError(
            f"{self.folder}: no config_groups entry has {name}, which is packed, among its targets"
        )


def _is_target(target: str, name: str) -> bool:
    """A target is a class of modules, a name or the end of one, or `re:` and a regular expression."""
    if target.startswith("re:"):
        return fits(target.removeprefix("re:"), name)
    return target == "Linear" or name == target or name.endswith(f".{target}")


def fields(words_nm: Tensor, bits: int) -> Tensor:
    """The 32 // bits codes of every word, the lowest first: (n, m) int32 -> (n, m * (32 // bits)) int32."""
    shifts = torch.arange(0, _WORD - bits + 1, bits, dtype=torch.int32)
    codes = (words_nm[:, :, None] >> shifts) & ((1 << bits) - 1)
    return codes.reshape(words_nm.shape[0], -1)
