"""Statistics of the original model's gradients for the methods that weigh errors by them: one backward pass, saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from calibration.backward import Backward
from calibration.skeleton import decoder_blocks
from calibration.statistics import always_collected, load_statistics
from calibration.statistics.base import GradientStatistic
from calibration.statistics.collection import Statistics
from calibration.store import Store
from calibration.stream import Stream
from calibration.walk import SharedInput
from compress.callbacks import Progress
from compress.config.choices import StatisticsMode
from compress.prepare.prepare import Gradients, Prepared
from eval.wheels import cache_root


def with_gradients(prepared: Prepared, progress: Progress) -> Prepared:
    """The job with all that its method reads of gradients: found, or collected and saved; itself if it reads nothing.

    Raises InputError or OSError; what an unfinished pass left is removed.
    """
    method = prepared.recipe.method
    asked = GradientStatistic.among(method.needs) | GradientStatistic.among(method.surveys)
    if not asked or prepared.gradients is not None:
        return prepared
    scratch = None
    if prepared.recipe.statistics is StatisticsMode.OFF:
        scratch = TemporaryDirectory(prefix="compress-gradients-")
    root = Path(scratch.name) if scratch else cache_root() / "statistics"
    kinds = asked | GradientStatistic.among(always_collected())
    every = GradientStatistic.among(load_statistics().values())
    larger = [kinds | {kind} for kind in sorted(every - kinds, key=lambda kind: kind.name)]
    stores = [prepared.gradient_store(each, root) for each in (kinds, *larger)]
    store = next((each for each in stores if each.complete), stores[0])
    if not store.complete:
        _collect(prepared, kinds, store, progress)
    return replace(prepared, gradients=Gradients(store, scratch))


def gradients_of_block(prepared: Prepared, block: int) -> Mapping[str, Statistics]:
    """Statistics of a block's gradients, by layer; none if the method reads none."""
    if prepared.gradients is None:
        return {}
    found = prepared.gradients.store.load(block, prepared.device)
    return {shared.names[0]: shared.stats for shared in found}


def _collect(
    prepared: Prepared,
    kinds: frozenset[type[GradientStatistic]],
    store: Store,
    progress: Progress,
) -> None:
    prefix, blocks = decoder_blocks(prepared.model)
    prepared.loader.load_outside(f"{prefix}.", prepared.device)
    stream = Stream(prepared.model, blocks, list(prepared.tokens.singles()))
    prepared.loader.unload_outside(f"{prefix}.")
    names = frozenset(prepared.plan.selected)
    n_blocks = prepared.plan.n_blocks
    way = Backward(stream, prepared.loader, prepared.device)
    try:
        for index in way.there():
            progress("forward", index + 1, n_blocks)
        progress("gradients", 0, n_blocks)
        for done, (index, found) in enumerate(way.back(names, kinds), start=1):
            store.save(index, [SharedInput((name,), stats) for name, stats in found.items()])
            progress("gradients", done, n_blocks)
        store.finish()
    finally:
        store.discard()
