"""From a dictionary method's options to each layer's atoms: who shares a dictionary, and what its bytes pay for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from compress.budget import layer_budget
from compress.code_storage import CodeBits
from compress.coding import Coded
from compress.compressor import Compressor, LayerShape
from compress.errors import RecipeError
from compress.factors import FactorDtype

if TYPE_CHECKING:
    from compress.methods.cospadi import CoSpaDi

ATOM_MULTIPLE = 4
"""Of atoms: what a 2:4 pattern needs."""
MOST_ATOMS = 8
"""For each entry of a layer's longer side."""


@dataclass(frozen=True)
class AtomPlanner:
    """Dictionaries for layers under one method's options."""

    method: CoSpaDi
    layers: Mapping[str, LayerShape]
    rest_bytes: int
    """What the checkpoint holds besides."""

    def planned(self) -> dict[str, Compressor]:
        """Every layer's method, settled. Raises RecipeError naming the layers whose bytes pay for no atom."""
        method = self.method
        budget = layer_budget(method.keep, method.budget, self.layers, self.rest_bytes)
        share = budget / sum(layer.n_bytes for layer in self.layers.values())
        planned: dict[str, Compressor] = {}
        for group in self.groups():
            names, shapes = list(group), [layer.shape for layer in group.values()]
            settled = self._settled(group)
            n_bytes = share * sum(layer.n_bytes for layer in group.values())
            k = settled.atoms or most_atoms(settled, shapes, n_bytes)
            if k == 0:
                raise RecipeError(
                    f"method.keep: {share:.3g} of the bytes of {', '.join(names)} {shapes[0]} does not pay for "
                    f"{ATOM_MULTIPLE} atoms and their codes; keep more, or --exclude it"
                )
            owner = replace(settled, atoms=k, budget=None)
            planned |= {names[0]: owner} | {name: owner.reader() for name in names[1:]}
        return {name: planned[name] for name in self.layers}

    def groups(self) -> list[dict[str, LayerShape]]:
        """Layers that share a dictionary, and those that have their own."""
        groups: dict[object, dict[str, LayerShape]] = {}
        for name, layer in self.layers.items():
            reads = name
            if self.method.joins_layers and layer.survey is not None:
                reads = layer.survey.reads or name
            groups.setdefault((reads, layer.dtype), {})[name] = layer
        return [part for group in groups.values() for part in self._parts(group)]

    def _parts(self, group: dict[str, LayerShape]) -> list[dict[str, LayerShape]]:
        """Where the inputs are the more numerous their codes are cheaper, and those are not shared."""
        n_outputs, n_inputs = _sides(group)
        if self.method.coded is Coded.AUTO and n_outputs < n_inputs and self.method.codes_inputs:
            return [{name: layer} for name, layer in group.items()]
        return [group]

    def _settled(self, group: Mapping[str, LayerShape]) -> CoSpaDi:
        """With the dtypes and the side of layers that share a dictionary."""
        method, layer = self.method, next(iter(group.values()))
        dtype, bits, coded = method.dictionary_dtype, method.code_bits, method.coded
        if dtype is FactorDtype.AUTO:
            name = str(layer.dtype).removeprefix("torch.")
            if name not in list(FactorDtype):
                raise RecipeError(
                    f"method.dictionary_dtype: auto would store it as the weights are, in {name}; give bfloat16 say"
                )
            dtype = FactorDtype(name)
        if bits is CodeBits.AUTO:
            bits = CodeBits.FULL if dtype is FactorDtype.FLOAT32 else CodeBits.HALF
        if coded is Coded.AUTO:
            n_outputs, n_inputs = _sides(group)
            inputs = n_outputs < n_inputs and method.codes_inputs
            coded = Coded.INPUTS if inputs else Coded.OUTPUTS
        return method.settled(dtype, bits, coded, n_users=len(group))


def _sides(group: Mapping[str, LayerShape]) -> tuple[int, int]:
    """The outputs of all, and the inputs, which are the same."""
    shapes = [layer.shape for layer in group.values()]
    return sum(o for o, _ in shapes), shapes[0][1]


def most_atoms(method: CoSpaDi, shapes: Sequence[tuple[int, int]], n_bytes: float) -> int:
    """The most atoms, a multiple of 4, that so many bytes pay for; 0 if for none."""
    low, high = 0, MOST_ATOMS * max(map(max, shapes)) // ATOM_MULTIPLE
    while low < high:
        middle = (low + high + 1) // 2
        fits = method.bytes_of(shapes, middle * ATOM_MULTIPLE) <= n_bytes
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * ATOM_MULTIPLE
