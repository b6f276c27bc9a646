"""Preparation: makes everything a run needs out of its recipe, and refuses all that can be refused before work.

Cheap checks come first: the names of exports and tasks, the device; then the model, the plan, the texts. Whether the
output folder can be made and the disks suffice is asked by `output_place` and `refuse_small_disks`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from calibration.experts.module import experts_in
from calibration.experts.routing import Routing
from calibration.held_out import EVERY
from calibration.propagation import Propagate
from calibration.skeleton import PartLoader, open_parts
from calibration.statistics import always_collected
from calibration.statistics.base import (
    GradientStatistic,
    HeldOutStatistic,
    ObservedStatistic,
    PairStatistic,
    Statistic,
)
from calibration.statistics.gram import Gram
from calibration.store import Store
from calibration.text.data import Tokens
from calibration.uncalled import uncalled_layers
from compress.bases import open_original
from compress.callbacks import Progress
from compress.config.choices import StatisticsMode
from compress.config.recipe import AUTO, Recipe
from compress.engines.asked import refuse_engines
from compress.errors import RecipeError
from compress.exports import EXPORTS, Use, formats_for
from compress.exports.storage import AdapterRanks
from compress.families.base import Survey
from compress.families.correction import Correction
from compress.models.checkpoint import Tensors
from compress.models.devices import settle_device, settle_dtype
from compress.models.model_config import read_config
from compress.models.resolve import SourceModel, load_tokenizer, resolve_model
from compress.models.unstacked import unstacked
from compress.planning.layer import padded
from compress.planning.make import refuse_full_disk
from compress.planning.plan import Plan
from compress.prepare.texts import (
    calibration_text,
    few_tokens,
    framing_for,
    held_out_windows,
    prefix_of,
    refuse_long_sequences,
    refuse_unknown_tokens,
    settled_for,
)
from compress.report.environment import toolkit_version
from compress.subjects.opening import opening
from compress.subjects.subject import Original, Subject
from eval.catalog import check_tasks
from eval.wheels import cache_root

SCRATCH_BYTES = 2 << 30
"""The most that a writer holds beside its finished shards: the shard at hand."""


@dataclass(frozen=True)
class Gradients:
    """Statistics of the original model's gradients, complete, on disk."""

    store: Store
    scratch: TemporaryDirectory[str] | None
    """The folder that goes with this object, if they are not to be kept."""


@dataclass(frozen=True)
class Prepared:
    """Everything that `run`, `plan` and `calibrate` start from."""

    recipe: Recipe
    source: SourceModel
    reader: Tensors
    config: PretrainedConfig
    tokenizer: Any
    model: PreTrainedModel
    """The skeleton of the model, without weights."""
    loader: PartLoader
    subject: Subject
    """The thing that is compressed or corrected: this model, or a compressed checkpoint of it."""
    plan: Plan
    tokens: Tokens
    windows: Tokens | None
    """Held-out text for the evaluation, none of it padded; None if the recipe wants none."""
    device: torch.device
    dtype: torch.dtype
    needs: frozenset[type[Statistic]]
    """Statistics of inputs that the walk observes."""
    gradients: Gradients | None = None
    """Statistics of gradients that the method reads."""

    def original_store(self) -> Store | None:
        """The store of the original model's statistics; None if the recipe wants none kept."""
        recipe = replace(self.recipe, propagate=Propagate.NONE)
        return replace(self, recipe=recipe, needs=self.original_needs).store()

    @property
    def original_needs(self) -> frozenset[type[Statistic]]:
        """Statistics of inputs that a walk through the original model observes."""
        return _needs(replace(self.recipe, propagate=Propagate.NONE))

    def store(self) -> Store | None:
        """The store of this job's statistics; None if the recipe wants none kept."""
        if self.recipe.statistics is StatisticsMode.OFF:
            return None
        settings = {
            **self._settings(self.needs),
            **({"moe": self.recipe.moe.value} if self.has_experts else {}),
            "batch_size": self.recipe.batch_size,
            "propagate": self.recipe.propagate.value,
        }
        if self.recipe.propagate is not Propagate.NONE:
            # What a block sees depends on how those before it were compressed.
            settings["method"] = {layer.name: repr(layer.compressor) for layer in self.plan.layers}
        return Store(cache_root() / "statistics", settings)

    @property
    def has_experts(self) -> bool:
        """Whether the model has experts, whose statistics depend on `moe`."""
        return any(True for _ in experts_in(self.model))

    def gradient_store(self, kinds: frozenset[type[GradientStatistic]], root: Path) -> Store:
        """The store, below a root, of statistics of the original model's gradients."""
        return Store(root, {**self._settings(kinds), "pass": "backward"})

    def _settings(self, kinds: Iterable[type[Statistic]]) -> dict[str, Any]:
        """Everything that statistics of the original model depend on."""
        return {
            "toolkit": toolkit_version(),
            "transformers": transformers.__version__,
            "model": self.reader.fingerprint,
            "tokens": self.tokens.fingerprint(),
            "dtype": str(self.dtype),
            "device": self.device.type,
            "statistics": sorted(kind.identity() for kind in kinds),
            "layers": list(self.plan.selected),
            "torch": torch.__version__,
        }


