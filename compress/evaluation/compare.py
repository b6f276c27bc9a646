"""The original and an export of it, read back from disk, on the same text and the same items."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic.dataclasses import dataclass as record
from transformers import PreTrainedModel

from calibration.heads import Head
from calibration.outputs import head_of
from calibration.text.data import Tokens
from compress.bases import open_original
from compress.callbacks import Progress
from compress.config.recipe import Recipe
from compress.exports.load import load_export, load_original, stored_in, unpack
from compress.forms.registered import FORMS
from compress.models.devices import settle_device, settle_dtype
from compress.models.model_config import read_config
from compress.models.resolve import load_tokenizer, resolve_model
from compress.prepare.prepare import Prepared
from compress.prepare.texts import (
    framing_for,
    held_out_windows,
    prefix_in,
    prefix_of,
    refuse_long_sequences,
    refuse_unknown_tokens,
    settled_for,
)
from compress.report.report import Comparison
from compress.report.strict import STRICT
from eval.fidelity import compare
from eval.footprint import measure, peak_memory
from eval.harness import Settings, run_tasks
from eval.samples import sample
from eval.scores import Fidelity, Footprint, Scores, TaskScore
from eval.whole import Example, compare_whole


@dataclass(frozen=True)
class Original:
    """The model that an export is measured against."""

    folder: Path
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    windows: Tokens | None
    """Held-out text, if fidelity is wanted."""
    head: Head
    prefix: tuple[int, ...] = ()
    """Token ids that the prompts of samples begin with."""


@record(frozen=True, config=STRICT)
class OriginalScores:
    """Footprint and task scores of an original, which are the same whatever is compared with it."""

    footprint: Footprint
    tasks: tuple[TaskScore, ...]


def original_of(prepared: Prepared) -> Original:
    """The source of a run."""
    return Original(
        prepared.source.folder,
        prepared.tokenizer,
        prepared.device,
        prepared.dtype,
        prepared.windows,
        head_of(prepared.config) or Head.NEXT_TOKEN,
        prefix_of(prepared.recipe, prepared.tokenizer, framing_for(prepared.config)),
    )


def resolve_original(recipe: Recipe, progress: Progress) -> tuple[Original, Recipe]:
    """The model that a recipe names, with its held-out text, and the recipe settled for it.

    Raises what `resolve_model` raises, and RecipeError for text that is too short, or that the model cannot read.
    """
    folder = resolve_model(recipe.model, None, progress=progress).folder
    config = read_config(folder)
    recipe = settled_for(recipe, config)
    refuse_long_sequences(recipe, config)
    tokenizer = load_tokenizer(folder)
    prefix = prefix_of(recipe, tokenizer, framing_for(config))
    windows = held_out_windows(recipe, tokenizer, framing_for(config))
    if windows is not None:
        refuse_unknown_tokens(windows, tokenizer, config, "eval_text")
    original = Original(
        folder,
        tokenizer,
        settle_device(recipe.device),
        settle_dtype(recipe.dtype, config),
        windows,
        head_of(config) or Head.NEXT_TOKEN,
        prefix,
    )
    return original, recipe


def asks_for_evaluation(recipe: Recipe) -> bool:
    """Whether a recipe wants text or tasks; without either, speed and memory are not measured."""
    return bool(recipe.eval_windows or recipe.tasks)


def score_original(original: Original, recipe: Recipe, progress: Progress) -> OriginalScores:
    """Measure the footprint of an original, and the tasks that the recipe asks for. Raises as `compare_with`."""
    model = load_original(original.folder, original.dtype, original.device)
    n_parameters = n_parameters_of(original.folder)
    footprint = _footprint(original, original.folder, model, n_parameters, progress)
    if not original.head.writes_text:
        return OriginalScores(footprint, ())
    return OriginalScores(footprint, _tasks(model, original, recipe, progress))


def compare_with(
    original: Original,
    export: Path,
    recipe: Recipe,
    progress: Progress,
    known: OriginalScores | None = None,
) -> Comparison:
    """Footprints of both, and the fidelity and tasks that the recipe asks for.

    Quality is measured on the export with its codes expanded once, which changes no output; speed and memory are
    measured on the export as it loads, with its codes packed. `known`: what `score_original` found with an equal
    recipe, which is then not measured again. Raises EvalError, InputError or CheckpointError.
    """
    before = load_original(original.folder, original.dtype, original.device)
    after = load_export(export, original.dtype, original.device)
    n_parameters = n_parameters_of(original.folder)
    footprints = (
        _footprint(original, original.folder, before, n_parameters, progress)
        if known is None
        else known.footprint,
        _footprint(original, export, after, n_parameters, progress),
    )
    unpack(after)
    text = None if original.windows is None else original.windows.fingerprint()
    if not original.head.writes_text:
        scores = _whole(original.windows, before, after, progress)
        return Comparison(
            before=Scores(None, scores[0], footprints[0]),
            after=Scores(None, scores[1], footprints[1]),
            text_sha256=text,
        )
    fidelity = _fidelity(original.windows, before, after, progress)
    tasks = _tasks(before, original, recipe, progress) if known is None else known.tasks
    return Comparison(
        before=Scores(fidelity[0], tasks, footprints[0]),
        after=Scores(fidelity[1], _tasks(after, original, recipe, progress), footprints[1]),
        samples=sample(
            before, after, original.tokenizer, prefix=original.prefix, progress=progress
        ),
        text_sha256=text,
        prefix=None if original.windows is None else prefix_in(original.windows),
    )


def n_parameters_of(folder: Path) -> int:
    """Elements of the tensors that an original's model has."""
    tensors = open_original(folder)
    return sum(math.prod(tensors.shape(name)) for name in tensors)


