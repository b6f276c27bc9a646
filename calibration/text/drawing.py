"""Sequences of tokens out of one source: cut from its text, or taken from its ready rows.

Up to four million characters all text is tokenised and sequences are drawn from all of it; beyond,
short pieces are drawn at random places of the text, with equal chance for every place.
Shapes: n = sequences, t = tokens of a sequence.
"""

import random
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from calibration.errors import InputError
from calibration.text.documents import Documents, Rows

_TOKENISE_ALL_CHARACTERS = 1 << 22
_PIECE_CHARACTERS_PER_TOKEN = 16
_BATCH_CHARACTERS = 1 << 20
_LONGEST_WORD = 64
_WINDOW_MARGIN = 64
"""Tokens at the end of a cut text that may differ from those of the whole text."""


@dataclass(frozen=True)
class Drawn:
    """Sequences of one source: `ids` and `mask` (n, t), and what was read."""

    ids: Tensor
    mask: Tensor
    provenance: dict[str, Any]
    labels: Tensor | None = None
    """(n,) int64: the class of each, if the source says."""


def enough(
    available: int, wanted: int, provenance: dict[str, Any], seq_len: int | None = None
) -> int:
    """`wanted`, or InputError if there are not so many sequences."""
    if available >= wanted:
        return wanted
    of = f" of {seq_len} tokens" if seq_len else ""
    raise InputError(
        f"{provenance['source']}: {wanted} sequences{of} are asked for, there are {available};"
        " ask for fewer (samples) or shorter ones (seq_len), or name more text"
    )


def draw_text(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    rng: random.Random,
    share: int,
    seq_len: int,
) -> Drawn:
    """`share` sequences (share, seq_len) at random places; InputError if there are too few."""
    stream = Stream(tokenizer)
    if sum(documents.lengths) <= _TOKENISE_ALL_CHARACTERS:
        order = list(range(len(documents.texts)))
        rng.shuffle(order)
        stream.extend(documents, [(index, 0, documents.lengths[index]) for index in order], None)
        drawn_from = "all text"
    else:
        pieces = pieces_of(documents.lengths, _PIECE_CHARACTERS_PER_TOKEN * seq_len)
        rng.shuffle(pieces)
        stream.extend(documents, pieces, share * seq_len)
        drawn_from = "pieces at random places"
    count = len(stream.ids) // seq_len
    enough(count, share, documents.provenance, seq_len)
    # Any phase that costs no sequence.
    phase = rng.randint(0, len(stream.ids) - count * seq_len)
    chosen = rng.sample(range(count), share)
    part = stream.cut(documents, [phase + i * seq_len for i in chosen], seq_len)
    whole = drawn_from == "all text"
    part.provenance.update(drawn_from=drawn_from, sequences_available=count if whole else None)
    return part


def pieces_of(lengths: Sequence[int], size: int) -> list[tuple[int, int, int]]:
    """(document, first character, end) of pieces of `size` characters that cover all documents."""
    return [
        (index, start, min(start + size, length))
        for index, length in enumerate(lengths)
        for start in range(0, length, size)
    ]


def whole_words(text: str, start: int, end: int) -> str:
    """The piece of `text` without the half words at its cut ends, if they are short."""
    if start > 0:
        head = re.search(r"\s", text[start : start + _LONGEST_WORD])
        start += head.start() if head else 0
    if end < len(text):
        tail = re.search(r"\s\S*$", text[max(start, end - _LONGEST_WORD) : end])
        end -= len(tail.group()) if tail else 0
    return text[start:end]


