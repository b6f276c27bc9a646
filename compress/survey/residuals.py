"""The survey for a plan of low-rank corrections: spectra of what the base lost, and what rounding the factors costs.

Shapes: o = out_features, i = in_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from calibration.statistics.collection import Statistics
from calibration.walk import Block, SharedInput
from compress.errors import LayerError
from compress.families.base import Survey, Trial
from compress.families.correction import Correction
from compress.families.correction_options import FULL_BITS
from compress.families.correction_planner import remaining
from compress.families.importance import fisher_cost
from compress.families.low_rank import Metric, quantised_low_rank
from compress.forms.dense import Dense
from compress.models.layers import weight_oi
from compress.planning.groups import groups_of
from compress.prepare.prepare import Prepared
from compress.solvers.rank_allocation import Importance

PROBE_RANK = 32
"""The rank at which the cost of rounding is measured."""


def block_residuals(
    prepared: Prepared,
    block: Block,
    groups: list[SharedInput],
    gradients: Mapping[str, Statistics],
) -> tuple[dict[str, Survey], dict[str, Trial]]:
    """Surveys of a block's layers by name, and trials with the base alone. Uses up the groups. Raises LayerError."""
    planned = {layer.name: layer for layer in prepared.plan.layers}
    surveys: dict[str, Survey] = {}
    trials: dict[str, Trial] = {}
    while groups:
        shared = groups.pop(0)
        for group in groups_of([shared], planned, gradients):
            names = [layer.name for layer in group.layers]
            weights = [weight_oi(block.layers[name]).float() for name in names]
            try:
                residuals = prepared.subject.residuals(group.layers, weights, group.stats)
                for name, weight, residual in zip(names, weights, residuals, strict=True):
                    stats = shared.stats.joined(gradients.get(name, Statistics()))
                    survey = _surveyed(prepared, weight.double(), residual, stats)
                    surveys[name] = replace(survey, reads=shared.names[0])
                    if survey.residual > 0:
                        base = Dense((weight - residual).float())
                        trials[name] = Trial(base, survey.residual)
            except LayerError as error:
                raise LayerError(f"layer {', '.join(names)}: {error}") from error
        shared.stats.forget()
    return surveys, trials


def _surveyed(prepared: Prepared, weight: Tensor, residual: Tensor, stats: Statistics) -> Survey:
    assert isinstance(prepared.recipe.method, Correction)
    return survey_residual(prepared.recipe.method, weight, residual, stats)


def survey_residual(
    method: Correction, weight: Tensor, residual: Tensor, stats: Statistics
) -> Survey:
    """The survey of a weight and of its base's error, (o, i) each, fp64.

    Raises LayerError if it cannot be had.
    """
    metric = method.measure(residual, stats)
    energy = metric.energy(weight)
    survey = Survey(metric.spectrum(residual), energy=energy)
    cost = fisher_cost(method.resolved_importance, stats)
    if method.resolved_importance is Importance.RELATIVE:
        cost = 1 / energy if energy > 0 else 1.0
    fitted = method.fitted(stats)
    rounding = tuple(
        (bits, _rounding(method, residual, (metric, survey), bits, fitted))
        for bits in method.widths
        if bits < FULL_BITS
    )
    return replace(survey, cost=cost, rounding=rounding)


def _rounding(
    method: Correction, residual: Tensor, known: tuple[Metric, Survey], bits: int, stats: Statistics
) -> float:
    """The share of what a correction captures that rounding its factors loses, measured at one rank."""
    metric, survey = known
    rank = min(PROBE_RANK, *residual.shape)
    correction = quantised_low_rank(residual, metric, rank, method.rounding(bits), stats)
    tail = remaining(survey, rank, FULL_BITS)
    captured = survey.residual - tail
    lost = metric.energy(residual - correction.dense().double()) - tail
    return max(lost, 0.0) / captured if captured > 0 else 0.0
