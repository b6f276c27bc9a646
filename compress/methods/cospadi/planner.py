"""The plan of a dictionary method: which layers share a dictionary, and how many atoms its bytes pay for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from calibration.experts.module import DOWN
from compress.errors import RecipeError
from compress.families.base import Compressor, LayerShape
from compress.families.budget import layer_budget
from compress.families.importance import cost_of_error
from compress.families.low_rank import settled_dtype
from compress.methods.cospadi.curves import ATOM_MULTIPLE, lost_at, side_of
from compress.methods.cospadi.options import AtomAllocation, CoSpaDiOptions, Share
from compress.models.kinds import ExpertLayer, expert_of
from compress.models.names import block_and_place
from compress.solvers.knapsack import BudgetError, Choice, knapsack
from compress.solvers.sparse_coding import Coded

MOST_ATOMS = 8
"""The most atoms for each entry of a layer's longer side."""


FLOOR = 0.5
"""Share of the even plan's atoms below which a plan by errors lets no layer fall: sums of errors are only a proxy."""


@dataclass(frozen=True)
class Atoms(Choice):
    """A dictionary's size, or None for layers that stay dense."""

    atoms: int | None


@dataclass(frozen=True)
class AtomPlanner:
    """A planner of dictionaries under one method's options."""

    method: CoSpaDiOptions
    layers: Mapping[str, LayerShape]
    rest_bytes: int
    """The size of everything else in the checkpoint."""

    def planned(self) -> dict[str, Compressor]:
        """Every layer's method, settled; layers that stay dense are left out.

        Raises RecipeError naming the layers whose bytes pay for no atom, and for experts where there are none.
        """
        self._refuse_no_experts()
        groups = [(group, self._settled(group)) for group in self.groups()]
        known = all(layer.survey is not None for layer in self.layers.values())
        if (
            self.method.resolved_allocation is AtomAllocation.ERRORS
            and known
            and self.method.atoms is None
        ):
            sizes = self._by_errors(groups)
        else:
            sizes = [self._evenly(group, settled) for group, settled in groups]
        planned: dict[str, Compressor] = {}
        for (group, settled), k in zip(groups, sizes, strict=True):
            if k is None:
                continue
            first, *others = group
            owner = settled.with_atoms(k)
            planned |= {first: owner} | {name: owner.reader() for name in others}
        if not planned:
            raise RecipeError("the plan leaves every layer dense; keep less", option="keep")
        return {name: planned[name] for name in self.layers if name in planned}

    def owners(self) -> dict[str, str]:
        """For each layer that reads another's dictionary, the layer that stores it."""
        return {name: owner for owner, *others in self.groups() for name in others}

    def _refuse_no_experts(self) -> None:
        if self.method.share is Share.EXPERTS and not any(map(expert_of, self.layers)):
            raise RecipeError(
                "none of the chosen layers is one of a mixture's experts; use --share inputs",
                option="share",
            )

    def _budget(self) -> int:
        method = self.method
        return layer_budget(method.resolved_keep, method.budget, self.layers, self.rest_bytes)

    def _evenly(self, group: Mapping[str, LayerShape], settled: CoSpaDiOptions) -> int:
        """The atoms that the same share of every group's bytes pays for."""
        share = self._budget() / sum(layer.n_bytes for layer in self.layers.values())
        shapes = [layer.shape for layer in group.values()]
        n_bytes = share * sum(layer.n_bytes for layer in group.values())
        k = settled.atoms or most_atoms(settled, shapes, n_bytes)
        _refuse_few_lines(settled, group, k)
        if k == 0:
            raise RecipeError(
                f"{share:.3g} of the bytes of {', '.join(group)} {shapes[0]} does not pay for "
                f"{ATOM_MULTIPLE} atoms and their codes; keep more, or --exclude it",
                option="keep",
            )
        return k

    def _by_errors(
        self, groups: Sequence[tuple[Mapping[str, LayerShape], CoSpaDiOptions]]
    ) -> list[int | None]:
        """The atoms of each group, or None for dense, that lose least for the bytes, exactly (`knapsack`)."""
        choices = [self._choices(group, settled) for group, settled in groups]
        try:
            chosen = knapsack(choices, self._budget())
        except BudgetError as error:
            raise RecipeError(f"{error}; keep more, or --exclude layers", option="keep") from error
        return [options[index].atoms for options, index in zip(choices, chosen, strict=True)]

    def _choices(self, group: Mapping[str, LayerShape], settled: CoSpaDiOptions) -> list[Atoms]:
        """Dictionaries that save bytes, each with its loss, then the dense layers."""
        shapes = [layer.shape for layer in group.values()]
        dense = sum(layer.n_bytes for layer in group.values())
        surveys = [layer.survey for layer in group.values() if layer.survey is not None]
        costs = [cost_of_error(self.method.resolved_importance, survey) for survey in surveys]
        found = []
        for k in range(ATOM_MULTIPLE, most_atoms(settled, shapes, dense) + 1, ATOM_MULTIPLE):
            n_bytes = settled.bytes_of(shapes, k)
            lost = sum(w * lost_at(each, k) for w, each in zip(costs, surveys, strict=True))
            if n_bytes < dense:
                found.append(Atoms(n_bytes, lost, k))
        least = FLOOR * self._evenly(group, settled)
        return [*(each for each in found if (each.atoms or 0) >= least), Atoms(dense, 0.0, None)]

    def groups(self) -> list[dict[str, LayerShape]]:
        """Layers that share a dictionary, and those that have their own."""
        groups: dict[object, dict[str, LayerShape]] = {}
        for name, layer in self.layers.items():
            groups.setdefault((_shared_by(self.method, name, layer), layer.dtype), {})[name] = layer
        return [part for group in groups.values() for part in self._parts(group)]

    def _parts(self, group: dict[str, LayerShape]) -> list[dict[str, LayerShape]]:
        """The parts of a group that can share: with a code for each input, layers of one place and shape only."""
        if self._side(group) is not Coded.INPUTS:
            return [group]
        parts: dict[object, dict[str, LayerShape]] = {}
        for name, layer in group.items():
            parts.setdefault((_place(self.method, name), layer.shape), {})[name] = layer
        return list(parts.values())

    def _side(self, group: Mapping[str, LayerShape]) -> Coded:
        """The side that has codes: of experts that share, the neurons inside, which are each expert's own.

        The dictionary is then in the space that all experts read and write.
        """
        method, expert = self.method, _expert(self.method, next(iter(group)))
        if expert and method.coded is Coded.AUTO and method.codes_inputs:
            return Coded.INPUTS if expert.layer == DOWN else Coded.OUTPUTS
        return side_of(method, *_sides(group))

    def _settled(self, group: Mapping[str, LayerShape]) -> CoSpaDiOptions:
        """The method of layers with one dictionary, with dtypes and side settled."""
        method, layer = self.method, next(iter(group.values()))
        dtype = settled_dtype(method.dictionary_dtype, layer.dtype, "dictionary_dtype")
        coded = self._side(group)
        return method.settled(dtype, method.code_bits.beside(dtype), coded, n_users=len(group))


