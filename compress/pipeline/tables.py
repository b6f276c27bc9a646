"""Embeddings and heads in a run: their forms in each format, what a report says of them, and how they are written.

Shapes: v = rows of the vocabulary, d = hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor

from calibration.statistics.gram import Gram
from compress.callbacks import Progress
from compress.config.choices import OnFailure
from compress.embeddings.plan import OutsideBlocks, PlannedTable, Role, dtype_of
from compress.embeddings.quantise import TableForms, relative_error, table_forms
from compress.errors import LayerError
from compress.exports import Exporter, LayerExport
from compress.exports.storage import Storage
from compress.methods.gptq import GPTQ
from compress.methods.rtn import RTN
from compress.planning.plan import Plan
from compress.prepare.prepare import Prepared
from compress.report.report import LayerReport
from compress.survey.head_inputs import head_gram

T = TypeVar("T")
Placed = tuple[tuple[PlannedTable, Storage], ...]
"""What a format stores otherwise than the source, and how."""


@dataclass(frozen=True)
class Tables:
    """The forms of embeddings and heads in every storage that a run's formats ask for."""

    forms: Mapping[tuple[PlannedTable, Storage], TableForms] = field(
        default_factory=lambda: MappingProxyType({})
    )
    reports: tuple[LayerReport, ...] = ()
    """As the first format stores them."""

    notes: tuple[str, ...] = ()
    """What was left as it was after an error (--on-failure keep), with the formats and the error."""

    def storage(self, table: PlannedTable, export: str) -> Storage:
        """How a format stores a table: as the source does, where the planned storage failed."""
        planned = table.storage(export)
        return planned if (table, planned) in self.forms else Storage.AS_IS

    def placed_in(self, plan: Plan, export: str) -> Placed:
        """What a format stores otherwise than the source."""
        found = [(table, self.storage(table, export)) for table in plan.outside.tables]
        return tuple(entry for entry in found if entry[1] is not Storage.AS_IS)

    def of(self, placed: Placed) -> dict[PlannedTable, TableForms]:
        """The forms of these storages."""
        return {table: self.forms[table, storage] for table, storage in placed}


def make_tables(prepared: Prepared, exports: Sequence[str], progress: Progress) -> Tables:
    """Forms of all tables, on the CPU.

    Raises LayerError, unless the recipe keeps what fails, and InputError for text that cannot be walked.
    """
    forms: dict[tuple[PlannedTable, Storage], TableForms] = {}
    reports, notes = [], []
    for table in prepared.plan.outside.tables:
        for storage, found, seconds in _made(prepared, table, exports, progress):
            first = storage is table.storage(exports[0])
            if isinstance(found, LayerError):
                names = [name for name in exports if table.storage(name) is storage]
                notes.append(f"left as it was in {', '.join(names)} after an error: {found}")
                if first:
                    reports.append(_left(table, storage, found))
                continue
            made, error = found
            if first:
                reports.append(_report(table, exports[0], made, (error, seconds)))
            forms[table, storage] = _on_cpu(made)
    return Tables(forms, tuple(reports), tuple(notes))


Made = tuple[Storage, tuple[TableForms, float] | LayerError, float]
"""A storage, the forms and their relative error or what went wrong, and the seconds that they took."""


def _made(
    prepared: Prepared, table: PlannedTable, exports: Sequence[str], progress: Progress
) -> Iterator[Made]:
    """A table in each storage that a format asks for."""
    storages = list(dict.fromkeys(table.storage(name) for name in exports))
    gram = _tried(prepared, lambda: _gram(prepared, table, storages, progress))
    weight_vd = prepared.loader.tensors[table.tensor].to(prepared.device)
    for storage in storages:
        if storage is Storage.AS_IS:
            continue
        if isinstance(gram, LayerError) and storage.bits is not None:
            yield storage, gram, 0.0
            continue
        of_head = None if isinstance(gram, LayerError) else gram
        started = time.perf_counter()
        found = _tried(prepared, partial(table_forms, table, storage, weight_vd, of_head))
        seconds = time.perf_counter() - started
        if isinstance(found, LayerError):
            yield storage, found, 0.0
            continue
        metric = _of_head(table, of_head)
        error = relative_error(weight_vd, found.form, metric, _counts(prepared, table))
        yield storage, (found, error), seconds


def _tried(prepared: Prepared, make: Callable[[], T]) -> T | LayerError:
    """What is made, or the error that the recipe forgives."""
    try:
        return make()
    except LayerError as error:
        if prepared.recipe.on_failure is not OnFailure.KEEP:
            raise
        return error


def _on_cpu(found: TableForms) -> TableForms:
    correction = None if found.correction is None else found.correction.cpu()
    return TableForms(found.form.cpu(), correction)


