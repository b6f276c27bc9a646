"""Text into batches of tokens, with a record of exactly what was read.

Documents are joined with the end-of-text token and cut into sequences of equal length that do not overlap, each of
which begins with the special tokens that the tokenizer puts in front of a text; a seed decides which ones are used.
Shapes: n = sequences, t = tokens of a sequence.
"""

import enum
import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from calibration.bos import Bos
from calibration.errors import InputError
from calibration.text.chats import rendered
from calibration.text.documents import Chats, Documents, Rows
from calibration.text.drawing import (
    Drawn,
    Stream,
    draw_rows,
    draw_text,
    enough,
    spelled,
    take_rows,
    take_text,
)
from calibration.text.examples import draw_examples, take_examples
from calibration.text.sources import Split, TextSource, open_source, parse_source
from calibration.text.special import SpecialTokens

__all__ = [
    "Framing",
    "Split",
    "TextSource",
    "Tokens",
    "load_tokens",
    "load_windows",
    "parse_source",
]


class Framing(enum.Enum):
    """How documents become sequences."""

    PACKED = "packed"
    """One after the other, cut into sequences of one length: for models that predict the next token."""
    EXAMPLES = "examples"
    """Each a sequence of its own, with the tokenizer's special tokens: for models that read it whole."""


@dataclass(frozen=True)
class Tokens:
    """Sequences of token ids.

    `input_ids` (n, t) int64; `attention_mask` (n, t) int64 with 0 for padding, or None if nothing
    is padded; `provenance`, made of JSON types, says what was read; `labels` (n,) int64 the class
    of each sequence, or None if the text has none; `inserted` (n, t) bool, True for special tokens that are not the
    text's own but stand before and between documents, or None if there are none: a model reads them, but is not
    judged by how well it predicts them.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    provenance: dict[str, Any]
    labels: Tensor | None = None
    inserted: Tensor | None = None

    def __len__(self) -> int:
        """Number of sequences."""
        return int(self.input_ids.shape[0])

    @property
    def n_tokens(self) -> int:
        """Number of tokens, padding not counted."""
        mask = self.attention_mask
        return self.input_ids.numel() if mask is None else int(mask.sum())

    def batches(self, size: int) -> Iterator["Tokens"]:
        """In order, `size` sequences at a time; the last batch may be smaller."""
        if size < 1:
            raise InputError(f"batch_size: {size} sequences at a time; at least 1")
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield replace(
                self,
                input_ids=self.input_ids[part],
                attention_mask=_part(self.attention_mask, part),
                labels=_part(self.labels, part),
                inserted=_part(self.inserted, part),
            )

    def singles(self) -> Iterator["Tokens"]:
        """One sequence at a time, its padding cut off where that is at one end."""
        for one in self.batches(1):
            if one.attention_mask is None:
                yield one
                continue
            seen = one.attention_mask[0].bool()
            places = seen.nonzero().flatten()
            part = slice(int(places[0]), int(places[-1]) + 1)
            mask = None if bool(seen[part].all()) else one.attention_mask[:, part]
            inserted = None if one.inserted is None else one.inserted[:, part]
            yield replace(
                one, input_ids=one.input_ids[:, part], attention_mask=mask, inserted=inserted
            )

    def fingerprint(self) -> str:
        """Hex sha256 of the shape, the ids, the masks and the labels; the provenance does not count."""
        mask = self.attention_mask
        mask = torch.ones_like(self.input_ids) if mask is None else mask
        digest = hashlib.sha256(repr(tuple(self.input_ids.shape)).encode())
        further = [tensor for tensor in (self.labels, self.inserted) if tensor is not None]
        for tensor in (self.input_ids, mask, *further):
            digest.update(
                tensor.to("cpu", torch.int64).contiguous().numpy().astype("<i8").tobytes()
            )
        return digest.hexdigest()


def load_tokens(  # noqa: PLR0913  (all but two by name)
    sources: Sequence[TextSource],
    tokenizer: PreTrainedTokenizerBase,
    *,
    n_sequences: int,
    seq_len: int,
    seed: int,
    split: Split,
    framing: Framing = Framing.PACKED,
    bos: Bos = Bos.AUTO,
) -> Tokens:
    """`n_sequences` sequences of `seq_len` tokens from a mixture of sources, decided by `seed`.

    Each source gets its share by weight (largest remainders, at least one sequence each). Packed sequences begin with
    the special tokens that `bos` says, and have them again after each end of text within. Ready `input_ids` rows are
    cut to `seq_len`, or padded on the right, and get no special token. Raises InputError if a source is not readable,
    or has less distinct text than its share: the message says how many sequences there are.
    """
    _check_request(sources, n_sequences, seq_len)
    special = _special_tokens(tokenizer, framing, bos, seq_len)
    shares = _shares([source.weight for source in sources], n_sequences)
    drawn: list[Drawn] = []
    for index, (source, share) in enumerate(zip(sources, shares, strict=True)):
        # Not by the spec: the same file at another place gives the same tokens.
        rng = random.Random(f"{seed}/{index}")
        opened = _opened(source, tokenizer, split, n_tokens=share * seq_len, seed=seed)
        _refuse_repeated(opened.provenance, [part.provenance for part in drawn])
        if isinstance(opened, Rows):
            part = draw_rows(opened, tokenizer, special, rng, share, seq_len)
        elif framing is Framing.EXAMPLES:
            part = draw_examples(opened, tokenizer, rng, share, seq_len)
        else:
            part = draw_text(opened, Stream(tokenizer, special), rng, share, seq_len)
        part.provenance.update(weight=source.weight, sequences=share)
        drawn.append(part)
    # Mixed, so that any run of sequences is a sample of all sources.
    order = torch.tensor(random.Random(f"{seed}/order").sample(range(n_sequences), n_sequences))
    return _finish(
        _in_order(_joined(drawn), order),
        [d.provenance for d in drawn],
        {"seed": seed, "split": split.value},
    )


def load_windows(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    n_sequences: int | None,
    seq_len: int,
    framing: Framing = Framing.PACKED,
    bos: Bos = Bos.AUTO,
) -> Tokens:
    """The first `n_sequences` windows (None: all) of the held-out part, in order, not overlapping.

    For perplexity: nothing is shuffled. Packed text has the special tokens that `load_tokens` gives it. Raises
    InputError as load_tokens does.
    """
    _check_request([source], 1 if n_sequences is None else n_sequences, seq_len)
    special = _special_tokens(tokenizer, framing, bos, seq_len)
    n_tokens = (n_sequences or 0) * seq_len
    opened = _opened(source, tokenizer, Split.HELDOUT, n_tokens=n_tokens or 1 << 24, seed=0)
    if isinstance(opened, Rows):
        share = len(opened.ids) if n_sequences is None else n_sequences
        chosen = range(enough(len(opened.ids), share, opened.provenance))
        part = take_rows(opened, tokenizer, special, chosen, seq_len)
    elif framing is Framing.EXAMPLES:
        part = take_examples(opened, tokenizer, n_sequences, seq_len)
    else:
        part = take_text(opened, Stream(tokenizer, special), n_sequences, seq_len)
    part.provenance["sequences"] = len(part.ids)
    return _finish(part, [part.provenance], {"split": Split.HELDOUT.value})


def _in_order(drawn: Drawn, order: Tensor) -> Drawn:
    return replace(
        drawn,
        ids=drawn.ids[order],
        mask=drawn.mask[order],
        labels=_part(drawn.labels, order),
        inserted=_part(drawn.inserted, order),
    )


def _part(tensor: Tensor | None, places: slice | Tensor) -> Tensor | None:
    return None if tensor is None else tensor[places]


def _special_tokens(
    tokenizer: PreTrainedTokenizerBase, framing: Framing, bos: Bos, seq_len: int
) -> SpecialTokens:
    """Those of packed text; examples get theirs from the tokenizer. Raises InputError if they fill a sequence."""
    special = SpecialTokens.of(tokenizer, bos if framing is Framing.PACKED else Bos.NEVER)
    if seq_len <= len(special.prefix):
        raise InputError(
            f"seq_len: {seq_len} tokens are all special ones ({spelled(tokenizer, special.prefix)}); use more"
        )
    return special


def _opened(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    *,
    n_tokens: int,
    seed: int,
) -> Documents | Rows:
    """An open source, its chats rendered."""
    opened = open_source(source, split, n_tokens=n_tokens, seed=seed)
    return rendered(opened, tokenizer) if isinstance(opened, Chats) else opened


def _check_request(sources: Sequence[TextSource], n_sequences: int, seq_len: int) -> None:
    if not sources:
        raise InputError("calibration: no source is given; python-docs needs no file")
    if seq_len < 2:
        raise InputError(f"seq_len: {seq_len} tokens; a sequence has at least 2")
    if n_sequences < len(sources):
        raise InputError(
            f"samples: {n_sequences} sequences for {len(sources)} source(s); each gets at least 1"
        )


def _refuse_repeated(opened: dict[str, Any], earlier: list[dict[str, Any]]) -> None:
    """The same text under two names would give sequences that overlap."""
    digest = opened.get("sha256")
    for other in earlier:
        if digest is not None and other.get("sha256") == digest:
            raise InputError(
                f"calibration: {opened['source']} is the same text as {other['source']}; give it"
                " once, with a weight"
            )


def _shares(weights: Sequence[float], n_sequences: int) -> list[int]:
    """Whole numbers in proportion to `weights` that add up to `n_sequences`, none below 1."""
    exact = [weight / sum(weights) * n_sequences for weight in weights]
    shares = [max(1, int(share)) for share in exact]
    while sum(shares) != n_sequences:
        step = 1 if sum(shares) < n_sequences else -1
        # Give to the source that is most below its exact share, or take from the one most above.
        movable = [i for i, share in enumerate(shares) if step == 1 or share > 1]
        index = max(movable, key=lambda i: (step * (exact[i] - shares[i]), -i))
        shares[index] += step
    return shares


def _joined(drawn: Sequence[Drawn]) -> Drawn:
    """All sequences, in the length of the longest; labels only if all have them."""
    longest = max(part.ids.shape[1] for part in drawn)
    ids, masks = (
        torch.cat([F.pad(tensor, (0, longest - tensor.shape[1])) for tensor in tensors])
        for tensors in ([part.ids for part in drawn], [part.mask for part in drawn])
    )
    labels = [part.labels for part in drawn if part.labels is not None]
    inserted = torch.zeros_like(masks, dtype=torch.bool)
    first = 0
    for part in drawn:
        rows = slice(first, first + len(part.ids))
        if part.inserted is not None:
            inserted[rows, : part.inserted.shape[1]] = part.inserted
        first = rows.stop
    labels_n = torch.cat(labels) if len(labels) == len(drawn) else None
    return Drawn(ids, masks, {}, labels_n, inserted)


def _finish(drawn: Drawn, read: list[dict[str, Any]], settings: dict[str, Any]) -> Tokens:
    ids, mask = drawn.ids, drawn.mask
    provenance = {
        "sources": read,
        "sequences": int(ids.shape[0]),
        "seq_len": int(ids.shape[1]),
        "tokens": int(mask.sum()),
        **settings,
    }
    inserted = drawn.inserted if drawn.inserted is not None and bool(drawn.inserted.any()) else None
    return Tokens(ids, None if bool(mask.all()) else mask, provenance, drawn.labels, inserted)
