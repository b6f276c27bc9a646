"""The walk through the original model, whose statistics serve any method: observed once, saved, found again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from calibration.propagation import Propagate
from calibration.skeleton import decoder_blocks
from calibration.store import Store
from calibration.stream import Stream
from calibration.text.data import Tokens
from calibration.walk import Block, SharedInput, walk
from compress.prepare.prepare import Prepared
from compress.prepare.texts import few_tokens


def original_blocks(
    prepared: Prepared, store: Store | None
) -> Iterator[tuple[Block, list[SharedInput]]]:
    """Every block, loaded, with the statistics of its selected layers' inputs: from the store, or observed and saved.

    Raises InputError or OSError; statistics of an unfinished walk are removed.
    """
    if store is not None and store.complete:
        for block in plain_blocks(prepared):
            yield block, store.load(block.index, prepared.device)
        return
    names = frozenset(prepared.plan.selected)
    kinds = prepared.original_needs
    try:
        for block in _walk(prepared, list(prepared.tokens.batches(prepared.recipe.batch_size))):
            shared = block.observe(names, kinds)
            if store is not None:
                store.save(block.index, shared)
            yield block, shared
        if store is not None:
            store.finish()
    finally:
        if store is not None:
            store.discard()


def joined_blocks(prepared: Prepared) -> Iterator[tuple[Block, list[SharedInput]]]:
    """Every block, loaded, and which of its selected layers read the same tensor: a few tokens tell."""
    names = frozenset(prepared.plan.selected)
    for block in _walk(prepared, [few_tokens(prepared.tokens)]):
        yield block, block.observe(names, frozenset())


def plain_blocks(prepared: Prepared) -> Iterator[Block]:
    """Every block, loaded; no text is read."""
    yield from _walk(prepared, [])


def _walk(prepared: Prepared, batches: Sequence[Tokens]) -> Iterator[Block]:
    prefix, blocks = decoder_blocks(prepared.model)
    prepared.loader.load_outside(f"{prefix}.", prepared.device)
    stream = Stream(prepared.model, blocks, batches)
    prepared.loader.unload_outside(f"{prefix}.")
    yield from walk(
        stream,
        prepared.loader,
        propagate=Propagate.NONE,
        device=prepared.device,
        routing=prepared.recipe.moe,
    )
