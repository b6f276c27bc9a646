"""A look at every layer before the plan: the spectra by which methods spread ranks over a model.

One walk through the original model, its statistics saved and found again; for spectra of the weights alone, no text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from calibration.statistics.base import GradientStatistic, Statistic
from calibration.statistics.collection import Statistics
from calibration.walk import Block, SharedInput
from compress.callbacks import Progress
from compress.errors import LayerError
from compress.families.base import Survey, Trial
from compress.families.correction import Correction
from compress.models.layers import refuse_not_finite, weight_oi
from compress.prepare.prepare import Prepared, replanned
from compress.survey.divergence import Divergences
from compress.survey.gradients import gradients_of_block, with_gradients
from compress.survey.original_walk import joined_blocks, original_blocks, plain_blocks
from compress.survey.residuals import block_residuals


def surveyed(prepared: Prepared, progress: Progress) -> Prepared:
    """The job with its plan settled by what the method's survey finds; itself if the method wants none.

    Raises LayerError naming the layer whose spectrum cannot be had, RecipeError, InputError or OSError.
    """
    wanted = prepared.recipe.method.surveys
    if wanted is None:
        return prepared
    if GradientStatistic.among(wanted):
        prepared = with_gradients(prepared, progress)
    method = prepared.recipe.method
    divergences = Divergences(prepared) if method.weighs_by_divergence else None
    surveys: dict[str, Survey] = {}
    lost: dict[str, float] = {}
    n_blocks = prepared.plan.n_blocks
    for block, groups in _blocks(prepared, wanted - GradientStatistic.among(wanted)):
        progress("survey", block.index, n_blocks)
        refuse_not_finite(block.module, block.name)
        corrections = isinstance(method, Correction) and method.surveys_residuals
        look = block_residuals if corrections else _block_survey
        found, trials = look(prepared, block, groups, gradients_of_block(prepared, block.index))
        surveys |= found
        if divergences is not None:
            lost |= {name: trial.lost for name, trial in trials.items()}
            divergences.through(block, {name: trial.form for name, trial in trials.items()})
    progress("survey", n_blocks, n_blocks)
    if divergences is not None:
        for name, kl in divergences.measured(progress).items():
            surveys[name] = replace(surveys[name], cost=max(kl, 0.0) / lost[name])
    return replanned(prepared, surveys)


def _block_survey(
    prepared: Prepared,
    block: Block,
    groups: list[SharedInput],
    gradients: Mapping[str, Statistics],
) -> tuple[dict[str, Survey], dict[str, Trial]]:
    """Surveys of a block's layers by name, and trials if the method weighs by divergence. Uses up the groups."""
    method = prepared.recipe.method
    surveys: dict[str, Survey] = {}
    trials: dict[str, Trial] = {}
    while groups:
        shared = groups.pop(0)
        parts = [shared.names] if method.joins_layers else [(name,) for name in shared.names]
        for names in parts:
            weights = [weight_oi(block.layers[name]).float() for name in names]
            stats = [shared.stats.joined(gradients.get(name, Statistics())) for name in names]
            try:
                found = method.survey(weights, stats)
                tried = method.trials(weights, found, stats) if method.weighs_by_divergence else []
            except LayerError as error:
                raise LayerError(f"layer {', '.join(names)}: {error}") from error
            surveys |= {
                name: replace(survey, reads=shared.names[0])
                for name, survey in zip(names, found, strict=True)
            }
            trials |= dict(zip(names, tried, strict=False))
        shared.stats.forget()
    return surveys, trials


def _blocks(
    prepared: Prepared, wanted: frozenset[type[Statistic]]
) -> Iterator[tuple[Block, list[SharedInput]]]:
    """Each block with the statistics of inputs that a survey reads; if it reads none, each layer alone, or joined."""
    if wanted:
        yield from original_blocks(prepared, prepared.original_store())
        return
    if prepared.recipe.method.joins_layers:
        yield from joined_blocks(prepared)
        return
    for block in plain_blocks(prepared):
        names = (name for name in block.layers if name in prepared.plan.selected)
        yield block, [SharedInput((name,), Statistics()) for name in names]
