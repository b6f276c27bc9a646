"""How embeddings and heads are stored: what an option can ask for, and what formats hold. Imports no torch."""

from __future__ import annotations

import enum


class Storage(enum.StrEnum):
    """A value of the options `embeddings` and `head`."""

    AUTO = "auto"
    """The fewest bits that cost nothing to speak of, in what the format holds: 8; or 16, for a source of 32."""
    AS_IS = "as-is"
    """As the source stores them."""
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    BITS_8 = "8"
    BITS_6 = "6"
    BITS_5 = "5"
    BITS_4 = "4"
    BITS_3 = "3"
    BITS_2 = "2"

    @property
    def bits(self) -> int | None:
        """Bits of a code; None for floats."""
        return int(self.value) if self.value.isdigit() else None


class Outside(enum.StrEnum):
    """How a format stores what lies outside the compressed layers."""

    CODES = "codes"
    """Embeddings and head as codes in few bits, if asked or by default; other fp32 in bf16 where that loses nothing."""
    HALF = "16 bits"
    """Embeddings and head in 16 bits by default, never in fewer; other fp32 in bf16 where that loses nothing."""
    WHOLE = "whole"
    """As the source has it, by default."""
    ABSENT = "absent"
    """Not at all."""

    def default(self, source: str) -> Storage:
        """The storage that `auto` means, for weights of a dtype such as "float32"."""
        if self is Outside.CODES:
            return Storage.BITS_8
        wide = source in ("float32", "float64")
        return Storage.BFLOAT16 if self is Outside.HALF and wide else Storage.AS_IS

    def holds(self, storage: Storage) -> bool:
        """Whether weights can be stored so."""
        if self is Outside.ABSENT:
            return storage in (Storage.AUTO, Storage.AS_IS)
        return storage.bits is None or self is Outside.CODES


class AdapterRanks(enum.StrEnum):
    """The ranks that corrections have in a PEFT adapter."""

    OWN = "own"
    """Each layer its own, which the adapter's patterns tell."""
    PADDED = "padded"
    """One for all layers, filled up with zeros: for servers that ignore patterns."""
