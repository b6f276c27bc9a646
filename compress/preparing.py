"""From a recipe to everything a run needs, refusing on the way what can be refused before work.

Cheap checks come first: the output folder, the names of exports and tasks, the device; then the model, the plan, the
text, the disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel

from calibration.data import Split, Tokens, load_tokens, parse_source
from calibration.skeleton import PartLoader, build_skeleton
from calibration.stats import STATISTICS, Gram, Statistic
from calibration.store import Store
from calibration.walk import Propagate
from compress.checkpoint import Reader
from compress.compressing import Progress
from compress.errors import RecipeError
from compress.exports import EXPORTS
from compress.models import SourceModel, resolve_model
from compress.planning import Plan, make_plan, refuse_full_disk
from compress.recipe import Dtype, Recipe, StatisticsMode
from eval.catalog import check_tasks
from eval.wheels import cache_root


@dataclass(frozen=True)
class Prepared:
    """What `run`, `plan` and `calibrate` start from."""

    recipe: Recipe
    source: SourceModel
    reader: Reader
    config: PretrainedConfig
    tokenizer: Any
    model: PreTrainedModel
    """The skeleton."""
    loader: PartLoader
    plan: Plan
    tokens: Tokens
    device: torch.device
    dtype: torch.dtype
    needs: frozenset[type[Statistic]]

    def store(self) -> Store | None:
        """Where this job's statistics are kept, if the recipe wants them kept."""
        if self.recipe.statistics is StatisticsMode.OFF:
            return None
        settings = {
            "model": self.reader.fingerprint(),
            "tokens": self.tokens.fingerprint(),
            "dtype": str(self.dtype),
            "device": self.device.type,
            "batch_size": self.recipe.batch_size,
            "propagate": self.recipe.propagate.value,
            "statistics": sorted(kind.name for kind in self.needs),
            "layers": [layer.name for layer in self.plan.layers],
            "torch": torch.__version__,
        }
        if self.recipe.propagate is not Propagate.NONE:
            # What a block sees depends on how those before it were compressed.
            settings["method"] = {layer.name: repr(layer.compressor) for layer in self.plan.layers}
        return Store(cache_root() / "statistics", settings)


def prepare(recipe: Recipe, progress: Progress) -> Prepared:
    """Resolve a recipe.

    Raises RecipeError, CheckpointError, InputError or EvalError, naming the option and what would be right.
    """
    refuse_early(recipe)
    device = settle_device(recipe.device)
    source = resolve_model(recipe.model, None, progress=progress)
    reader = Reader(source.folder)
    config = AutoConfig.from_pretrained(source.folder)
    dtype = settle_dtype(recipe.dtype, config)
    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    model = build_skeleton(config, dtype)
    loader = PartLoader(model, reader)
    plan = make_plan(model, loader, reader, recipe.method, (recipe.include, recipe.exclude))
    specs = {layer.name: layer.shape for layer in plan.layers}
    for name in recipe.export:
        EXPORTS[name].check({layer.name: layer.compressor for layer in plan.layers}, specs)
    tokens = load_tokens(
        [parse_source(text) for text in recipe.calibration],
        tokenizer,
        n_sequences=recipe.samples,
        seq_len=recipe.seq_len,
        seed=recipe.seed,
        split=Split.CALIBRATION,
    )
    return Prepared(
        recipe,
        source,
        reader,
        config,
        tokenizer,
        model,
        loader,
        plan,
        tokens,
        device,
        dtype,
        _needs(recipe),
    )


def refuse_early(recipe: Recipe) -> None:
    """Raises for what the recipe alone can tell."""
    if recipe.folder.exists():
        raise RecipeError(f"out: {recipe.folder} exists; name a new folder, or remove it")
    unknown = [name for name in recipe.export if name not in EXPORTS]
    if unknown:
        raise RecipeError(f"export: {unknown[0]!r} is no format; there are {', '.join(EXPORTS)}")
    if recipe.tasks:
        check_tasks(recipe.tasks, recipe.include_path)


def refuse_small_disks(prepared: Prepared) -> None:
    """Raises RecipeError if the output or the statistics do not fit their disks."""
    exports = {"native": prepared.plan.bytes_after, "gptq": prepared.plan.bytes_after}
    needed = sum(exports.get(name, prepared.plan.bytes_before) for name in prepared.recipe.export)
    refuse_full_disk(prepared.recipe.folder.absolute().parent, needed, "out")
    store = prepared.store()
    if store is not None and not store.complete:
        refuse_full_disk(
            store.folder, prepared.plan.statistics_bytes, "statistics (or --statistics off)"
        )


def settle_device(name: str) -> torch.device:
    """The device that a name means. Raises RecipeError if this machine does not have it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).partition("\n")[0]
        raise RecipeError(
            f"device: {name!r} can't be used here ({first}); cpu always can"
        ) from error
    return device


def settle_dtype(dtype: Dtype, config: PretrainedConfig) -> torch.dtype:
    """The dtype to compute in: the one asked for, else the checkpoint's own, else float32."""
    if dtype is not Dtype.AUTO:
        return getattr(torch, dtype.value)  # type: ignore[no-any-return]
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def _needs(recipe: Recipe) -> frozenset[type[Statistic]]:
    """The original model's statistics serve any method, so all are kept; others serve this method only."""
    if recipe.propagate is Propagate.NONE:
        return frozenset(STATISTICS.values())
    return recipe.method.needs | {Gram}


def rest_folder(out: Path, marker: str) -> Path:
    """The sibling of an output folder in which work happens."""
    return out.parent / f".{out.name}.{marker}"
