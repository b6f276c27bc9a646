"""Methods that replace a weight by two thin factors: how they survey, plan and fit.

Shapes: o = out_features, i = in_features, r = rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from calibration.statistics.base import Statistic
from calibration.statistics.collection import Statistics
from calibration.statistics.cross_gram import CrossGram
from calibration.statistics.gradient_energy import GradientEnergy
from calibration.statistics.gram import Gram
from compress.errors import LayerError, RecipeError
from compress.families.base import Compressor, LayerShape, Survey, Trial
from compress.families.factorisation_options import FactorisationOptions
from compress.families.importance import fisher_cost
from compress.families.low_rank import FactorDtype, Metric, best_low_rank, quantised_low_rank
from compress.families.rank_planner import RankPlanner
from compress.families.target import FitTarget, towards_original
from compress.forms.base import Form
from compress.forms.low_rank import LowRank
from compress.forms.product import Product
from compress.solvers.rank_allocation import Allocation, Importance

NOTHING = 1e-9
"""Share of a weight's energy below which it counts as zero."""


@dataclass(frozen=True, kw_only=True)
class Factorisation(FactorisationOptions, ABC):
    """A method that replaces a weight by two factors."""

    @property
    def surveys(self) -> frozenset[type[Statistic]] | None:
        """The statistics of the metric, if the plan compares spectra; None if it does not."""
        if self.rank is not None or self.resolved_allocation is Allocation.UNIFORM:
            return None
        if self.resolved_importance is Importance.FISHER:
            return self.metric_needs | {GradientEnergy}
        # Forms are made for the measurement, so all that this takes.
        return (
            self.needs - {CrossGram}
            if self.resolved_importance is Importance.KL
            else self.metric_needs
        )

    @property
    def metric_needs(self) -> frozenset[type[Statistic]]:
        """Statistics that `measure` reads."""
        return frozenset({Gram})

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """The statistics of the metric, of the factors' quantiser and of the target, and the Gram matrix."""
        quantizer = self.factor_quantizer.needs if self.factor_quantizer else frozenset()
        cross = {CrossGram} if self.target is FitTarget.ORIGINAL else set()
        return self.metric_needs | {Gram} | quantizer | cross

    @property
    def weighs_by_divergence(self) -> bool:
        """Whether errors are weighted by the KL divergence that they were measured to cause."""
        return self.surveys is not None and self.resolved_importance is Importance.KL

    def survey(self, weights: Sequence[Tensor], stats: Sequence[Statistics]) -> list[Survey]:
        """The singular values of each weight in the metric, and the cost of its error."""
        return [self._surveyed(*each) for each in zip(weights, stats, strict=True)]

    def _surveyed(self, weight_oi: Tensor, stats: Statistics) -> Survey:
        spectrum = self.measure([weight_oi], stats).spectrum(weight_oi)
        return Survey(spectrum, fisher_cost(self.resolved_importance, stats))

    def leaves(self, layers: Mapping[str, LayerShape]) -> Mapping[str, str]:
        """Where neither sizes nor ranks were given, layers that the default share pays no rank for, unless all are."""
        given = (self.keep, self.budget, self.rank, self.rank_multiple, self.ranks or None)
        if any(option is not None for option in given):
            return {}
        share, least = self.resolved_keep, self.resolved_multiple
        thin = {
            name: f"{share} of its bytes, the default, does not pay for rank {least}, the smallest"
            for name, layer in layers.items()
            if self.stored_as(layer).factor_bytes(layer.shape, least) > share * layer.n_bytes
        }
        return {} if len(thin) == len(layers) else thin

    def plan(self, layers: Mapping[str, LayerShape], rest_bytes: int = 0) -> dict[str, Compressor]:
        """The method of each layer with its rank and dtype settled; dense layers are left out.

        Raises RecipeError naming a layer that gets no rank, or that the bytes do not pay for.
        """
        planned: dict[str, Compressor] = {}
        for name, rank in RankPlanner(self, layers, rest_bytes).ranks().items():
            layer = layers[name]
            if rank is None:
                continue
            if not 1 <= rank <= min(layer.shape):
                raise RecipeError(
                    f"{rank} is above min(out, in) of {name} {layer.shape}; give {min(layer.shape)} or less, "
                    "or --exclude it",
                    option="rank",
                )
            planned[name] = self.stored_as(layer)._at(rank)
        if not planned:
            raise RecipeError("the plan leaves every layer dense; keep less", option="keep")
        return planned

    def _at(self, rank: int) -> Self:
        """The method at one rank, with nothing left to plan."""
        return replace(
            self,
            rank=rank,
            ranks=(),
            keep=None,
            budget=None,
            allocation=None,
            importance=None,
            floor=None,
            rank_multiple=None,
        )

    def trials(
        self, weights: Sequence[Tensor], surveys: Sequence[Survey], stats: Sequence[Statistics]
    ) -> list[Trial]:
        """Trials of each weight: fp32 factors at the share of bytes that `keep` says, or at a lower lossless rank."""
        return [self._trial(*each) for each in zip(weights, surveys, stats, strict=True)]

    def _trial(self, weight_oi: Tensor, survey: Survey, stats: Statistics) -> Trial:
        o, i = weight_oi.shape
        tail = survey.spectrum.square().flip(0).cumsum(0).flip(0)
        if float(tail[0]) == 0:
            raise LayerError("its weight is zero, so no error can be measured; --exclude it")
        rank = max(1, int(self.resolved_keep * o * i / (o + i)))
        while rank > 1 and float(tail[rank]) <= NOTHING * float(tail[0]):
            rank //= 2
        method = replace(
            self._at(rank),
            factor_dtype=FactorDtype.FLOAT32,
            factor_quantizer=None,
            target=FitTarget.LAYER,
        )
        [form] = method.compress([weight_oi], stats)
        return Trial(form, max(float(tail[rank]), NOTHING * float(tail[0])))

    def predicted_error(self, layer: LayerShape) -> float | None:
        """The relative output error that the surveyed spectrum predicts for a planned layer; None before a survey."""
        if layer.survey is None or self.rank is None:
            return None
        energies = layer.survey.spectrum.square()
        total = float(energies.sum())
        return float((energies[self.rank :].sum() / total).sqrt()) if total > 0 else 0.0

    def compress(self, weights: Sequence[Tensor], stats: Statistics) -> list[Form]:
        """Factors for all weights: one metric for all of them, one eigenproblem each."""
        metric = self.measure(weights, stats)
        return [self.fit(target, metric, stats) for target in self.targets(weights, stats)]

    def targets(self, weights: Sequence[Tensor], stats: Statistics) -> list[Tensor]:
        """The dense weights (o, i) that the factors approximate; their best factors are the best for the outputs."""
        if self.target is FitTarget.LAYER:
            return list(weights)
        return towards_original(
            weights, stats, lambda: self.target_moments(stats), key=self.shifts_outputs
        )

    def target_moments(self, stats: Statistics) -> tuple[Tensor, Tensor]:
        """E[x' x'^T] and E[x x'^T], (i, i) each, fp64, around the point that the method fits around."""
        return stats[Gram].mean_ii(), stats[CrossGram].mean_ij()

    def fit(self, weight: Tensor, metric: Metric, stats: Statistics) -> LowRank | Product:
        """The best factors of one weight (o, i), in the dtype or codes in which they are stored."""
        rank = self.rank or 0
        if self.factor_quantizer is not None:
            return quantised_low_rank(weight, metric, rank, self.factor_quantizer, stats)
        return best_low_rank(weight, metric, rank, self.storage)

    @abstractmethod
    def measure(self, weights: Sequence[Tensor], stats: Statistics) -> Metric:
        """The metric of errors of these weights (o, i), which share their input."""
