"""Files with one document a row: JSONL and parquet.

Every row is checked once, but only what is needed to find it again is kept.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from calibration.errors import InputError
from calibration.text.documents import Documents, Rows

TEXT_FIELDS = ("text", "content")
IDS_FIELD = "input_ids"
MASK_FIELD = "attention_mask"
LABEL_FIELD = "label"


@dataclass(frozen=True)
class _JsonField(Sequence[Any]):
    """One field of every row of a JSONL file, read again from disk at each access."""

    path: Path
    name: str
    offsets: array[int]

    def __len__(self) -> int:
        return len(self.offsets)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        with self.path.open("rb") as file:
            file.seek(self.offsets[index])
            return json.loads(file.readline())[self.name]


def open_json_lines(path: Path, provenance: dict[str, Any]) -> Documents | Rows:
    """A JSONL file, every line of it checked. Raises InputError naming the line and what would be right."""
    offsets, lengths, name = array("q"), array("q"), ""
    first: dict[str, Any] = {}
    labelled, offset = True, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            start, offset = offset, offset + len(line)
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            row = _parse_line(line, where)
            if not offsets:
                name = choose_field(row, where)
                first = row
            offsets.append(start)
            lengths.append(_checked_length(row, name, where))
            if name == IDS_FIELD:
                _check_mask(row, first, where)
            labelled = labelled and _is_label(row.get(LABEL_FIELD))
    if not offsets:
        raise InputError(f"{path}: there is no row in the file")
    provenance = provenance | {"field": name, "rows": len(offsets)}
    values = _JsonField(path, name, offsets)
    labels = _JsonField(path, LABEL_FIELD, offsets) if labelled else None
    if name == IDS_FIELD:
        masks = _JsonField(path, MASK_FIELD, offsets) if MASK_FIELD in first else None
        return Rows(values, masks, provenance, labels)
    return Documents(values, lengths, provenance, labels)


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{where}: not valid JSON ({error}); one JSON object a line is wanted"
        ) from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: a JSON {type(row).__name__}; one JSON object a line is wanted")
    return row


def choose_field(names: Any, where: str) -> str:
    """The field to read, out of a row or a schema; InputError lists what there is."""
    for name in (*TEXT_FIELDS, IDS_FIELD):
        if name in names:
            return name
    raise InputError(
        f"{where}: no field 'text', 'content' or 'input_ids'; there are"
        f" {', '.join(map(str, names))}"
    )


def _checked_length(row: dict[str, Any], name: str, where: str) -> int:
    if name not in row:
        raise InputError(f"{where}: no field {name!r}, which the first row has")
    value = row[name]
    if name == IDS_FIELD:
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise InputError(f"{where}: {name!r} is not a list of whole numbers")
    elif not isinstance(value, str):
        raise InputError(f"{where}: {name!r} is {type(value).__name__}, not text")
    return len(value)


def _check_mask(row: dict[str, Any], first: dict[str, Any], where: str) -> None:
    if (MASK_FIELD in row) != (MASK_FIELD in first):
        raise InputError(f"{where}: some rows have {MASK_FIELD!r} and some have not")
    if MASK_FIELD in row and not isinstance(row[MASK_FIELD], list):
        raise InputError(f"{where}: {MASK_FIELD!r} is not a list")


def _is_label(value: Any) -> bool:
    """Whether a row's label is a class: a whole number; what else a file calls a label is not read."""
    return type(value) is int and abs(value) < 1 << 62


@dataclass(frozen=True)
class _Column(Sequence[Any]):
    """A column of an Arrow table; values become Python objects when asked for."""

    column: Any

    def __len__(self) -> int:
        return len(self.column)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.column[index].to_pylist()
        return self.column[index].as_py()


def open_parquet(path: Path, provenance: dict[str, Any]) -> Documents | Rows:
    """A parquet file. Raises InputError naming the column and what would be right."""
    # pyarrow is slow to import, and only this kind of source needs it.
    import pyarrow
    from pyarrow import compute, parquet

    try:
        names = parquet.read_schema(path).names
        name = choose_field(names, str(path))
        wanted = [name] + ([MASK_FIELD] if name == IDS_FIELD and MASK_FIELD in names else [])
        if LABEL_FIELD in names and pyarrow.types.is_integer(
            parquet.read_schema(path).field(LABEL_FIELD).type
        ):
            wanted.append(LABEL_FIELD)
        table = parquet.read_table(path, columns=wanted)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable parquet file ({error})") from error
    column = table.column(name)
    if len(column) == 0:
        raise InputError(f"{path}: there is no row in the file")
    if wanted[-1] == LABEL_FIELD and table.column(LABEL_FIELD).null_count:
        wanted.pop()  # some rows have no class: then the file has none
    if any(table.column(each).null_count for each in wanted):
        raise InputError(f"{path}: a row has no value in column {' or '.join(wanted)}")
    provenance = provenance | {"field": name, "rows": len(column)}
    labels = _Column(table.column(LABEL_FIELD)) if LABEL_FIELD in wanted else None
    if name == IDS_FIELD:
        if not (pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type)):
            raise InputError(
                f"{path}: column {name!r} holds {column.type}, not lists of whole numbers"
            )
        masks = _Column(table.column(MASK_FIELD)) if MASK_FIELD in wanted else None
        return Rows(_Column(column), masks, provenance, labels)
    if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
        raise InputError(f"{path}: column {name!r} holds {column.type}, not text")
    lengths = compute.utf8_length(column).to_pylist()
    return Documents(_Column(column), lengths, provenance, labels)
