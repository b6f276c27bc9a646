"""Sequences of tokens out of one source: cut from its text, or taken from its ready rows.

Up to four million characters all text is tokenised and sequences are drawn from all of it; beyond,
short pieces are drawn at random places of the text, with equal chance for every place. Every sequence begins with the
prefix, which counts among its tokens.
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
from calibration.text.special import SpecialTokens

_TOKENISE_ALL_CHARACTERS = 1 << 22
_PIECE_CHARACTERS_PER_TOKEN = 16
_BATCH_CHARACTERS = 1 << 20
_LONGEST_WORD = 64
_WINDOW_MARGIN = 64
"""Tokens at the end of a cut text that may differ from those of the whole text."""


@dataclass(frozen=True)
class Drawn:
    """Sequences of one source: `ids`, `mask` and `inserted` (n, t), and what was read."""

    ids: Tensor
    mask: Tensor
    provenance: dict[str, Any]
    labels: Tensor | None = None
    """(n,) int64: the class of each, if the source says."""
    inserted: Tensor | None = None
    """Bool: special tokens that stand before and between documents; None if the source is no packed text."""


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
    stream: "Stream",
    rng: random.Random,
    share: int,
    seq_len: int,
) -> Drawn:
    """`share` sequences (share, seq_len) at random places, by an empty stream; InputError if there are too few."""
    if sum(documents.lengths) <= _TOKENISE_ALL_CHARACTERS:
        order = list(range(len(documents.texts)))
        rng.shuffle(order)
        stream.extend(documents, [(index, 0, documents.lengths[index]) for index in order], None)
        drawn_from = "all text"
    else:
        pieces = pieces_of(documents.lengths, _PIECE_CHARACTERS_PER_TOKEN * seq_len)
        rng.shuffle(pieces)
        stream.extend(documents, pieces, stream.tokens_for(share, seq_len))
        drawn_from = "pieces at random places"
    starts = stream.starts(seq_len, 0)
    count = len(starts)
    enough(count, share, documents.provenance, seq_len)
    # Any phase that costs no sequence.
    shifted = stream.starts(seq_len, rng.randint(0, stream.left_after(starts[-1], seq_len)))
    starts = shifted if len(shifted) >= count else starts
    part = stream.cut(documents, [starts[i] for i in rng.sample(range(count), share)], seq_len)
    whole = drawn_from == "all text"
    part.provenance.update(drawn_from=drawn_from, sequences_available=count if whole else None)
    return part


def take_text(
    documents: Documents, stream: "Stream", n_sequences: int | None, seq_len: int
) -> Drawn:
    """The first `n_sequences` sequences (None: all) of an empty stream; InputError if there are too few."""
    wanted = None if n_sequences is None else stream.tokens_for(n_sequences, seq_len)
    stream.extend_in_order(documents, wanted)
    starts = stream.starts(seq_len, 0)
    share = max(len(starts), 1) if n_sequences is None else n_sequences
    enough(len(starts), share, documents.provenance, seq_len)
    return stream.cut(documents, starts[:share], seq_len)


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
    """Token ids of pieces of documents, one after the other, the separator between them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special: SpecialTokens) -> None:
        """Start without text."""
        self.ids: list[int] = []
        self._tokenizer = tokenizer
        self._special = special
        self._inserted = bytearray()
        """1 for each of the ids that belongs to a separator."""
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

    def tokens_for(self, n_sequences: int, seq_len: int) -> int:
        """So many tokens of the stream are enough for `n_sequences`."""
        prefix, separator = self._special.prefix, self._special.separator
        # A sequence that would begin within a separator leaves the rest of it out.
        return n_sequences * (seq_len - len(prefix) + (len(separator) if prefix else 0))

    def starts(self, seq_len: int, phase: int) -> list[int]:
        """Places from `phase` on where sequences begin that do not overlap, their prefix not counted."""
        length = seq_len - len(self._special.prefix)
        found = []
        start = self._after_separator(phase)
        while start + length <= len(self.ids):
            found.append(start)
            start = self._after_separator(start + length)
        return found

    def left_after(self, start: int, seq_len: int) -> int:
        """Number of tokens after the sequence that begins at `start`."""
        return len(self.ids) - (start + seq_len - len(self._special.prefix))

    def cut(self, documents: Documents, starts: Sequence[int], seq_len: int) -> Drawn:
        """The sequences that begin at `starts`, each after the prefix, and what was read."""
        prefix = list(self._special.prefix)
        length = seq_len - len(prefix)
        ids = torch.tensor([prefix + self.ids[start : start + length] for start in starts])
        inserted = torch.tensor(
            [[1] * len(prefix) + list(self._inserted[start : start + length]) for start in starts]
        ).bool()
        used: set[int] = set()
        for start in starts:
            first = bisect_right(self._starts, start) - 1
            last = bisect_right(self._starts, start + length - 1)
            used.update(self._documents[first:last])
        provenance = documents.provenance | {
            "documents": len(documents.texts),
            "documents_used": len(used),
            "characters": sum(documents.lengths),
            "tokens_read": len(self.ids),
            "tokens": ids.numel(),
            "prefix": spelled(self._tokenizer, self._special.prefix),
            "separator": spelled(self._tokenizer, self._special.separator),
        }
        return Drawn(ids, torch.ones_like(ids), provenance, inserted=inserted)

    def _append(self, batch: Sequence[tuple[int, str]]) -> None:
        if not batch:
            return
        texts = [text for _, text in batch]
        encoded = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for (index, _), ids in zip(batch, encoded, strict=True):
            if self.ids:
                separator = self._next_separator()
                self.ids.extend(separator)
                self._inserted.extend(b"\1" * len(separator))
            self._starts.append(len(self.ids))
            self._documents.append(index)
            own = self._special.without_prefix(ids)
            self.ids.extend(own)
            self._inserted.extend(bytes(len(own)))

    def _next_separator(self) -> Sequence[int]:
        """The separator after what there is, without an end of text that the last document brought itself."""
        separator, eos = self._special.separator, self._special.eos
        last, before = self.ids[-1], self.ids[-2:-1]
        # Chat templates end a turn with the token and a line break.
        ended = last == eos or (before == [eos] and not str(self._tokenizer.decode([last])).strip())
        return separator[1:] if ended and separator[:1] == (eos,) else separator

    def _after_separator(self, place: int) -> int:
        """The place, or the end of the separator that it is in: the prefix of a sequence stands for that one."""
        while self._special.prefix and place < len(self.ids) and self._inserted[place]:
            place += 1
        return place

    def _forget_after(self, n_tokens: int) -> None:
        del self.ids[n_tokens:], self._inserted[n_tokens:]
        while self._starts and self._starts[-1] >= n_tokens:
            self._starts.pop()
            self._documents.pop()


