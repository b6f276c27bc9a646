"""Text for models that read a whole sequence at once: each document is a sequence of its own.

A tokenizer adds what such a model expects around a text ([CLS] and [SEP] of BERT). Labelled documents stay whole and
are cut at the end; others longer than a sequence are read in pieces.
Shapes: n = sequences, t = tokens of a sequence.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from calibration.text.documents import Documents
from calibration.text.drawing import Drawn, enough, pieces_of, whole_words

CHARACTERS_PER_TOKEN = 4


def draw_examples(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    rng: random.Random,
    share: int,
    seq_len: int,
) -> Drawn:
    """`share` documents, or pieces of some, at random; InputError if there are too few."""
    pieces = _pieces(documents, seq_len)
    enough(len(pieces), share, documents.provenance)
    return _encoded(documents, tokenizer, rng.sample(pieces, share), seq_len)


def take_examples(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, share: int | None, seq_len: int
) -> Drawn:
    """The first `share` of them (None: all), in order; InputError if there are too few."""
    pieces = _pieces(documents, seq_len)
    wanted = max(len(pieces), 1) if share is None else share
    enough(len(pieces), wanted, documents.provenance)
    return _encoded(documents, tokenizer, pieces[:wanted], seq_len)


def _pieces(documents: Documents, seq_len: int) -> list[tuple[int, int, int]]:
    """(document, first character, end) of all that is not blank."""
    if documents.labels is None:
        pieces = pieces_of(documents.lengths, CHARACTERS_PER_TOKEN * seq_len)
    else:
        pieces = [(index, 0, length) for index, length in enumerate(documents.lengths)]
    return [
        (index, start, end)
        for index, start, end in pieces
        if documents.texts[index][start:end].strip()
    ]


def _encoded(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    pieces: Sequence[tuple[int, int, int]],
    seq_len: int,
) -> Drawn:
    texts = [whole_words(documents.texts[index], start, end) for index, start, end in pieces]
    rows = tokenizer(texts, truncation=True, max_length=seq_len, verbose=False)["input_ids"]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.full((len(rows), seq_len), pad or 0)
    mask = torch.zeros_like(ids)
    for position, row in enumerate(rows):
        ids[position, : len(row)] = torch.tensor(row)
        mask[position, : len(row)] = 1
    longest = int(mask.sum(1).max())
    used = {index for index, _, _ in pieces}
    provenance = documents.provenance | {
        "documents": len(documents.texts),
        "documents_used": len(used),
        "characters": sum(documents.lengths),
        "tokens": int(mask.sum()),
    }
    labels = None
    if documents.labels is not None:
        labels = torch.tensor([documents.labels[index] for index, _, _ in pieces])
    return Drawn(ids[:, :longest], mask[:, :longest], provenance, labels)
