"""Special tokens that packed text needs: in front of each window, and between two documents in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from calibration.bos import Bos
from calibration.errors import InputError

_PROBES = ("The", "a word", "1", "words and\nlines")
_MOST_WORDS = 256
"""Entries of a vocabulary that are tried for a text with tokens where the probes have none."""


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids that surround documents in packed text."""

    prefix: tuple[int, ...]
    """The first tokens of every window."""
    eos: int | None
    """End-of-text token, which stands between documents; None if the tokenizer has none."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, bos: Bos) -> SpecialTokens:
        """The special tokens of a tokenizer. Raises InputError if it has no BOS token, or its prefix is unclear."""
        return cls(_prefix(tokenizer, bos), tokenizer.eos_token_id)

    @property
    def separator(self) -> tuple[int, ...]:
        """Tokens between two documents: end of text, then the prefix; a token that is both stands once."""
        if self.eos is None or self.prefix[:1] == (self.eos,):
            return self.prefix
        return (self.eos, *self.prefix)

    def without_prefix(self, ids: Sequence[int]) -> Sequence[int]:
        """The ids without a prefix that the text itself brings, as a chat template writes it."""
        n = len(self.prefix)
        return ids[n:] if n and tuple(ids[:n]) == self.prefix else ids

    def begins(self, ids: Sequence[int]) -> bool:
        """Whether these ids begin with the prefix."""
        return tuple(ids[: len(self.prefix)]) == self.prefix


def _prefix(tokenizer: PreTrainedTokenizerBase, bos: Bos) -> tuple[int, ...]:
    if bos is Bos.NEVER:
        return ()
    if bos is Bos.AUTO:
        return _added_in_front(tokenizer)
    if tokenizer.bos_token_id is None:
        raise InputError("always, but the tokenizer has no bos_token; use auto or never")
    return (tokenizer.bos_token_id,)


def _added_in_front(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer adds before a text: the tokens that stand before the text's own, the same for all texts.

    What it adds at the end is told apart by where the text's own tokens stand.
    """
    agreed: set[tuple[int, ...]] | None = None
    for text, own in _texts_with_tokens(tokenizer):
        ids = list(tokenizer(text, verbose=False).input_ids)
        added = len(ids) - len(own)
        found = {tuple(ids[:k]) for k in range(added + 1) if ids[k : k + len(own)] == own}
        agreed = found if agreed is None else agreed & found
    if agreed is None:
        return ()
    if len(agreed) != 1:
        raise InputError(
            "the tokenizer does not put the same special tokens in front of every text, so a window's first tokens are "
            "unclear; use never"
        )
    return next(iter(agreed))


def _texts_with_tokens(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, list[int]]]:
    """Short texts that have tokens, with these; words of the vocabulary where the probes have none."""
    special = set(tokenizer.all_special_ids)
    ordinary = (k for k in range(min(len(tokenizer), _MOST_WORDS)) if k not in special)
    n_found = 0
    for text in (*_PROBES, *(str(tokenizer.decode([k])) for k in ordinary)):
        own = list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        if own:
            yield text, own
            n_found += 1
        if n_found == len(_PROBES):
            return