def spelled(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str | None:
    """Special tokens as they are written; None for none."""
    return "".join(map(str, tokenizer.convert_ids_to_tokens(list(ids)))) if ids else None


def draw_rows(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    special: SpecialTokens,
    rng: random.Random,
    share: int,
    seq_len: int,
) -> Drawn:
    """`share` random rows as sequences of `seq_len`; InputError if there are too few."""
    enough(len(rows.ids), share, rows.provenance)
    return take_rows(rows, tokenizer, special, rng.sample(range(len(rows.ids)), share), seq_len)


def take_rows(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    special: SpecialTokens,
    chosen: Sequence[int],
    seq_len: int,
) -> Drawn:
    """The rows `chosen`, cut to `seq_len` or padded on the right; InputError for a bad row.

    They get no prefix; the provenance tells how many have none.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.full((len(chosen), seq_len), pad or 0)
    mask = torch.zeros_like(ids)
    without_prefix = 0
    for position, index in enumerate(chosen):
        where = f"{rows.provenance['source']}, row {index}"
        row = list(rows.ids[index])
        kept = [1] * len(row) if rows.masks is None else list(rows.masks[index])
        _check_row(row, kept, len(tokenizer), where)
        without_prefix += not special.begins(
            [token for token, seen in zip(row, kept, strict=True) if seen]
        )
        length = min(len(row), seq_len)
        if not any(kept[:length]):
            raise InputError(f"{where}: no tokens in the first {seq_len} places (seq_len)")
        ids[position, :length] = torch.tensor(row[:length])
        mask[position, :length] = torch.tensor(kept[:length])
    provenance = rows.provenance | {"documents": len(rows.ids), "tokens": int(mask.sum())}
    if special.prefix:
        provenance["rows_without_prefix"] = without_prefix
    labels = None if rows.labels is None else torch.tensor([rows.labels[index] for index in chosen])
    return Drawn(ids, mask, provenance, labels)


def _check_row(row: Sequence[int], mask: Sequence[int], n_vocabulary: int, where: str) -> None:
    if not all(type(item) is int for item in row):
        raise InputError(f"{where}: the input_ids are not whole numbers")
    if not row:
        raise InputError(f"{where}: no tokens")
    if len(mask) != len(row) or not all(item in (0, 1) for item in mask):
        raise InputError(f"{where}: the attention_mask is not {len(row)} times 0 or 1")
    worst = max(row) if max(row) >= n_vocabulary else min(row)
    if not 0 <= worst < n_vocabulary:
        raise InputError(
            f"{where}: token id {worst} is outside the tokenizer's {n_vocabulary} tokens;"
            " was the text tokenised for another model?"
        )
