"""Ranks and widths of low-rank corrections: one for all layers, or those that lose least for a budget of bytes.

A correction of rank r in b bits leaves of a layer's residual the tail of its spectrum, the sum over k > r of s_k^2, and
what rounding the factors costs, a share n_b of what they capture. A layer without a correction loses all of it for no
bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from compress.errors import RecipeError
from compress.families.base import Compressor, LayerShape, Survey
from compress.families.budget import parse_share_or_bytes
from compress.families.correction_options import FULL_BITS, CorrectionOptions
from compress.solvers.knapsack import Choice, knapsack

Widths = tuple[int, ...]


@dataclass(frozen=True)
class CorrectionChoice(Choice):
    """A correction that a layer may get: its rank and width, with its bytes and loss."""

    rank: int
    """0 stands for no correction."""
    bits: int


@dataclass(frozen=True)
class CorrectionPlanner:
    """A planner of corrections for the layers that a base method compresses."""

    method: CorrectionOptions
    layers: Mapping[str, LayerShape]
    base_bytes: Mapping[str, int]

    def choices(self) -> Mapping[str, CorrectionChoice]:
        """A rank and a width for each layer. Raises RecipeError for a rank or a budget that cannot be."""
        self._refuse_budget()
        surveyed = all(layer.survey is not None for layer in self.layers.values())
        if not self.method.surveys_residuals or not surveyed:
            return self._provisional(self._plain_ranks(), self.method.widths[0])
        budget = self._budget()
        found = self._uniform(budget)
        if self.method.adapter_budget is None:
            found.append(self._alike(self._plain_ranks(), self.method.widths[0]))
        if self.method.allocates_by_spectrum:
            # Where bytes are counted in coarse units a uniform plan may be a hair better.
            found.append(self._by_spectrum(budget))
        return min(found, key=lambda plan: sum(choice.loss for choice in plan.values()))

    def _refuse_budget(self) -> None:
        """Raises RecipeError for a budget that pays for no correction, or for more than every layer's largest."""
        if not self.method.allocates_by_spectrum:
            return
        budget, text = self._budget(), self.method.adapter_budget
        least, name = min(
            (self.method.correction_bytes(layer.shape, rank, bits), name)
            for name, layer in self.layers.items()
            for bits in self.method.widths
            for rank in self.method.ranks_in(min(layer.shape), bits)[:1]
        )
        if least > budget:
            raise RecipeError(
                f"{budget} bytes pay for no correction; the least, of {name}, takes {least}",
                option="adapter_budget",
            )
        rooms = {name: (layer.shape, self._room(name)) for name, layer in self.layers.items()}
        largest = {kind: max(self._sizes_in(*kind), default=0) for kind in set(rooms.values())}
        most = sum(largest[kind] for kind in rooms.values())
        if not most:
            raise RecipeError(
                f"{text} pays for no correction that leaves its layer smaller: with the smallest, {least} bytes, "
                f"{name} is as large as it was, or larger; compress more, or --exclude these layers",
                option="adapter_budget",
            )
        if budget > most:
            raise RecipeError(
                f"{text} ({budget} bytes) exceeds the largest corrections that all layers can have; give {most} "
                "bytes or less",
                option="adapter_budget",
            )

    def _sizes_in(self, shape: tuple[int, int], room: float) -> Iterator[int]:
        """Bytes of every correction that a layer of a shape may have within `room` bytes."""
        for bits in self.method.widths:
            for rank in self.method.ranks_in(min(shape), bits):
                n_bytes = self.method.correction_bytes(shape, rank, bits)
                if n_bytes < room:
                    yield n_bytes

    def _budget(self) -> int:
        """Bytes of all corrections together: as given, or those of the rank in 16 bits."""
        if self.method.adapter_budget is None:
            return sum(
                self.method.correction_bytes(self.layers[name].shape, rank, FULL_BITS)
                for name, rank in self._plain_ranks().items()
            )
        whole = sum(self.base_bytes.values())
        return parse_share_or_bytes(
            self.method.adapter_budget, whole, "adapter_budget", "the base's"
        )

    def _plain_ranks(self) -> dict[str, int]:
        """One rank for every layer: as given, or the largest that a budget pays for.

        The default is lower in layers that it would not leave smaller than they were; 0 where every rank is too much.
        """
        bits = self.method.widths[0]
        if self.method.adapter_budget is not None:
            return dict.fromkeys(self.layers, self._rank_for(self._budget(), bits))
        rank = self.method.served(self.method.resolved_rank)
        if self.method.settles_rank:
            self._refuse_thin(rank)
            return dict.fromkeys(self.layers, rank)
        return {name: self._default_rank(name, rank, bits) for name in self.layers}

    def _default_rank(self, name: str, most: int, bits: int) -> int:
        shape, room = self.layers[name].shape, self._room(name)
        ranks = {most, *self.method.ranks_in(min(shape), bits)}
        fitting = (
            rank
            for rank in ranks
            if rank <= min(most, *shape) and self.method.correction_bytes(shape, rank, bits) < room
        )
        return max(fitting, default=0)

    def _refuse_thin(self, rank: int) -> None:
        thin = {n: min(layer.shape) for n, layer in self.layers.items() if min(layer.shape) < rank}
        if thin:
            name, smallest = min(thin.items(), key=lambda entry: entry[1])
            raise RecipeError(
                f"{rank} is above min(out, in) of {len(thin)} layers, such as {name} "
                f"{self.layers[name].shape}; give {smallest} or less, or --exclude them",
                option="rank",
            )

    def _rank_for(self, budget: int, bits: int) -> int:
        """The largest rank whose factors fit the budget in all layers together. Raises RecipeError if there is none."""
        ranks = self.method.ranks_in(self._thinnest, bits)
        if self.method.allocates_by_spectrum:
            # Provisional: a survey will say which layers get a correction at all.
            return max((r for r in ranks if self._fits(r, bits, budget)), default=ranks[0])
        ranks = [r for r in ranks if self._fits(r, bits, math.inf)] or ranks[:1]
        most, least = self._total(ranks[-1], bits), self._total(ranks[0], bits)
        if budget < least:
            raise RecipeError(
                f"{budget} bytes do not pay for rank {ranks[0]}, which takes {least}",
                option="adapter_budget",
            )
        if budget >= most + most // ranks[-1]:
            raise RecipeError(
                f"{self.method.adapter_budget} ({budget} bytes) pays for more than rank "
                f"{ranks[-1]}, the most that every layer can have; give {most} bytes or less, --allocation "
                "spectrum, or --exclude thin layers",
                option="adapter_budget",
            )
        return max(r for r in ranks if self._total(r, bits) <= budget)

    def _fits(self, rank: int, bits: int, budget: float) -> bool:
        """Within the budget, and every layer smaller than it was."""
        smaller = all(
            self.method.correction_bytes(layer.shape, rank, bits) < self._room(name)
            for name, layer in self.layers.items()
        )
        return smaller and self._total(rank, bits) <= budget

    def _room(self, name: str) -> float:
        """Bytes below which a correction leaves its layer smaller than it was; unbounded where that is not wanted."""
        if not self.method.saves_bytes:
            return math.inf
        return self.layers[name].n_bytes - self.base_bytes[name]

    @property
    def _thinnest(self) -> int:
        return min(min(layer.shape) for layer in self.layers.values())

    def _total(self, rank: int, bits: int) -> int:
        return sum(
            self.method.correction_bytes(layer.shape, rank, bits) for layer in self.layers.values()
        )

    def _provisional(self, ranks: Mapping[str, int], bits: int) -> dict[str, CorrectionChoice]:
        """The same correction for all layers; with ranks by layer, none where it would not leave the layer smaller."""
        found = self._alike(ranks, bits)
        if not self.method.allocates_by_spectrum:
            return found
        return {
            name: choice
            if self.method.correction_bytes(self.layers[name].shape, choice.rank, bits)
            < self._room(name)
            else CorrectionChoice(0, 0, 0, bits)
            for name, choice in found.items()
        }

    def _alike(self, ranks: Mapping[str, int], bits: int) -> dict[str, CorrectionChoice]:
        return {
            name: self._choice(layer, ranks[name], bits)
            if layer.survey
            else CorrectionChoice(0, 0, ranks[name], bits)
            for name, layer in self.layers.items()
        }

    def _uniform(self, budget: int) -> list[dict[str, CorrectionChoice]]:
        """Plans of one rank for all layers: for each width, the largest rank that the budget pays for."""
        found = []
        for bits in self.method.widths:
            paid = [
                rank
                for rank in self.method.ranks_in(self._thinnest, bits)
                if self._fits(rank, bits, budget)
            ]
            if paid:
                found.append(self._alike(dict.fromkeys(self.layers, paid[-1]), bits))
        return found

    def _by_spectrum(self, budget: int) -> dict[str, CorrectionChoice]:
        """The corrections with the least total loss in the budget, found exactly by `knapsack`."""
        options = {name: self._options(name, layer) for name, layer in self.layers.items()}
        chosen = knapsack(list(options.values()), budget)
        return {
            name: points[index]
            for (name, points), index in zip(options.items(), chosen, strict=True)
        }

    def _options(self, name: str, layer: LayerShape) -> list[CorrectionChoice]:
        """The corrections of a layer that no other beats: more bytes always lose less; the first is none at all."""
        offered = [
            choice
            for bits in self.method.widths
            for rank in self.method.ranks_in(min(layer.shape), bits)
            if (choice := self._choice(layer, rank, bits)).n_bytes < self._room(name)
        ]
        best = [self._choice(layer, 0, self.method.widths[0])]
        for choice in sorted(offered, key=lambda c: (c.n_bytes, c.loss)):
            if choice.loss < best[-1].loss:
                best.append(choice)
        return best

    def _choice(self, layer: LayerShape, rank: int, bits: int) -> CorrectionChoice:
        assert layer.survey is not None
        lost = layer.survey.cost * remaining(layer.survey, rank, bits)
        return CorrectionChoice(
            self.method.correction_bytes(layer.shape, rank, bits), lost, rank, bits
        )


def remaining(survey: Survey, rank: int, bits: int) -> float:
    """The squared error that a correction leaves of a surveyed residual."""
    energies = survey.spectrum.square()
    tail = float(energies[rank:].sum())
    return tail + dict(survey.rounding).get(bits, 0.0) * (survey.residual - tail)


def planned_corrections(
    method: CorrectionOptions, bases: Mapping[str, Compressor], layers: Mapping[str, LayerShape]
) -> Iterator[tuple[str, CorrectionChoice]]:
    """The correction of each layer that the base compresses. Raises RecipeError for a rank or budget that cannot be."""
    chosen = {name: layer for name, layer in layers.items() if name in bases}
    if not chosen:
        return
    sizes = {name: bases[name].planned_bytes(layer.shape) for name, layer in chosen.items()}
    yield from CorrectionPlanner(method, chosen, sizes).choices().items()