def _shared_by(method: CoSpaDiOptions, name: str, layer: LayerShape) -> object:
    """A key that is equal for layers with one dictionary."""
    if method.share is Share.NONE or layer.survey is None:
        return name
    reads = layer.survey.reads or name
    if method.share is Share.DEPTH:
        index, place = block_and_place(reads)
        return index // method.resolved_depth, place, layer.shape[1]
    expert = _expert(method, name)
    return (expert.module, expert.layer == DOWN, layer.shape[1]) if expert else reads


def _place(method: CoSpaDiOptions, name: str) -> str:
    """A key that is equal for layers whose outputs are in one space, or alike enough to share a dictionary of them."""
    if method.share is Share.DEPTH:
        return block_and_place(name)[1]
    expert = _expert(method, name)
    return expert.of_all if expert else name


def _expert(method: CoSpaDiOptions, name: str) -> ExpertLayer | None:
    """Which expert's layer it is, if experts share dictionaries."""
    return expert_of(name) if method.share is Share.EXPERTS else None


def _refuse_few_lines(method: CoSpaDiOptions, group: Mapping[str, LayerShape], k: int) -> None:
    n = n_lines(method, [layer.shape for layer in group.values()])
    lines = f"the {n} {method.coded} of {', '.join(group)}"
    if n < ATOM_MULTIPLE:
        raise RecipeError(
            f"{lines} are fewer than the {ATOM_MULTIPLE} atoms of the smallest dictionary; --exclude it",
            option="coded",
        )
    if k > n:
        raise RecipeError(
            f"{k} are more than {lines}, each of which could be an atom; give fewer, or --exclude the layer",
            option="atoms",
        )


def _sides(group: Mapping[str, LayerShape]) -> tuple[int, int]:
    """The number of outputs of all layers in a block, and of their common inputs."""
    shapes = [layer.shape for layer in group.values()]
    n_blocks = len({block_and_place(name)[0] for name in group})
    return sum(o for o, _ in shapes) // n_blocks, shapes[0][1]


def n_lines(method: CoSpaDiOptions, shapes: Sequence[tuple[int, int]]) -> int:
    """The number of codes of layers with one dictionary, their side settled."""
    return sum(o if method.coded is Coded.OUTPUTS else i for o, i in shapes)


def most_atoms(method: CoSpaDiOptions, shapes: Sequence[tuple[int, int]], n_bytes: float) -> int:
    """The largest multiple of 4 atoms that so many bytes pay for, at most one for each line; 0 if they pay for none."""
    most = min(MOST_ATOMS * max(map(max, shapes)), n_lines(method, shapes))
    low, high = 0, most // ATOM_MULTIPLE
    while low < high:
        middle = (low + high + 1) // 2
        fits = method.bytes_of(shapes, middle * ATOM_MULTIPLE) <= n_bytes
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * ATOM_MULTIPLE