def _footprint(
    original: Original, folder: Path, model: PreTrainedModel, n_parameters: int, progress: Progress
) -> Footprint:
    # Loaders of one module for both, so that what it imports weighs the same in both figures.
    kind = "load_original" if folder == original.folder else "load_export"
    loader = f"compress.exports.load:{kind}"
    dtype = str(original.dtype).removeprefix("torch.")
    peak = peak_memory(
        folder,
        loader=loader,
        dtype=dtype,
        device=str(original.device),
        imports=sorted(FORMS.modules_of_the_program()),
    )
    on_accelerator = peak.device_bytes if peak.device_bytes is not None else peak.peak_bytes
    stored = stored_in(folder)
    return measure(stored, model, n_parameters, peak_rss_bytes=on_accelerator, progress=progress)


def _fidelity(
    windows: Tokens | None, before: PreTrainedModel, after: PreTrainedModel, progress: Progress
) -> tuple[Fidelity | None, Fidelity | None]:
    if windows is None:
        return None, None
    batches = list(windows.batches(2))
    return compare(
        before,
        after,
        [batch.input_ids for batch in batches],
        ignored=_ignored(batches),
        progress=progress,
    )


def _ignored(batches: list[Tokens]) -> list[torch.Tensor] | None:
    """The special tokens in each batch that are not the text's own; None if there are none."""
    masks = [batch.inserted for batch in batches if batch.inserted is not None]
    return masks or None


def _whole(
    windows: Tokens | None, before: PreTrainedModel, after: PreTrainedModel, progress: Progress
) -> tuple[tuple[TaskScore, ...], tuple[TaskScore, ...]]:
    if windows is None:
        return (), ()
    examples = []
    for one in windows.batches(1):
        seen = slice(None) if one.attention_mask is None else one.attention_mask[0].bool()
        label = None if one.labels is None else int(one.labels[0])
        examples.append(Example(one.input_ids[:, seen], label))
    return compare_whole(before, after, examples, progress=progress)


def _tasks(
    model: PreTrainedModel, original: Original, recipe: Recipe, progress: Progress
) -> tuple[TaskScore, ...]:
    if not recipe.tasks:
        return ()
    settings = Settings(
        limit=recipe.limit,
        batch_size=recipe.batch_size,
        include_path=recipe.include_path,
        seed=recipe.seed,
    )
    return tuple(run_tasks(model, original.tokenizer, recipe.tasks, settings, progress=progress))
