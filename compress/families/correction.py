"""Low-rank corrections of a base method's error: the plan, the fit and the forms of EoRA, LQER and the plain SVD."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import torch
from torch import Tensor

from calibration.statistics.base import Statistic
from calibration.statistics.collection import Statistics
from calibration.statistics.cross_gram import CrossGram
from calibration.statistics.gradient_energy import GradientEnergy
from calibration.statistics.gram import Gram
from calibration.statistics.held_out import HeldOut, without_held_out
from calibration.statistics.mean import Mean
from compress.errors import inside
from compress.families.base import Compressor, LayerShape, Survey, Trial
from compress.families.correction_options import (
    FULL_BITS,
    AdapterBits,
    CorrectionOptions,
    Holdout,
)
from compress.families.correction_planner import planned_corrections, remaining
from compress.families.low_rank import (
    Factors,
    Metric,
    best_low_rank,
    covariance,
    quantised_low_rank,
    shifted,
)
from compress.families.target import FitTarget, towards_original
from compress.forms.base import Form
from compress.forms.sum import Sum
from compress.solvers.linalg import output_energy
from compress.solvers.rank_allocation import Importance

EXTRAPOLATION = 1.0
"""Factor on a correction's last step.

At 2 and more errors grow after a few rounds; at 0 four rounds do what two do at 1.
"""


@dataclass(frozen=True, kw_only=True)
class Correction(CorrectionOptions, ABC):
    """A method that adds a low-rank correction to the forms of a base method."""

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """The Gram matrix, the base's statistics, the inputs' mean if the base shifts outputs, and held-out moments."""
        mean = {Mean} if self.shifts_outputs else set()
        aside = set() if self.holdout is Holdout.NONE else {HeldOut}
        cross = set() if self.target is FitTarget.LAYER else {CrossGram}
        return self.resolved_base.needs | {Gram} | mean | aside | cross

    @property
    def shifts_outputs(self) -> bool:
        """Whether the base's forms add an offset to the outputs."""
        return self.resolved_base.shifts_outputs

    @property
    def surveys(self) -> frozenset[type[Statistic]] | None:
        """The statistics of a survey of residuals if the plan needs one, otherwise those of the base's own survey."""
        if not self.surveys_residuals:
            return self.resolved_base.surveys
        fisher = {GradientEnergy} if self.adapter_importance is Importance.FISHER else set()
        return (self.needs - {CrossGram}) | fisher

    @property
    def joins_layers(self) -> bool:
        """Whether the base's plan depends on which layers read the same tensor."""
        return self.resolved_base.joins_layers

    def owners(self, layers: Mapping[str, LayerShape]) -> Mapping[str, str]:
        """The layers whose bases read what another's stores, each with that one's name."""
        return self.resolved_base.owners(layers)

    @property
    def together(self) -> Compressor:
        """A key that is equal for weights whose base compresses them together."""
        return replace(self, base=self.resolved_base.together)

    @property
    def blocks_at_once(self) -> int:
        """The number of decoder blocks that the base needs together."""
        return self.resolved_base.blocks_at_once

    @property
    def weighs_by_divergence(self) -> bool:
        """Whether errors are weighted by the KL divergence that they were measured to cause."""
        if self.surveys_residuals:
            return self.adapter_importance is Importance.KL
        return self.resolved_base.weighs_by_divergence

    def trials(
        self, weights: Sequence[Tensor], surveys: Sequence[Survey], stats: Sequence[Statistics]
    ) -> list[Trial]:
        """Trials of the base alone, for its own plan."""
        return self.resolved_base.trials(weights, surveys, stats)

    def survey(self, weights: Sequence[Tensor], stats: Sequence[Statistics]) -> list[Survey]:
        """Surveys of the base, for its own plan."""
        return self.resolved_base.survey(weights, stats)

    def leaves(self, layers: Mapping[str, LayerShape]) -> Mapping[str, str]:
        """Layers that are too small for the base's defaults."""
        return self.resolved_base.leaves(layers)

    def plan(self, layers: Mapping[str, LayerShape], rest_bytes: int = 0) -> dict[str, Compressor]:
        """The base's plan, with a correction on each layer; a layer that gets none has the base's compressor alone.

        Raises RecipeError for ranks or a budget that cannot be.
        """
        with inside("base"):
            bases = self.resolved_base.plan(layers, rest_bytes)
        corrections = dict(planned_corrections(self, bases, layers))
        return {
            name: self._with(base, corrections[name].rank, corrections[name].bits)
            if corrections[name].rank
            else base
            for name, base in bases.items()
        }

    def _with(self, base: Compressor, rank: int, bits: int) -> Self:
        """The planned method of one layer: its base, rank and bits settled, nothing left to plan."""
        return replace(
            self,
            base=base,
            rank=rank,
            adapter_bits=AdapterBits(str(bits)),
            adapter_budget=None,
            allocation=None,
            adapter_importance=None,
            factor_dtype=self.factor_dtype if bits == FULL_BITS else None,
        )

    def predicted_error(self, layer: LayerShape) -> float | None:
        """The relative error that the survey of a layer's residual predicts; None without one."""
        survey = layer.survey
        if survey is None or survey.energy <= 0 or survey.points:
            return None
        return float(
            (remaining(survey, self.resolved_rank, int(self.adapter_bits)) / survey.energy) ** 0.5
        )

    def compress(self, weights: Sequence[Tensor], stats: Statistics) -> list[Form]:
        """The base's forms, each with a low-rank correction for what it lost as it is stored.

        With `base_rounds`, base and correction alternate, as in CALDERA (Saha et al. 2024, arXiv:2405.18886, algorithm
        1): the base is made of W - BA, then BA of what that base loses. From the second round on W - BA is extrapolated
        by as much as BA moved, which halves the rounds where the base is pruned (theirs are not extrapolated). Of each
        layer's pairs that stays which loses least.
        """
        return self._with_corrections(weights, self.resolved_base.compress(weights, stats), stats)

    def compress_alike(
        self, problems: Sequence[tuple[Sequence[Tensor], Statistics]]
    ) -> list[list[Form]]:
        """The base's forms of all groups at once, each group then corrected as `compress` does."""
        bases = self.resolved_base.compress_alike(problems)
        return [
            self._with_corrections(weights, forms, stats)
            for (weights, stats), forms in zip(problems, bases, strict=True)
        ]

    def _with_corrections(
        self, weights: Sequence[Tensor], bases: Sequence[Form], stats: Statistics
    ) -> list[Form]:
        """The base's forms with corrections, after as many rounds as `base_rounds` asks for."""
        targets = self.targets(weights, stats)
        found = best = self._pairs(bases, targets, stats)
        before: list[Tensor] | None = None
        for _ in range(self.base_rounds):
            now = [
                _correction_of(form, weight) for form, weight in zip(found, weights, strict=True)
            ]
            ahead = now if before is None else _extrapolated(before, now)
            rests = [weight - correction for weight, correction in zip(weights, ahead, strict=True)]
            found, before = (
                self._pairs(self.resolved_base.compress(rests, stats), targets, stats),
                now,
            )
            best = self._better(targets, best, found, stats)
        return best

    def _better(
        self,
        targets: Sequence[Tensor],
        first: Sequence[Form],
        second: Sequence[Form],
        stats: Statistics,
    ) -> list[Form]:
        """The form with the lower output error for each target (o, i); one round's where layers share a dictionary."""
        shares = []
        for part, own in stats.by_input(list(zip(targets, first, second, strict=True))):
            moments_ii = self.moments(own)
            for target, *forms in part:
                left = [output_energy(target - form.dense(), moments_ii) for form in forms]
                whole = output_energy(target, moments_ii) or max(left)
                shares.append([each / whole if whole > 0 else 1.0 for each in left])
        if self.resolved_base.joins_layers:
            sums = [math.fsum(each) for each in zip(*shares, strict=True)]
            return list(first if sums[0] <= sums[1] else second)
        triples = zip(shares, first, second, strict=True)
        return [one if before <= after else other for (before, after), one, other in triples]

    def targets(self, weights: Sequence[Tensor], stats: Statistics) -> list[Tensor]:
        """The weights (o, i), fp64, that base and correction approximate together: as given, or as `target` asks."""
        if self.target is FitTarget.LAYER:
            return [weight.double() for weight in weights]
        found = []
        for part, own in stats.by_input(weights):
            moments = partial(_target_moments, own)
            found.extend(towards_original(part, own, moments))
        return found

    def _pairs(
        self, bases: Sequence[Form], targets: Sequence[Tensor], stats: Statistics
    ) -> list[Form]:
        """The base's forms, each with a correction of its distance to the target.

        A base that makes the mean output exact leaves only the variation around it to be corrected; its offset is then
        that of both together, or the mean would be counted twice. A base whose correction fails on the held-out
        sequences stands alone.
        """
        residuals = [w - base.dense().double() for w, base in zip(targets, bases, strict=True)]
        corrections = self.corrections(residuals, stats)
        if self.shifts_outputs:
            mean_i = stats[Mean].mean_i()
            bases = [
                shifted(base, (residual - correction.dense().double()) @ mean_i)
                if correction
                else base
                for base, residual, correction in zip(bases, residuals, corrections, strict=True)
            ]
        return [
            base if correction is None else Sum([base, correction])
            for base, correction in zip(bases, corrections, strict=True)
        ]

    def corrections(self, residuals: Sequence[Tensor], stats: Statistics) -> list[Factors | None]:
        """A correction of each residual (o, i), fp64, fitted with the statistics of the layer's input.

        None where a correction does not lower the error on the held-out sequences.
        """
        return [
            self._correction(residual, own)
            for part, own in stats.by_input(residuals)
            for residual in part
        ]

    def _correction(self, residual: Tensor, stats: Statistics) -> Factors | None:
        metric = self.measure(residual, stats)
        correction: Factors
        if self.adapter_bits is AdapterBits.FULL:
            correction = best_low_rank(residual, metric, self.resolved_rank, self.storage)
        else:
            quantiser, fitted = self.rounding(int(self.adapter_bits)), self.fitted(stats)
            correction = quantised_low_rank(residual, metric, self.resolved_rank, quantiser, fitted)
        if self.holdout is Holdout.NONE:
            return correction
        aside_ii = stats[HeldOut].mean_ii()
        left = output_energy(residual - correction.dense().double(), aside_ii)
        return correction if left < output_energy(residual, aside_ii) else None

    def fitted(self, stats: Statistics) -> Statistics:
        """The statistics that corrections are fitted to: all but those of held-out sequences."""
        return stats.once(("without held out",), lambda: without_held_out(stats))

    def moments(self, stats: Statistics) -> Tensor:
        """The metric of the correction, (i, i), fp64: E[x x^T], or Cov(x) where the mean output is exact."""
        fitted = self.fitted(stats)
        return covariance(fitted) if self.shifts_outputs else fitted[Gram].mean_ii()

    @abstractmethod
    def measure(self, residual: Tensor, stats: Statistics) -> Metric:
        """The metric in which a correction of this residual (o, i) is fitted."""


def _target_moments(stats: Statistics) -> tuple[Tensor, Tensor]:
    return stats[Gram].mean_ii(), stats[CrossGram].mean_ij()


def _extrapolated(before: Sequence[Tensor], now: Sequence[Tensor]) -> list[Tensor]:
    return [after + EXTRAPOLATION * (after - old) for old, after in zip(before, now, strict=True)]


def _correction_of(form: Form, weight: Tensor) -> Tensor:
    """The dense correction (o, i) in a form, in the dtype of the weight; zero if it has none."""
    if not has_correction(form):
        return torch.zeros_like(weight)
    assert isinstance(form, Sum)
    correction = form.terms[-1]
    assert isinstance(correction, Form)
    return correction.dense().to(weight.dtype)


def has_correction(form: Form) -> bool:
    """Whether a form is a base with a correction on it."""
    return isinstance(form, Sum) and len(form.terms) > 1