def prepare(recipe: Recipe, progress: Progress) -> Prepared:
    """Resolve a recipe; the output folder and the disks are not checked.

    Raises RecipeError, CheckpointError, InputError or EvalError, naming the option and what would be right.
    """
    refuse_early(recipe)
    opened = opening(recipe).open()
    device = settle_device(recipe.device)
    source, whole = _resolved(recipe.model, progress)
    config = read_config(source.folder)
    recipe = settled_for(recipe, config)
    refuse_long_sequences(recipe, config)
    dtype = settle_dtype(recipe.dtype, config)
    tokenizer = load_tokenizer(source.folder)
    is_tied = getattr(config, "tie_word_embeddings", False)
    loader = open_parts(config, dtype, whole)
    _refuse_all_tokens(recipe, loader)
    if is_tied and not config.tie_word_embeddings:
        source = source.with_own_head()
    reader, uncalled = unstacked(loader), uncalled_layers(loader.model, loader, device)
    subject = opened(Original(source, reader, config, loader, uncalled))
    plan = subject.plan(recipe)
    prefix_of(recipe, tokenizer, framing_for(config))
    tokens = calibration_text(recipe, tokenizer, framing_for(config))
    windows = held_out_windows(recipe, tokenizer, framing_for(config))
    for option, text in (("calibration", tokens), ("eval_text", windows)):
        if text is not None:
            refuse_unknown_tokens(text, tokenizer, config, option)
    return Prepared(
        recipe,
        source,
        reader,
        config,
        tokenizer,
        loader.model,
        loader,
        subject.settled(recipe, few_tokens(tokens), device),
        _for_exports(plan, recipe),
        tokens,
        windows,
        device,
        dtype,
        _needs(recipe),
    )


def _resolved(spec: str, progress: Progress) -> tuple[SourceModel, Tensors]:
    """The model of a name, with what its tensors have to be remarked, and the tensors."""
    source = resolve_model(spec, None, progress=progress)
    reader = open_original(source.folder)
    return replace(source, notes=(*source.notes, *reader.notes)), reader


def _refuse_all_tokens(recipe: Recipe, loader: PartLoader) -> None:
    """Raises RecipeError if every token is to go through every expert, and the model multiplies most by 0 before."""
    scored = [path for path, module in loader.experts.items() if module.reads_scored]
    if recipe.moe is Routing.ALL and scored:
        raise RecipeError(
            f"all: {scored[0]} reads tokens multiplied by the router's score, which is 0 for all that are not sent to "
            "an expert; choose routed or pooled",
            option="moe",
        )


def replanned(prepared: Prepared, found: Mapping[str, Survey]) -> Prepared:
    """The job with the plan that its method makes of what a survey found. Raises RecipeError."""
    recipe = prepared.recipe
    return replace(prepared, plan=_for_exports(prepared.subject.plan(recipe, found), recipe))


def _for_exports(plan: Plan, recipe: Recipe) -> Plan:
    """The plan with the formats to write, and the ranks that adapters have."""
    layers = plan.layers
    if recipe.adapter_ranks is AdapterRanks.PADDED:
        layers = padded(layers)
    return replace(plan, layers=layers, exports=recipe.export)


