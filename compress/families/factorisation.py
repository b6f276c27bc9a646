"""Methods that put two thin layers in the place of a weight: their options, and how ranks follow from bytes.

Shapes: o = out_features, i = in_features, r = rank. A weight of o i entries becomes r (o + i): it gets smaller below
the break-even rank, o i / (o + i).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from calibration.gradients import GradientEnergy
from calibration.stats import CrossGram, Gram, Statistic, Statistics
from compress.errors import LayerError, RecipeError
from compress.families.base import Compressor, LayerShape, Survey, Trial
from compress.families.budget import refuse_share
from compress.families.importance import fisher_cost
from compress.families.low_rank import (
    FactorDtype,
    Metric,
    best_low_rank,
    quantised_low_rank,
    settled_dtype,
)
from compress.families.quantiser import Quantiser
from compress.families.quantities import parse_bytes
from compress.families.rank_planner import RankPlanner, parse_rank
from compress.families.target import FitTarget, towards_original
from compress.forms.factorised import Form, LowRank, Product
from compress.solvers.rank_allocation import Allocation, Importance

FLOOR = 0.5
NOTHING = 1e-9
"""Share of a weight's energy that is as good as nothing."""


@dataclass(frozen=True, kw_only=True)
class Factorisation(Compressor, ABC):
    """Options of every method that replaces a weight by two factors."""

    keep: float = field(
        default=0.8,
        metadata={
            "help": "share of the compressed layers' bytes that is kept, above 0 and below 1"
        },
    )
    budget: str | None = field(
        default=None,
        metadata={"help": "bytes of the whole checkpoint (120MB); takes the place of --keep"},
    )
    rank: int | None = field(
        default=None, metadata={"help": "rank of every layer; takes the place of --keep"}
    )
    ranks: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "ranks of some layers, which the plan then leaves: PATTERN=96, PATTERN=dense; the last match counts"
        },
    )
    allocation: Allocation = field(
        default=Allocation.UNIFORM,
        metadata={"help": "how ranks are spread over the layers; all but uniform look at spectra"},
    )
    importance: Importance = field(
        default=Importance.RELATIVE,
        metadata={"help": "what a unit of a layer's error costs in by_type and spectrum plans"},
    )
    floor: float = field(
        default=FLOOR,
        metadata={
            "help": "share of the uniform rank below which a spectrum plan lets no layer fall"
        },
    )
    rank_multiple: int = field(
        default=8, metadata={"help": "ranks are multiples of it, which kernels like"}
    )
    factor_dtype: FactorDtype = field(
        default=FactorDtype.AUTO,
        metadata={"help": "dtype of the stored factors; auto: the weight's own"},
    )
    target: FitTarget = field(
        default=FitTarget.LAYER,
        metadata={
            "help": "outputs to fit: the weight's own, or the original model's (dense), from inputs as they have become"
        },
    )
    factor_quantizer: Quantiser | None = field(
        default=None, metadata={"help": "method that stores the factors in fewer bits"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_share(self.keep)
        if not 0 <= self.floor <= 1:
            raise RecipeError(f"method.floor: {self.floor} is no share between 0 and 1")
        self._refuse_idle()
        for entry in self.ranks:
            parse_rank(entry)
        if self.budget is not None:
            parse_bytes(self.budget, "method.budget")
        for name in ("rank", "rank_multiple"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"method.{name}: {value} is too small; 1 or more")

    def _refuse_idle(self) -> None:
        """Raises RecipeError for an option that this plan would not look at."""
        plans = {
            "importance": (Importance.RELATIVE, (Allocation.BY_TYPE, Allocation.SPECTRUM)),
            "floor": (FLOOR, (Allocation.SPECTRUM,)),
        }
        if self.rank is not None:
            spreads = {"budget": self.budget, "allocation": self.allocation}
            idle = [name for name in spreads if spreads[name] not in (None, Allocation.UNIFORM)]
            if idle:
                raise RecipeError(
                    f"method.rank: {self.rank} is one rank for every layer, so {idle[0]} {spreads[idle[0]]} would "
                    "do nothing; give one of the two"
                )
        for name, (default, serving) in plans.items():
            value = getattr(self, name)
            if value != default and self.allocation not in serving:
                raise RecipeError(
                    f"method.{name}: {value} does nothing in a {self.allocation} plan; "
                    f"it serves --allocation {' or '.join(serving)}"
                )

    @property
    def surveys(self) -> frozenset[type[Statistic]] | None:
        """What the metric is made of, if the plan compares spectra."""
        if self.rank is not None or self.allocation is Allocation.UNIFORM:
            return None
        if self.importance is Importance.FISHER:
            return self.metric_needs | {GradientEnergy}
        # Forms are made for the measurement, so all that this takes.
        return self.needs - {CrossGram} if self.importance is Importance.KL else self.metric_needs

    @property
    def metric_needs(self) -> frozenset[type[Statistic]]:
        """Statistics that `measure` reads."""
        return frozenset({Gram})

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """What the metric is made of, and what the factors' quantiser reads."""
        quantizer = self.factor_quantizer.needs if self.factor_quantizer else frozenset()
        cross = {CrossGram} if self.target is FitTarget.ORIGINAL else set()
        return self.metric_needs | {Gram} | quantizer | cross

    @property
    def weighs_by_divergence(self) -> bool:
        """Where errors cost what they were measured to do."""
        return self.surveys is not None and self.importance is Importance.KL

    def survey(self, weights: Sequence[Tensor], stats: Sequence[Statistics]) -> list[Survey]:
        """Singular values of each weight in the metric, and what the loss thinks of an output."""
        return [self._surveyed(*each) for each in zip(weights, stats, strict=True)]

    def _surveyed(self, weight_oi: Tensor, stats: Statistics) -> Survey:
        spectrum = self.measure([weight_oi], stats).spectrum(weight_oi)
        return Survey(spectrum, fisher_cost(self.importance, stats))

    def plan(self, layers: Mapping[str, LayerShape], rest_bytes: int = 0) -> dict[str, Compressor]:
        """Settle each layer's rank and dtype. Raises RecipeError naming what gets no rank, or does not pay for any."""
        planned: dict[str, Compressor] = {}
        for name, rank in RankPlanner(self, layers, rest_bytes).ranks().items():
            layer = layers[name]
            if rank is None:
                continue
            if not 1 <= rank <= min(layer.shape):
                raise RecipeError(
                    f"method.rank: {rank} is above min(out, in) of {name} {layer.shape}; at most {min(layer.shape)}, "
                    "or --exclude it"
                )
            planned[name] = self.stored_as(layer)._at(rank)
        if not planned:
            raise RecipeError("method.keep: the plan leaves every layer dense; keep less")
        return planned

    def stored_as(self, layer: LayerShape) -> Self:
        """With the dtype of this layer's factors settled, and their groups if they are quantised."""
        dtype = settled_dtype(self.factor_dtype, layer.dtype, "factor_dtype")
        quantizer = self.factor_quantizer.for_factors() if self.factor_quantizer else None
        return replace(self, factor_dtype=dtype, factor_quantizer=quantizer)

    def _at(self, rank: int) -> Self:
        """With nothing left to plan."""
        return replace(
            self,
            rank=rank,
            ranks=(),
            budget=None,
            allocation=Allocation.UNIFORM,
            importance=Importance.RELATIVE,
            floor=FLOOR,
        )

    def trials(
        self, weights: Sequence[Tensor], surveys: Sequence[Survey], stats: Sequence[Statistics]
    ) -> list[Trial]:
        """At the share of its bytes that `keep` says, the factors in fp32; at a lower rank, if that loses nothing."""
        return [self._trial(*each) for each in zip(weights, surveys, stats, strict=True)]

    def _trial(self, weight_oi: Tensor, survey: Survey, stats: Statistics) -> Trial:
        o, i = weight_oi.shape
        tail = survey.spectrum.square().flip(0).cumsum(0).flip(0)
        if float(tail[0]) == 0:
            raise LayerError("it is zero, so no error of it can be measured; --exclude it")
        rank = max(1, int(self.keep * o * i / (o + i)))
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
        """The relative output error that the spectrum tells, of a planned layer; None before a survey."""
        if layer.survey is None or self.rank is None:
            return None
        energies = layer.survey.spectrum.square()
        total = float(energies.sum())
        return float((energies[self.rank :].sum() / total).sqrt()) if total > 0 else 0.0

    @property
    def storage(self) -> torch.dtype:
        """The torch dtype of the stored factors, once planned."""
        dtype: torch.dtype = getattr(torch, self.factor_dtype.value)
        return dtype

    def compress(self, weights: Sequence[Tensor], stats: Statistics) -> list[Form]:
        """One metric for all of them, one eigenproblem each."""
        metric = self.measure(weights, stats)
        return [self.fit(target, metric, stats) for target in self.targets(weights, stats)]

    def targets(self, weights: Sequence[Tensor], stats: Statistics) -> list[Tensor]:
        """The dense weights (o, i) whose factors are wanted: the best factors of these are the best for the outputs."""
        if self.target is FitTarget.LAYER:
            return list(weights)
        return towards_original(
            weights, stats, lambda: self.target_moments(stats), key=self.shifts_outputs
        )

    def target_moments(self, stats: Statistics) -> tuple[Tensor, Tensor]:
        """E[x' x'^T] and E[x x'^T], around what the method fits around: (i, i) each, fp64."""
        return stats[Gram].mean_ii(), stats[CrossGram].mean_ij()

    def fit(self, weight: Tensor, metric: Metric, stats: Statistics) -> LowRank | Product:
        """The best factors of one weight (o, i), as they are stored."""
        rank = self.rank or 0
        if self.factor_quantizer is not None:
            return quantised_low_rank(weight, metric, rank, self.factor_quantizer, stats)
        return best_low_rank(weight, metric, rank, self.storage)

    @abstractmethod
    def measure(self, weights: Sequence[Tensor], stats: Statistics) -> Metric:
        """What an error of these weights (o, i), which share their input, costs."""

    def overhead(self, shape: tuple[int, int]) -> int:  # noqa: ARG002  (for methods that have one)
        """Numbers that a factorised weight (o, i) stores besides the factors."""
        return 0

    def planned_bytes(self, shape: tuple[int, int]) -> int:
        """Two factors, and what the method adds."""
        return self.factor_bytes(shape, self.rank or 0)

    def factor_bytes(self, shape: tuple[int, int], rank: int) -> int:
        """The same at another rank, once dtype and groups are settled."""
        added = self.overhead(shape) * self.storage.itemsize
        if self.factor_quantizer is None:
            return rank * sum(shape) * self.storage.itemsize + added
        up, down = (shape[0], rank), (rank, shape[1])
        return (
            self.factor_quantizer.planned_bytes(up)
            + self.factor_quantizer.planned_bytes(down)
            + added
        )