def _gram(
    prepared: Prepared, table: PlannedTable, storages: Sequence[Storage], progress: Progress
) -> Gram | None:
    """The Gram of the head's inputs, where codes are made for a head."""
    if table.role is Role.EMBEDDINGS or all(storage.bits is None for storage in storages):
        return None
    return head_gram(prepared, table.head or table.name, progress)


def _of_head(table: PlannedTable, gram: Gram | None) -> Gram | None:
    """The Gram in which errors of a head of its own are measured."""
    return gram if table.role is Role.HEAD else None


def _counts(prepared: Prepared, table: PlannedTable) -> Tensor:
    """How often each token occurs in the calibration text: (v,), fp64."""
    tokens = prepared.tokens
    mask = tokens.attention_mask
    ids = tokens.input_ids if mask is None else tokens.input_ids[mask.bool()]
    counts_v = torch.bincount(ids.flatten(), minlength=table.shape[0])[: table.shape[0]]
    return counts_v.double().to(prepared.device)


def _report(
    table: PlannedTable, export: str, found: TableForms, measured: tuple[float, float]
) -> LayerReport:
    error, seconds = measured
    n_bytes, storage = table.bytes_in(export), table.storage(export)
    parts = [found.form] if found.correction is None else [found.form, found.correction]
    stored = " + ".join(part.describe() for part in parts)
    return LayerReport(
        name=table.name,
        shape=table.shape,
        method=_method(table, storage),
        form=str(storage) if storage.bits is None else stored,
        bytes_before=table.n_bytes,
        bytes_after=n_bytes,
        bits_per_weight=8 * n_bytes / (table.shape[0] * table.shape[1]),
        relative_error=error,
        seconds=seconds,
        note=_uses(table),
    )


def _left(table: PlannedTable, storage: Storage, error: LayerError) -> LayerReport:
    """Of a table that stays as the source has it, and why."""
    return LayerReport(
        name=table.name,
        shape=table.shape,
        method=_method(table, storage),
        form="left as it was",
        bytes_before=table.n_bytes,
        bytes_after=table.n_bytes,
        bits_per_weight=8 * table.n_bytes / (table.shape[0] * table.shape[1]),
        relative_error=None,
        seconds=0.0,
        note=f"{_uses(table)}; not compressed: {error}",
        failure=str(error),
    )


def _method(table: PlannedTable, storage: Storage) -> str:
    """What makes a storage: another dtype is a cast."""
    if storage.bits is None:
        return "cast"
    return RTN.name if table.role is Role.EMBEDDINGS else GPTQ.name


def _uses(table: PlannedTable) -> str:
    return f"{table.role}: {table.name} and {table.head}" if table.head else str(table.role)


def write_tables(
    prepared: Prepared, tables: Tables, exporters: Sequence[Exporter], progress: Progress
) -> None:
    """Write every embedding and head into every format, as it stores them."""
    n_tables = len(prepared.plan.outside.tables)
    for done, table in enumerate(prepared.plan.outside.tables):
        progress("write embeddings", done, n_tables)
        for exporter in exporters:
            _write(prepared, table, tables, exporter)
    if n_tables:
        progress("write embeddings", n_tables, n_tables)


def _write(prepared: Prepared, table: PlannedTable, tables: Tables, exporter: Exporter) -> None:
    storage = tables.storage(table, exporter.name)
    bias = prepared.subject.bias(table.head or table.name)
    if storage.bits is None:
        weight_vd, as_is = prepared.loader.tensors[table.tensor], storage is Storage.AS_IS
        exporter.add_tensor(
            f"{table.name}.weight", weight_vd if as_is else weight_vd.to(dtype_of(storage))
        )
        for copy in table.copies:
            if as_is:
                exporter.add_tensor(f"{table.head}.weight", prepared.loader.tensors[copy])
            else:
                exporter.leave_out(f"{table.head}.weight")
        if bias is not None:
            exporter.add_tensor(f"{table.head or table.name}.bias", bias)
        return
    found = tables.forms[table, storage]
    own = None if table.head else bias
    exporter.add_layer(LayerExport(table.name, found.form, own, transposed=False))
    if table.head:
        head = found.head(table.name)
        is_copied = bool(table.copies)
        exporter.add_layer(
            LayerExport(table.head, head, bias, transposed=False, in_source=is_copied)
        )


def as_written(plan: Plan, export: str, key: str, tensor: Tensor) -> Tensor:
    """A tensor that is copied, in the dtype that a format stores it in."""
    if key in plan.outside.narrowed and OutsideBlocks.narrows(export):
        return tensor.to(torch.bfloat16)
    return tensor
