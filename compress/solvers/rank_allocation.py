"""Which layer gets which rank: plans that spend a budget of bytes, from the layers' spectra.

A layer of o x i at rank r takes r (o + i) numbers and loses the tail of its spectrum, the sum over k > r of s_k^2; left
dense it takes o i and loses nothing. So a plan is a choice of one point on each layer's curve of loss against bytes.
"""

from __future__ import annotations

import bisect
import enum
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.solvers.knapsack import BudgetError, Choice, knapsack

DENSE = None
"""The rank of a layer that stays as it is."""

Ranks = dict[str, int | None]


class Allocation(enum.StrEnum):
    """How ranks are spread over the layers."""

    UNIFORM = "uniform"
    """The same share of every layer's bytes."""
    BY_TYPE = "by_type"
    """One rank for all layers of a type (q_proj, down_proj), or none, where it removes most error."""
    WELORE = "welore"
    """One threshold on all spectra, each scaled to 0 .. 1 (Jaiswal et al. 2024, arXiv:2407.11239)."""
    SPECTRUM = "spectrum"
    """Each rank where it removes most weighted error for its bytes."""


class Importance(enum.StrEnum):
    """What a unit of a layer's squared output error costs, where a plan compares layers."""

    NONE = "none"
    """As much as any other's."""
    RELATIVE = "relative"
    """Less, the more output energy the layer has."""
    FISHER = "fisher"
    """The mean squared gradient of the loss by an output of the layer."""
    KL = "kl"
    """The divergence from the original where that layer alone is compressed, measured, for each unit of its error."""


@dataclass(frozen=True)
class Curve:
    """What a plan knows of a layer."""

    shape: tuple[int, int]
    dense_bytes: int
    rank_bytes: Callable[[int], int]
    """Bytes of the factorised layer, growing with its rank."""
    spectrum: Tensor
    """Singular values, descending, fp64: of the whitened weight, so that squares are output energy."""
    importance: float = 1.0
    """What a unit of this layer's squared error costs."""

    def bytes_at(self, rank: int | None) -> int:
        """Bytes of the layer at a rank; None is dense."""
        return self.dense_bytes if rank is None else self.rank_bytes(rank)

    def paid_by(self, n_bytes: float, multiple: int) -> int:
        """The largest rank, a multiple, that so many bytes pay for; 0 if they pay for none."""
        ranks = range(multiple, min(self.shape) + 1, multiple)
        n_paid = bisect.bisect_right(ranks, n_bytes, key=self.rank_bytes)
        return ranks[n_paid - 1] if n_paid else 0

    def options(self, multiple: int) -> list[Point]:
        """Ranks that save bytes, ascending, with what they lose, then dense."""
        tail = [*self.spectrum.square().flip(0).cumsum(0).flip(0).tolist(), 0.0]
        ranks = range(multiple, min(self.shape) + 1, multiple)
        points = [
            Point(self.bytes_at(r), self.importance * tail[r], r)
            for r in ranks
            if self.bytes_at(r) < self.dense_bytes
        ]
        return [*points, Point(self.dense_bytes, 0.0, DENSE)]


@dataclass(frozen=True)
class Point(Choice):
    """A rank for one layer."""

    rank: int | None


def by_spectrum(
    curves: Mapping[str, Curve], budget: int, multiple: int, floor: float = 0.0
) -> Ranks:
    """The ranks, dense among them, that lose least for the budget, exactly (`knapsack`).

    `floor` is the share of the uniform plan's rank below which no layer falls: a loss summed over layers is only a
    proxy of the model's. Raises BudgetError if the budget does not pay for the least ranks.
    """
    evenly = uniform(curves, budget, multiple)
    choices = {
        name: [
            p
            for p in curve.options(multiple)
            if p.rank is None or p.rank >= floor * (evenly[name] or 0)
        ]
        for name, curve in curves.items()
    }
    return _spend(choices, budget)


def by_type(curves: Mapping[str, Curve], budget: int, multiple: int) -> Ranks:
    """One rank for all layers with the same last name, shape and bytes, by the sum of their losses."""
    members: dict[tuple[str, tuple[int, int], int], list[str]] = defaultdict(list)
    for name, curve in curves.items():
        members[name.rpartition(".")[2], curve.shape, curve.dense_bytes].append(name)
    pooled = {
        " ".join(names): _pooled([curves[name].options(multiple) for name in names])
        for names in members.values()
    }
    return {name: rank for names, rank in _spend(pooled, budget).items() for name in names.split()}


def _pooled(options: Sequence[Sequence[Point]]) -> list[Point]:
    """The choices of layers of one shape, made together."""
    return [
        Point(sum(p.n_bytes for p in points), sum(p.loss for p in points), points[0].rank)
        for points in zip(*options, strict=True)
    ]


def by_threshold(curves: Mapping[str, Curve], budget: int, multiple: int) -> Ranks:
    """WeLore: keep singular values above one threshold on spectra scaled to 0 .. 1, found for the budget by bisection.

    Differs from the authors' code, whose thresholds are a table for two models: a layer whose rank would save nothing
    stays dense, so that the model never grows, and the budget is in bytes, not in ranks.
    """
    scaled = {}
    for name, curve in curves.items():
        least, most = float(curve.spectrum[-1]), float(curve.spectrum[0])
        scaled[name] = (curve.spectrum - least) / max(most - least, torch.finfo(torch.float64).tiny)

    def ranks_at(threshold: float) -> Ranks:
        found: Ranks = {}
        for name, curve in curves.items():
            kept = int((scaled[name] >= threshold).sum())
            rank = max(multiple, kept // multiple * multiple)
            saves = rank <= min(curve.shape) and curve.bytes_at(rank) < curve.dense_bytes
            found[name] = rank if saves else DENSE
        return found

    low, high = 0.0, 1.0 + 1e-9  # at `high` every layer has its least rank
    _refuse_unpaid(curves, ranks_at(high), budget)
    for _ in range(60):
        middle = (low + high) / 2
        if total_bytes(curves, ranks_at(middle)) > budget:
            low = middle
        else:
            high = middle
    return ranks_at(high)


def uniform(curves: Mapping[str, Curve], budget: int, multiple: int) -> Ranks:
    """The same share of every layer's bytes: the largest multiple it pays for; dense where it pays for none."""
    share = budget / sum(curve.dense_bytes for curve in curves.values())
    return {
        name: curve.paid_by(share * curve.dense_bytes, multiple) or DENSE
        for name, curve in curves.items()
    }


def total_bytes(curves: Mapping[str, Curve], ranks: Ranks) -> int:
    """Bytes of all layers under a plan."""
    return sum(curve.bytes_at(ranks[name]) for name, curve in curves.items())


def _spend(choices: Mapping[str, Sequence[Point]], budget: int) -> Ranks:
    chosen = knapsack(list(choices.values()), budget)
    return {
        name: points[index].rank
        for (name, points), index in zip(choices.items(), chosen, strict=True)
    }


def _refuse_unpaid(curves: Mapping[str, Curve], ranks: Ranks, budget: int) -> None:
    least = total_bytes(curves, ranks)
    if least > budget:
        raise BudgetError(least, budget)


PLANS: Mapping[Allocation, Callable[[Mapping[str, Curve], int, int], Ranks]] = {
    Allocation.UNIFORM: uniform,
    Allocation.BY_TYPE: by_type,
    Allocation.WELORE: by_threshold,
    Allocation.SPECTRUM: by_spectrum,
}
