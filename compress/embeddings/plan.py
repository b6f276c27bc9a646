"""Which matrices outside the blocks are stored otherwise than in the source, and the bytes they take.

Shapes: v = rows of the vocabulary, d = hidden size.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import nn

from calibration.skeleton import PartLoader
from compress.errors import RecipeError
from compress.exports.base import EXPORTS
from compress.exports.storage import Outside, Storage
from compress.families.correction import Correction
from compress.families.quantiser import GROUP_SIZES, WHOLE_ROW
from compress.methods.eora import EoRA
from compress.methods.gptq import GPTQ
from compress.models.checkpoint import Tensors

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of matrices that are compressed."""


class Role(enum.StrEnum):
    """What a matrix of the vocabulary is used for."""

    EMBEDDINGS = "embeddings"
    HEAD = "head"
    TIED = "embeddings and head"


@dataclass(frozen=True)
class PlannedTable:
    """A matrix with a row for each token of the vocabulary, and how it is to be stored."""

    name: str
    """The module: "model.embed_tokens"."""
    tensor: str
    """The name of its weight in the checkpoint."""
    shape: tuple[int, int]
    """(v, d)."""
    n_bytes: int
    """Bytes in the checkpoint, of copies too."""
    dtype: torch.dtype
    role: Role
    asked: Storage
    """The value of the option, which each format settles."""
    head: str = ""
    """The module of the head that shares the weight; empty if none does."""
    copies: tuple[str, ...] = ()
    """Names in the checkpoint of equal tensors, as of a tied head that is stored too: only `as-is` keeps these."""
    correction: EoRA | None = None
    """The correction of a head in fewer than 8 bits, if the run's method makes any."""

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names in the checkpoint of its weight and of copies of it."""
        return self.tensor, *self.copies

    def storage(self, export: str) -> Storage:
        """How a format stores it."""
        if self.asked is not Storage.AUTO:
            return self.asked
        kind = EXPORTS[export]
        found = kind.traits.outside.default(str(self.dtype).removeprefix("torch."))
        if found.bits is not None and kind.problem_of_table(self, found.bits):
            return Storage.AS_IS
        return found if self._bytes_in(found, export) < self.n_bytes else Storage.AS_IS

    def bytes_in(self, export: str) -> int:
        """Bytes that a format takes for it, the correction of its head included."""
        return self._bytes_in(self.storage(export), export)

    def _bytes_in(self, storage: Storage, export: str) -> int:
        (v, d), bits = self.shape, storage.bits
        if storage is Storage.AS_IS:
            return self.n_bytes
        if bits is None:
            return v * d * dtype_of(storage).itemsize
        correction = self.correction_in(storage)
        more = 0 if correction is None else correction.adapter_bytes(self.shape)
        return EXPORTS[export].table_bytes(self, bits) + more

    def correction_in(self, storage: Storage) -> EoRA | None:
        """The correction that a storage gets: 8 bits and floats lose nothing that is worth its bytes."""
        return self.correction if (storage.bits or 8) < 8 else None

    def is_corrected(self, bits: int) -> bool:
        """Whether a storage of so many bits gets a correction."""
        return self.correction_in(Storage(str(bits))) is not None

    def quantiser(self, bits: int) -> GPTQ:
        """The method of its codes: a scale for each row in 8 bits, else for the largest group that divides d."""
        d = self.shape[1]
        fitting = [size for size in GROUP_SIZES if d % size == 0]
        return GPTQ(bits=bits, group_size=WHOLE_ROW if bits == 8 or not fitting else fitting[0])


@dataclass(frozen=True)
class OutsideBlocks:
    """Everything that is stored otherwise than in the source, and is no layer that a method compresses."""

    tables: tuple[PlannedTable, ...] = ()
    narrowed: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    """Tensors in fp32 whose values are all bf16 numbers, with the bytes that bf16 saves."""

    budgeted: str = "native"
    """The format whose bytes a budget for the whole checkpoint counts."""

    def saved_bytes(self, export: str) -> int:
        """Bytes by which a format stores all of this smaller than the source."""
        narrowed = sum(self.narrowed.values()) if self.narrows(export) else 0
        return narrowed + sum(t.n_bytes - t.bytes_in(export) for t in self.tables)

    @staticmethod
    def narrows(export: str) -> bool:
        """Whether a format stores fp32 tensors in bf16 where nothing is lost."""
        return EXPORTS[export].traits.outside in (Outside.CODES, Outside.HALF)


def planned_tables(
    loader: PartLoader,
    reader: Tensors,
    asked: tuple[Storage, Storage],
    exports: Sequence[str],
    method: object,
) -> tuple[PlannedTable, ...]:
    """Embeddings and head, as the options `asked` (embeddings, head) want them, without those that no format changes.

    Raises RecipeError for a storage that a format does not hold, and for two storages of one tied weight.
    """
    for option, storage in zip(("embeddings", "head"), asked, strict=True):
        _refuse_unfit(option, storage, exports)
    found = _tables(loader, reader)
    rank = method.resolved_rank if isinstance(method, Correction) else 0
    correction = EoRA(rank=rank) if rank else None
    tables = []
    for table in found:
        storage = _storage_of(table, asked)
        has_head = table.role is not Role.EMBEDDINGS
        small = correction if rank and rank < min(table.shape) and has_head else None
        planned = replace(table, asked=storage, correction=small)
        _refuse_table(planned, exports)
        tables.append(planned)
    return tuple(t for t in tables if any(t.storage(name) is not Storage.AS_IS for name in exports))


def _storage_of(table: PlannedTable, asked: tuple[Storage, Storage]) -> Storage:
    embeddings, head = asked
    if table.role is Role.EMBEDDINGS:
        return embeddings
    if table.role is Role.HEAD:
        return head
    if Storage.AUTO not in asked and embeddings is not head:
        raise RecipeError(
            f"{head}, but {table.head} is tied to {table.name}, which is asked for as {embeddings}: they are stored "
            "once; give one of the two, or the same for both",
            option="head",
        )
    return head if embeddings is Storage.AUTO else embeddings


def _refuse_unfit(option: str, storage: Storage, exports: Sequence[str]) -> None:
    """Raises RecipeError for a storage that one of the formats does not hold."""
    for name in exports:
        outside = EXPORTS[name].traits.outside
        if outside.holds(storage):
            continue
        fit = [s for s in Storage if outside.holds(s)]
        raise RecipeError(
            f"{storage}, which the {name} format does not hold; it holds {', '.join(fit)}",
            option=option,
        )


def _refuse_table(table: PlannedTable, exports: Sequence[str]) -> None:
    """Raises RecipeError for codes that were asked for, and that one of the formats cannot make of this matrix."""
    bits = table.asked.bits
    if bits is None:
        return
    for name in exports:
        if problem := EXPORTS[name].problem_of_table(table, bits):
            raise RecipeError(
                f"{bits} bits for {table.name}, which the {name} format does not hold: {problem}",
                option="embeddings" if table.role is Role.EMBEDDINGS else "head",
            )


def _tables(loader: PartLoader, reader: Tensors) -> list[PlannedTable]:
    """The input embeddings and the head, if they are matrices with a row for each token."""
    model, keys = loader.model, loader.keys_of()
    modules = {id(module): name for name, module in model.named_modules()}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    found = []

    def add(module: nn.Module, role: Role, tied: str = "") -> None:
        name = modules[id(module)]
        tensors = keys.get(f"{name}.weight", [])
        if len(tensors) != 1 or reader.dtype(tensors[0]) not in FLOATS:
            return
        shape, dtype = reader.shape(tensors[0]), reader.dtype(tensors[0])
        copies = tuple(keys.get(f"{tied}.weight", ()))
        size = sum(reader.nbytes(tensor) for tensor in (*tensors, *copies))
        v, d = int(shape[0]), int(shape[1])
        found.append(
            PlannedTable(name, tensors[0], (v, d), size, dtype, role, Storage.AUTO, tied, copies)
        )

    weight = "" if head is None else f"{modules[id(head)]}.weight"
    # One that is tied and stored all the same is equal: `open_parts` has looked.
    has_own = weight in keys and weight not in loader.tied
    is_linear = isinstance(head, nn.Linear)
    # Others hold more than their rows, such as a norm (Inkling).
    if isinstance(embeddings, nn.Embedding) and len(list(embeddings.parameters())) == 1:
        tied = modules[id(head)] if is_linear and head is not None and not has_own else ""
        if head is None or has_own or tied:
            add(embeddings, Role.TIED if tied else Role.EMBEDDINGS, tied)
    if has_own and is_linear and head is not None:
        add(head, Role.HEAD)
    return found


def dtype_of(storage: Storage) -> torch.dtype:
    """The dtype of a storage in floats."""
    found: torch.dtype = getattr(torch, storage.value)
    return found


def narrowed(reader: Tensors, taken: frozenset[str]) -> dict[str, int]:
    """The fp32 tensors, those `taken` apart, whose values are all bf16 numbers, with the bytes that bf16 saves.

    Others stay: rounding what a model has trained in fp32 changes its outputs for a saving that is hardly one.
    """
    return {
        key: reader.nbytes(key) // 2
        for key in reader
        if key not in taken and reader.dtype(key) is torch.float32 and _is_bfloat16(reader[key])
    }


def _is_bfloat16(tensor: torch.Tensor) -> bool:
    return all(
        bool((part == part.to(torch.bfloat16)).all()) for part in tensor.flatten().split(1 << 22)
    )
