"""What a source of text holds: documents, chats, or ready token ids; each fetched when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from calibration.errors import InputError


@dataclass(frozen=True)
class Documents:
    """Texts in a fixed order, each fetched when asked for, with their lengths in characters."""

    texts: Sequence[str]
    lengths: Sequence[int]
    provenance: dict[str, Any] = field(default_factory=dict)
    labels: Sequence[int] | None = None
    """The class of each, if the source says."""


@dataclass(frozen=True)
class Chats:
    """Lists of chat messages in a fixed order, which a tokenizer's chat template turns into documents."""

    messages: Sequence[Sequence[Mapping[str, Any]]]
    where: Callable[[int], str]
    """The name of a row for error messages: its file and line."""
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rows:
    """Ready token ids, one sequence each, in a fixed order; `masks` has as many, or is None."""

    ids: Sequence[Sequence[int]]
    masks: Sequence[Sequence[int]] | None
    provenance: dict[str, Any] = field(default_factory=dict)
    labels: Sequence[int] | None = None
    """The class of each, if the source says."""


def refuse_half_surrogates(text: str, where: str) -> None:
    """Raises InputError if half of a surrogate pair stands in a text, as where text was cut within an emoji."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: character {error.start + 1} is {text[error.start]!r}, half of a surrogate pair, which is no "
            "valid Unicode; remove it, or put U+FFFD in its place"
        ) from error
