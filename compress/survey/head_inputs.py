"""The Gram matrix of the inputs of a model's head: one pass of some calibration text through the original."""

from __future__ import annotations

import torch
from torch import Tensor

from calibration.propagation import Propagate
from calibration.skeleton import decoder_blocks
from calibration.statistics.base import Observation
from calibration.statistics.collection import Statistics
from calibration.statistics.gram import Gram
from calibration.stream import Stream
from calibration.text.data import Tokens
from calibration.walk import tokens_of, walk
from compress.callbacks import Progress
from compress.errors import LayerError
from compress.prepare.prepare import Prepared

TOKENS_PER_COLUMN = 8
"""Tokens for each column of the matrix: enough for a well-conditioned Gram, and a small part of a calibration."""
FEWEST_TOKENS = 4096


def head_gram(prepared: Prepared, head: str, progress: Progress) -> Gram:
    """The Gram matrix (d, d) of the inputs of the module `head`. Raises LayerError if they are not finite."""
    prefix, blocks = decoder_blocks(prepared.model)
    loader = prepared.loader
    loader.load_outside(f"{prefix}.", prepared.device)
    width = prepared.model.get_submodule(head).get_parameter("weight").shape[1]
    some = _some(prepared.tokens, max(FEWEST_TOKENS, TOKENS_PER_COLUMN * width))
    batches = list(some.batches(prepared.recipe.batch_size))
    stream = Stream(prepared.model, blocks, batches)
    loader.unload_outside(f"{prefix}.")
    for block in walk(stream, loader, propagate=Propagate.BLOCK, device=prepared.device):
        progress("inputs of the head", block.index, len(blocks))
    loader.load_outside(f"{prefix}.", prepared.device)
    stats: Statistics | None = None
    for index, tokens in enumerate(batches):
        seen = Observation(
            tokens_of(_inputs(stream, index, head), tokens.attention_mask, head), len(tokens)
        )
        if stats is None:
            stats = Statistics.observed(seen, frozenset({Gram}))
        else:
            stats.observe(seen)
    loader.unload_outside(f"{prefix}.")
    progress("inputs of the head", len(blocks), len(blocks))
    assert stats is not None  # a text has tokens
    gram: Gram = stats[Gram]
    if not bool(torch.isfinite(gram.sum_ii).all()):
        raise LayerError(f"{head}: its inputs hold NaN or infinity; try --dtype float32")
    return gram


def _some(tokens: Tokens, n_tokens: int) -> Tokens:
    """The first sequences, which are a sample of all, with at least so many tokens."""
    return next(tokens.batches(-(-n_tokens // tokens.input_ids.shape[1])))


def _inputs(stream: Stream, batch: int, head: str) -> Tensor:
    """What the head reads in one batch (b, t, d); its product, as wide as the vocabulary, is not made."""
    module, seen = stream.model.get_submodule(head), []

    def stub(x: Tensor) -> Tensor:
        seen.append(x)
        return x[..., :1]

    vars(module)["forward"] = stub
    try:
        with torch.no_grad():
            stream.output(batch, stream.hidden[batch])
    finally:
        del vars(module)["forward"]
    return seen[0]