def refuse_early(recipe: Recipe) -> None:
    """Raises for what the recipe alone can tell, the output folder aside."""
    refuse_unknown_exports(recipe.export, opening(recipe).use)
    refuse_engines(recipe.engines, recipe.export)
    _refuse_padding(recipe)
    if PairStatistic.among(recipe.method.needs) and recipe.propagate is not Propagate.BLOCK:
        raise RecipeError(
            "original fits layers to the original's outputs on inputs from the compressed blocks before "
            f"them, and with propagate {recipe.propagate} there are none of its kind; use --propagate block",
            option="method.target",
        )
    if recipe.method.blocks_at_once > 1 and recipe.propagate is Propagate.SUBLAYER:
        raise RecipeError(
            f"{recipe.method.blocks_at_once} blocks are compressed together, so none of their layers can "
            f"see what the layers before it became, as propagate sublayer wants; use --propagate block",
            option="method.share",
        )
    if HeldOutStatistic.among(recipe.method.needs) and recipe.samples < EVERY:
        raise RecipeError(
            f"every {EVERY}th sequence is kept aside, and samples {recipe.samples} are fewer; take "
            f"--samples {EVERY} or more, or --holdout none",
            option="method.holdout",
        )
    if recipe.tasks != (AUTO,):
        check_tasks(recipe.tasks, recipe.include_path)


def _refuse_padding(recipe: Recipe) -> None:
    """Raises RecipeError where ranks are to be padded, and no format that is written has a PEFT adapter."""
    if recipe.adapter_ranks is not AdapterRanks.PADDED:
        return
    holding = [name for name, kind in EXPORTS.items() if kind.traits.adapter is not None]
    if set(holding).isdisjoint(recipe.export):
        raise RecipeError(
            f"padded, but {', '.join(recipe.export)} has no PEFT adapter; formats that have one are "
            f"{', '.join(holding)}",
            option="adapter_ranks",
        )
    if not isinstance(recipe.method, Correction):
        raise RecipeError(
            f"padded, but {recipe.method.name} makes no corrections, and so no adapter; leave it out",
            option="adapter_ranks",
        )


def refuse_unknown_exports(names: Sequence[str], use: Use) -> None:
    """Raises RecipeError for a format that is not there, or that such a run does not write."""
    there = formats_for(use)
    wrong = next((name for name in names if name not in there), None)
    if wrong is None:
        return
    if wrong not in EXPORTS:
        raise RecipeError(
            f"{wrong!r} is no format; there are {', '.join(EXPORTS)}", option="export"
        )
    others = " and ".join(EXPORTS[wrong].traits.uses)
    raise RecipeError(
        f"{wrong} is written by runs {others}, not {use}; formats that are: {', '.join(there)}",
        option="export",
    )


def refuse_small_disks(prepared: Prepared) -> None:
    """Raises RecipeError if the output or the statistics do not fit their disks."""
    sizes = [prepared.plan.written_bytes(name) for name in prepared.recipe.export]
    needed = sum(sizes) + min(SCRATCH_BYTES, max(sizes))
    refuse_full_disk(prepared.recipe.folder.absolute().parent, needed, "out")
    refuse_small_statistics_disk(prepared)


def refuse_small_statistics_disk(prepared: Prepared) -> None:
    """Raises RecipeError if statistics are to be saved, or gradients to be kept for the run, and do not fit."""
    inputs, gradients = (
        prepared.plan.input_statistics_bytes,
        prepared.plan.gradient_statistics_bytes,
    )
    store = prepared.store()
    if store is None:
        if gradients:
            refuse_full_disk(Path(gettempdir()), gradients, "statistics of gradients (TMPDIR)")
    elif not store.complete:
        refuse_full_disk(store.folder, inputs + gradients, "statistics (or --statistics off)")


def _needs(recipe: Recipe) -> frozenset[type[Statistic]]:
    """Statistics that the method needs; of the original model also those that later runs may need."""
    inputs = ObservedStatistic.among(recipe.method.needs) | {Gram}
    if recipe.propagate is Propagate.NONE:
        return inputs | ObservedStatistic.among(always_collected())
    return inputs
