"""Low-rank repair of another method's error: what EoRA and its baseline share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import torch
from torch import Tensor

from calibration.gradients import GradientEnergy
from calibration.held_out import HeldOut, without_held_out
from calibration.stats import Anchor, Gram, Mean, Statistic, Statistics
from compress.families.anchor import Anchoring, anchored
from compress.families.base import Compressor, LayerShape, Survey, Trial
from compress.families.low_rank import (
    Metric,
    Path,
    best_low_rank,
    covariance,
    quantised_low_rank,
    shifted,
)
from compress.families.quantiser import Quantiser
from compress.families.repair_options import (
    FACTOR_BYTES,
    FULL_BITS,
    AdapterBits,
    Guard,
    PathAllocation,
    PathOptions,
)
from compress.families.repair_planner import planned_paths, remaining
from compress.forms.factorised import Form, Sum
from compress.solvers.linalg import output_energy
from compress.solvers.rank_allocation import Importance

EXTRAPOLATION = 1.0
"""Of a path's last step. At 2 and more errors grow after a few rounds; at 0 four rounds do what two do at 1."""


@dataclass(frozen=True, kw_only=True)
class Repair(PathOptions, ABC):
    """A base method's forms, and low-rank paths for what they lost."""

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """The Gram, what the base needs, the mean if the base puts one back, and what is kept aside."""
        mean = {Mean} if self.shifts_outputs else set()
        aside = set() if self.guard is Guard.OFF else {HeldOut}
        anchor = set() if self.anchor is Anchoring.NONE else {Anchor}
        return self.base.needs | {Gram} | mean | aside | anchor

    @property
    def shifts_outputs(self) -> bool:
        """As its base."""
        return self.base.shifts_outputs

    @property
    def surveys(self) -> frozenset[type[Statistic]] | None:
        """The base's, or what it and the paths are made of."""
        if not self.surveys_residuals:
            return self.base.surveys
        fisher = {GradientEnergy} if self.adapter_importance is Importance.FISHER else set()
        return (self.needs - {Anchor}) | fisher

    @property
    def saves_bytes(self) -> bool:
        """As its base."""
        return self.base.saves_bytes

    @property
    def joins_layers(self) -> bool:
        """The base's."""
        return self.base.joins_layers

    def shared_by(self, name: str, layer: LayerShape) -> object:
        """As its base."""
        return self.base.shared_by(name, layer)

    @property
    def together(self) -> Compressor:
        """As its base."""
        return replace(self, base=self.base.together)

    @property
    def spans_blocks(self) -> bool:
        """As its base."""
        return self.base.spans_blocks

    @property
    def blocks_at_once(self) -> int:
        """As its base."""
        return self.base.blocks_at_once

    @property
    def weighs_by_divergence(self) -> bool:
        """Where errors cost what they were measured to do."""
        if self.surveys_residuals:
            return self.adapter_importance is Importance.KL
        return self.base.weighs_by_divergence

    def trials(
        self, weights: Sequence[Tensor], surveys: Sequence[Survey], stats: Sequence[Statistics]
    ) -> list[Trial]:
        """The base's."""
        return self.base.trials(weights, surveys, stats)

    def survey(self, weights: Sequence[Tensor], stats: Sequence[Statistics]) -> list[Survey]:
        """The base's."""
        return self.base.survey(weights, stats)

    def plan(self, layers: Mapping[str, LayerShape], rest_bytes: int = 0) -> dict[str, Compressor]:
        """Plan the base and the paths; layers that the base leaves need no repair.

        A layer that gets no path has the base's compressor alone. Raises RecipeError for ranks that can't be.
        """
        bases = self.base.plan(layers, rest_bytes)
        paths = dict(planned_paths(self, bases, layers))
        return {
            name: self._with(base, paths[name].rank, paths[name].bits) if paths[name].rank else base
            for name, base in bases.items()
        }

    def _with(self, base: Compressor, rank: int, bits: int) -> Self:
        """With nothing left to plan."""
        return replace(
            self,
            base=base,
            rank=rank,
            adapter_bits=AdapterBits(str(bits)),
            adapter_budget=None,
            adapter_allocation=PathAllocation.SPECTRUM,
            adapter_importance=Importance.RELATIVE,
        )

    def predicted_error(self, layer: LayerShape) -> float | None:
        """The relative error that a survey of the residual tells, of a planned layer; None without one."""
        survey = layer.survey
        if survey is None or survey.energy <= 0 or survey.points:
            return None
        return float((remaining(survey, self.rank, int(self.adapter_bits)) / survey.energy) ** 0.5)

    def compress(self, weights: Sequence[Tensor], stats: Statistics) -> list[Form]:
        """The base's forms, each with a low-rank path for what it lost as it is stored.

        With `base_rounds`, base and path take turns, as in CALDERA (Saha et al. 2024, arXiv:2405.18886, algorithm 1):
        the base is made of what the path leaves of the weight, then the path of what that base loses. From the second
        round on what it leaves is taken a step ahead, by as much as the path moved, which halves the rounds where the
        base is pruned (theirs are not extrapolated). Of each layer's pairs that stays which loses least.
        """
        targets = self.targets(weights, stats)
        found = best = self._pairs(weights, targets, stats)
        before: list[Tensor] | None = None
        for _ in range(self.base_rounds):
            now = [_path_of(form, weight) for form, weight in zip(found, weights, strict=True)]
            ahead = now if before is None else _extrapolated(before, now)
            rests = [weight - path for weight, path in zip(weights, ahead, strict=True)]
            found, before = self._pairs(rests, targets, stats), now
            best = self._better(targets, best, found, stats)
        return best

    def _better(
        self,
        targets: Sequence[Tensor],
        first: Sequence[Form],
        second: Sequence[Form],
        stats: Statistics,
    ) -> list[Form]:
        """Of two forms for each target (o, i) that which errs less; all of one round where they share a dictionary."""
        shares = []
        for part, own in stats.by_input(list(zip(targets, first, second, strict=True))):
            moments_ii = self.moments(own)
            for target, *forms in part:
                left = [output_energy(target - form.dense(), moments_ii) for form in forms]
                whole = output_energy(target, moments_ii) or max(left)
                shares.append([each / whole if whole > 0 else 1.0 for each in left])
        if self.base.joins_layers:
            sums = [math.fsum(each) for each in zip(*shares, strict=True)]
            return list(first if sums[0] <= sums[1] else second)
        triples = zip(shares, first, second, strict=True)
        return [one if before <= after else other for (before, after), one, other in triples]

    def targets(self, weights: Sequence[Tensor], stats: Statistics) -> list[Tensor]:
        """What bases and paths are to come to: the weights (o, i), or what gives the original's outputs. fp64."""
        if self.anchor is Anchoring.NONE:
            return [weight.double() for weight in weights]
        found = []
        for part, own in stats.by_input(weights):
            moments = partial(_anchored_moments, own)
            found.extend(anchored(part, own, moments))
        return found

    def _pairs(
        self, weights: Sequence[Tensor], targets: Sequence[Tensor], stats: Statistics
    ) -> list[Form]:
        """The base's forms of the weights, with paths for what they lack of the targets.

        A base that makes the mean output exact leaves its outputs' variation to be repaired; its offset is then that
        of both together, or the mean would be counted twice. A base whose path the guard drops stands alone.
        """
        bases = self.base.compress(weights, stats)
        residuals = [w - base.dense().double() for w, base in zip(targets, bases, strict=True)]
        paths = self.paths(residuals, stats)
        if self.shifts_outputs:
            mean_i = stats[Mean].mean_i()
            bases = [
                shifted(base, (residual - path.dense().double()) @ mean_i) if path else base
                for base, residual, path in zip(bases, residuals, paths, strict=True)
            ]
        return [
            base if path is None else Sum([base, path])
            for base, path in zip(bases, paths, strict=True)
        ]

    def paths(self, residuals: Sequence[Tensor], stats: Statistics) -> list[Path | None]:
        """A path for each residual (o, i), fp64, by the statistics of the input that its layer reads.

        None where one does not lower the error on what is kept aside.
        """
        return [
            self._path(residual, own)
            for part, own in stats.by_input(residuals)
            for residual in part
        ]

    def _path(self, residual: Tensor, stats: Statistics) -> Path | None:
        metric = self.measure(residual, stats)
        path: Path
        if self.adapter_bits is AdapterBits.FULL:
            path = best_low_rank(residual, metric, self.rank, self.storage)
        else:
            quantiser, fitted = self.rounding(int(self.adapter_bits)), self.fitted(stats)
            path = quantised_low_rank(residual, metric, self.rank, quantiser, fitted)
        if self.guard is Guard.OFF:
            return path
        aside_ii = stats[HeldOut].mean_ii()
        left = output_energy(residual - path.dense().double(), aside_ii)
        return path if left < output_energy(residual, aside_ii) else None

    def fitted(self, stats: Statistics) -> Statistics:
        """What paths are fitted to: all but what is kept aside."""
        return stats.once(("without held out",), lambda: without_held_out(stats))

    def moments(self, stats: Statistics) -> Tensor:
        """What an error of the path costs: E[x x^T], or the covariance where the mean is put back. (i, i), fp64."""
        fitted = self.fitted(stats)
        return covariance(fitted) if self.shifts_outputs else fitted[Gram].mean_ii()

    @abstractmethod
    def measure(self, residual: Tensor, stats: Statistics) -> Metric:
        """What an error of a path for this residual (o, i) costs."""

    @abstractmethod
    def rounding(self, bits: int) -> Quantiser:
        """What stores factors in so many bits."""

    def path_bytes(self, shape: tuple[int, int], rank: int, bits: int) -> int:
        """Bytes of the two factors of a path for a weight (o, i), as the native format stores them."""
        if bits == FULL_BITS:
            return rank * sum(shape) * FACTOR_BYTES
        if rank == 0:
            return 0
        quantiser, (o, i) = self.rounding(bits), shape
        return quantiser.planned_bytes((o, rank)) + quantiser.planned_bytes((rank, i))

    def adapter_bytes(self, shape: tuple[int, int]) -> int:
        """The same in a PEFT adapter, which holds 16 bits whatever the path was rounded to."""
        return self.path_bytes(shape, self.rank, FULL_BITS)

    def planned_bytes(self, shape: tuple[int, int]) -> int:
        """The base's bytes and the two factors'."""
        bits = int(self.adapter_bits)
        return self.base.planned_bytes(shape) + self.path_bytes(shape, self.rank, bits)


def _anchored_moments(stats: Statistics) -> tuple[Tensor, Tensor]:
    return stats[Gram].mean_ii(), stats[Anchor].mean_ij()


def _extrapolated(before: Sequence[Tensor], now: Sequence[Tensor]) -> list[Tensor]:
    return [after + EXTRAPOLATION * (after - old) for old, after in zip(before, now, strict=True)]


def _path_of(form: Form, weight: Tensor) -> Tensor:
    """What the path of a pair for a weight (o, i) adds to its base: (o, i), in the weight's dtype."""
    if not has_path(form):
        return torch.zeros_like(weight)
    assert isinstance(form, Sum)
    path = form.terms[-1]
    assert isinstance(path, Form)
    return path.dense().to(weight.dtype)


def widens(exports: Collection[str]) -> bool:
    """Whether paths of few bits are written in 16 alone: PEFT has no other format, a native export holds codes."""
    return "native" not in exports and not {"adapter", "gptq"}.isdisjoint(exports)


def has_path(form: Form) -> bool:
    """Whether a form that a repair made is more than its base."""
    return isinstance(form, Sum) and len(form.terms) > 1
