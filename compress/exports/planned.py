"""A plan as export formats see it: what will be compressed, what is copied, and the bytes of everything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from compress.families.base import Compressor
    from compress.families.quantiser import Quantiser


class PlannedLayer(Protocol):
    """A layer that will be compressed; all bytes are of its weight."""

    @property
    def name(self) -> str:
        """In the model."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    @property
    def compressor(self) -> Compressor:
        """The method that makes its form, with all options settled."""

    @property
    def native_bytes(self) -> int:
        """Bytes of its form as it is."""

    @property
    def correction_bytes(self) -> int:
        """Bytes of the low-rank correction in its form; 0 without one."""

    @property
    def padded_rank(self) -> int | None:
        """The rank that zeros fill its factors up to in an adapter; None where each layer has its own."""

    @property
    def adapter_bytes(self) -> int:
        """Bytes of that correction in a PEFT adapter, which holds 16 bits a number."""


class KeptTensor(Protocol):
    """A tensor that is copied."""

    @property
    def name(self) -> str:
        """In the checkpoint that it is copied from."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""

    @property
    def n_bytes(self) -> int:
        """As stored."""


class Planned(Protocol):
    """A plan, as far as it tells what an export will hold."""

    @property
    def layers(self) -> Sequence[PlannedLayer]:
        """The layers that are compressed."""

    def kept_in(self, export: str) -> Sequence[KeptTensor]:
        """The tensors that a format copies as numbers."""

    def rest_bytes(self, export: str) -> int:
        """Bytes of everything but these layers in a format."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most of the source is stored in."""

    @property
    def config(self) -> PretrainedConfig | None:
        """The model's configuration; None for a plan of bare layers."""


class VocabularyMatrix(Protocol):
    """Embeddings or a head: a matrix with a row for each token."""

    @property
    def name(self) -> str:
        """The module: "model.embed_tokens"."""

    @property
    def shape(self) -> tuple[int, int]:
        """(tokens, hidden size)."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the source."""

    def quantiser(self, bits: int) -> Quantiser:
        """The method of its codes."""

    def is_corrected(self, bits: int) -> bool:
        """Whether a head in so many bits gets a low-rank correction of its own."""


@dataclass(frozen=True, kw_only=True)
class MadeOf:
    """Facts on a result that names of repositories tell."""

    bits: int | None
    """Bits of the codes; None without codes, or where widths differ."""
    method: str
    """The method as its paper writes it: "EoRA"."""
    rank: int | None
    """The highest rank of a correction; None without one."""