class Stream:
    """Token ids of pieces of documents, one after the other, the end-of-text token between them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Start without text."""
        self.ids: list[int] = []
        self._tokenizer = tokenizer
        self._starts: list[int] = []
        self._documents: list[int] = []

    def extend(
        self, documents: Documents, pieces: Sequence[tuple[int, int, int]], n_tokens: int | None
    ) -> None:
        """Tokenise `pieces` in order until there are `n_tokens` (None: all of them)."""
        batch: list[tuple[int, str]] = []
        n_characters = 0
        limit = _BATCH_CHARACTERS if n_tokens is None else min(_BATCH_CHARACTERS, 4 * n_tokens)
        for index, start, end in pieces:
            text = whole_words(documents.texts[index], start, end)
            if text.strip():
                batch.append((index, text))
                n_characters += len(text)
            if n_characters >= limit:
                self._append(batch)
                batch, n_characters = [], 0
                if n_tokens is not None and len(self.ids) >= n_tokens:
                    return
        self._append(batch)

    def extend_in_order(self, documents: Documents, n_tokens: int | None) -> None:
        """The first `n_tokens` of all documents, exactly as if all text had been tokenised."""
        if n_tokens is None:
            whole = [(index, 0, length) for index, length in enumerate(documents.lengths)]
            self.extend(documents, whole, None)
            return
        for index, length in enumerate(documents.lengths):
            size = _PIECE_CHARACTERS_PER_TOKEN * (n_tokens + _WINDOW_MARGIN)
            before = len(self.ids)
            while True:
                self.extend(documents, [(index, 0, min(size, length))], None)
                if size >= length or len(self.ids) >= n_tokens + _WINDOW_MARGIN:
                    break
                self._forget_after(before)
                size *= 2
            if len(self.ids) >= n_tokens + _WINDOW_MARGIN:
                return

    def cut(self, documents: Documents, starts: Sequence[int], seq_len: int) -> Drawn:
        """The sequences that begin at `starts`, and what was read."""
        ids = torch.tensor([self.ids[start : start + seq_len] for start in starts])
        used: set[int] = set()
        for start in starts:
            first = bisect_right(self._starts, start) - 1
            last = bisect_right(self._starts, start + seq_len - 1)
            used.update(self._documents[first:last])
        provenance = documents.provenance | {
            "documents": len(documents.texts),
            "documents_used": len(used),
            "characters": sum(documents.lengths),
            "tokens_read": len(self.ids),
            "tokens": ids.numel(),
            "separator": self._tokenizer.eos_token,
        }
        return Drawn(ids, torch.ones_like(ids), provenance)

    def _append(self, batch: Sequence[tuple[int, str]]) -> None:
        if not batch:
            return
        texts = [text for _, text in batch]
        encoded = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        eos = self._tokenizer.eos_token_id
        for (index, _), ids in zip(batch, encoded, strict=True):
            if self.ids and eos is not None:
                self.ids.append(eos)
            self._starts.append(len(self.ids))
            self._documents.append(index)
            self.ids.extend(ids)

    def _forget_after(self, n_tokens: int) -> None:
        del self.ids[n_tokens:]
        while self._starts and self._starts[-1] >= n_tokens:
            self._starts.pop()
            self._documents.pop()


def draw_rows(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, rng: random.Random, share: int, seq_len: int
) -> Drawn:
    """`share` random rows as sequences of `seq_len`; InputError if there are too few."""
    enough(len(rows.ids), share, rows.provenance)
    return take_rows(rows, tokenizer, rng.sample(range(len(rows.ids)), share), seq_len)


def take_rows(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, chosen: Sequence[int], seq_len: int
) -> Drawn:
    """The rows `chosen`, cut to `seq_len` or padded on the right; InputError for a bad row."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.full((len(chosen), seq_len), pad or 0)
    mask = torch.zeros_like(ids)
    for position, index in enumerate(chosen):
        row = list(rows.ids[index])
        kept = [1] * len(row) if rows.masks is None else list(rows.masks[index])
        where = f"{rows.provenance['source']}, row {index}"
        _check_row(row, kept, len(tokenizer), where)
        length = min(len(row), seq_len)
        if not any(kept[:length]):
            raise InputError(f"{where}: no tokens in the first {seq_len} places (seq_len)")
        ids[position, :length] = torch.tensor(row[:length])
        mask[position, :length] = torch.tensor(kept[:length])
    provenance = rows.provenance | {"documents": len(rows.ids), "tokens": int(mask.sum())}
    labels = None if rows.labels is None else torch.tensor([rows.labels[index] for index in chosen])
    return Drawn(ids, mask, provenance, labels)


def _check_row(row: Sequence[int], mask: Sequence[int], n_vocabulary: int, where: str) -> None:
    if not all(type(item) is int for item in row):
        raise InputError(f"{where}: the input_ids are not whole numbers")
    if not row:
        raise InputError(f"{where}: no tokens")
    if len(mask) != len(row) or not set(mask) <= {0, 1}:
        raise InputError(f"{where}: the attention_mask is not {len(row)} times 0 or 1")
    worst = max(row) if max(row) >= n_vocabulary else min(row)
    if not 0 <= worst < n_vocabulary:
        raise InputError(
            f"{where}: token id {worst} is outside the tokenizer's {n_vocabulary} tokens;"
            " was the text tokenised for another model?"
        )
