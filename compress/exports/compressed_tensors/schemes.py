"""The `quantization_config` of a compressed-tensors checkpoint: a group for each grid, and what readers leave alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from compress.forms.quantised import Quantised
from compress.models.kinds import expert_of

PACKED = "pack-quantized"
VERSION = "0.18.0"
"""The first version of compressed-tensors whose codes cross words: what tells readers the layout."""
CLASS = "Linear"
"""The target that stands for every linear layer which no other target names."""
KERNEL_GROUPS = (32, 64, 128)
CONV1D = ("gpt2", "openai-gpt")
"""Model types whose layers are Conv1D, which the class does not stand for."""


@dataclass(frozen=True)
class Grid:
    """Settings of a layer's codes."""

    bits: int
    symmetric: bool
    group_size: int | None
    """None: a scale for a whole row."""

    def __str__(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        rows = "whole rows" if self.group_size is None else f"groups of {self.group_size}"
        return f"{self.bits} bits, {rows}, {kind}"

    def weights(self) -> dict[str, Any]:
        """The entry `weights` of a group."""
        return {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "channel" if self.group_size is None else "group",
            "group_size": self.group_size,
            "block_structure": None,
            "dynamic": False,
            "actorder": None,
        }


@dataclass(frozen=True)
class Stored:
    """The grid of a form, and whether its group is the whole row."""

    grid: Grid
    n_inputs: int

    @classmethod
    def of(cls, form: Quantised) -> Stored:
        """That of a form whose groups are in order."""
        return cls(Grid(form.bits, form.symmetric, form.group_size), form.shape[1])

    @property
    def is_whole_row(self) -> bool:
        """Whether one scale serves the row."""
        return (self.grid.group_size or 0) >= self.n_inputs


def settled(layers: Mapping[str, Stored]) -> dict[str, Grid]:
    """The grid by which each layer is described: whole rows by their groups where other layers have the same.

    A whole row is a group of so many inputs too; where all have one length, and kernels know groups of it, it is told
    as such, for some readers take groups alone.
    """
    grouped = {layer.grid for layer in layers.values() if not layer.is_whole_row}
    whole = {layer.n_inputs for layer in layers.values() if layer.is_whole_row}
    alike = not grouped and len(whole) == 1 and whole <= set(KERNEL_GROUPS)
    found = {}
    for name, layer in layers.items():
        as_group = (
            replace(layer.grid, group_size=layer.n_inputs) if layer.is_whole_row else layer.grid
        )
        is_row = layer.is_whole_row and not alike and as_group not in grouped
        found[name] = replace(layer.grid, group_size=None) if is_row else as_group
    return found


def quantisation(
    grids: Mapping[str, Grid], named: Collection[str], ignored: Collection[str]
) -> dict[str, Any]:
    """The configuration for layers by name; `named`: those that the class `Linear` does not cover, as heads.

    The grid that most layers have is that of the class; layers of another are targets by name, which readers look at
    first.
    """
    counts = Counter(grid for name, grid in grids.items() if name not in named)
    ordered = [grid for grid, _ in counts.most_common()]
    ordered += [grid for grid in dict.fromkeys(grids.values()) if grid not in counts]
    groups = {}
    for k, grid in enumerate(ordered):
        first = [CLASS] if k == 0 and counts else []
        apart = [n for n, it in grids.items() if it == grid and (not first or n in named)]
        groups[f"group_{k}"] = {
            "targets": [*first, *_targets(apart, set(grids) - set(apart))],
            "weights": grid.weights(),
            "input_activations": None,
            "output_activations": None,
            "format": PACKED,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": PACKED,
        "quantization_status": "compressed",
        "version": VERSION,
        "kv_cache_scheme": None,
        "config_groups": groups,
        "ignore": list(_targets(ignored, set(grids))),
    }


def _targets(names: Collection[str], others: Collection[str]) -> Iterator[str]:
    """Names as readers match them; the experts of a layer are one expression, unless `others` are among them."""
    patterns = {expert.pattern for name in others if (expert := expert_of(name))}
    told: set[str] = set()
    for name in names:
        expert = expert_of(name)
        if expert is None or expert.pattern in patterns:
            yield name
        elif expert.pattern not in told:
            told.add(expert.pattern)
            yield f"re:.*{re.escape(expert.module)}\\.\\d+\\.{re.escape(expert.layer)}$"
