"""Files with one document, chat or sequence of ids a row: JSONL and parquet.

Every row is checked once, but only what is needed to find it again is kept.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from calibration.errors import InputError
from calibration.text.chats import refuse_bad_messages
from calibration.text.documents import Chats, Documents, Rows, refuse_half_surrogates

TEXT_FIELDS = ("text", "content")
IDS_FIELD = "input_ids"
CHAT_FIELDS = ("messages", "conversations")
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


def open_json_lines(path: Path, provenance: dict[str, Any]) -> Documents | Chats | Rows:
    """A JSONL file, every line of it checked. Raises InputError naming the line and what would be right."""
    offsets, lengths, numbers, name = array("q"), array("q"), array("q"), ""
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
            numbers.append(number)
            lengths.append(_checked_length(row, name, where))
            if name == IDS_FIELD:
                _check_mask(row, first, where)
            labelled = labelled and _is_label(row.get(LABEL_FIELD))
    if not offsets:
        raise InputError(f"{path}: there is no row in the file")
    provenance = provenance | {"field": name, "rows": len(offsets)}
    values = _JsonField(path, name, offsets)
    if name in CHAT_FIELDS:
        return Chats(values, lambda index: f"{path}, line {numbers[index]}", provenance)
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
    for name in (*TEXT_FIELDS, IDS_FIELD, *CHAT_FIELDS):
        if name in names:
            return name
    raise InputError(
        f"{where}: no field 'text', 'content', 'input_ids', 'messages' or 'conversations'; there are"
        f" {', '.join(map(str, names))}"
    )


def _checked_length(row: dict[str, Any], name: str, where: str) -> int:
    if name not in row:
        raise InputError(f"{where}: no field {name!r}, which the first row has")
    value = row[name]
    if name == IDS_FIELD:
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise InputError(f"{where}: {name!r} is not a list of whole numbers")
    elif name in CHAT_FIELDS:
        refuse_bad_messages(value, name, where)
    elif not isinstance(value, str):
        raise InputError(f"{where}: {name!r} is {type(value).__name__}, not text")
    else:
        refuse_half_surrogates(value, where)
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


def open_parquet(path: Path, provenance: dict[str, Any]) -> Documents | Chats | Rows:
    """A parquet file. Raises InputError naming the column and what would be right."""
    # pyarrow is slow to import, and only this kind of source needs it.
    import pyarrow
    from pyarrow import compute, parquet

    try:
        names = parquet.read_schema(path).names
        name = choose_field(names, str(path))
        table = parquet.read_table(path, columns=_wanted(parquet.read_schema(path), name))
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable parquet file ({error})") from error
    column = table.column(name)
    if len(column) == 0:
        raise InputError(f"{path}: there is no row in the file")
    labelled = LABEL_FIELD in table.column_names and not table.column(LABEL_FIELD).null_count
    # A row without a class: then the file has none.
    read = [each for each in table.column_names if labelled or each != LABEL_FIELD]
    if any(table.column(each).null_count for each in read):
        raise InputError(f"{path}: a row has no value in column {' or '.join(read)}")
    _refuse_bad_utf8(table, path)
    provenance = provenance | {"field": name, "rows": len(column)}
    labels = _Column(table.column(LABEL_FIELD)) if labelled else None
    if name == IDS_FIELD:
        for each in (name, *(each for each in read if each == MASK_FIELD)):
            _refuse_other_type(
                table.column(each).type, each, _is_list, "lists of whole numbers", path
            )
        masks = _Column(table.column(MASK_FIELD)) if MASK_FIELD in read else None
        return Rows(_Column(column), masks, provenance, labels)
    if name in CHAT_FIELDS:
        return _parquet_chats(column, name, path, provenance)
    _refuse_other_type(column.type, name, _is_string, "text", path)
    lengths = compute.utf8_length(column).to_pylist()
    return Documents(_Column(column), lengths, provenance, labels)


def _wanted(schema: Any, name: str) -> list[str]:
    """The columns to read: the field, its mask, and classes if they are whole numbers."""
    from pyarrow import types

    wanted = [name]
    if name == IDS_FIELD and MASK_FIELD in schema.names:
        wanted.append(MASK_FIELD)
    if LABEL_FIELD in schema.names and types.is_integer(schema.field(LABEL_FIELD).type):
        wanted.append(LABEL_FIELD)
    return wanted


def _parquet_chats(column: Any, name: str, path: Path, provenance: dict[str, Any]) -> Chats:
    _refuse_other_type(column.type, name, _is_list, "lists of messages", path)
    values = _Column(column)
    for index, value in enumerate(values):
        refuse_bad_messages(value, name, f"{path}, row {index}")
    return Chats(values, lambda index: f"{path}, row {index}", provenance)


def _refuse_bad_utf8(table: Any, path: Path) -> None:
    import pyarrow

    try:
        table.validate(full=True)
    except pyarrow.ArrowInvalid as error:
        raise InputError(
            f"{path}: a column is not what the file says ({error}); write the text as valid UTF-8"
        ) from error


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind))


def _is_string(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_string(kind) or types.is_large_string(kind))


def _refuse_other_type(
    kind: Any, name: str, is_right: Callable[[Any], bool], words: str, path: Path
) -> None:
    if not is_right(kind):
        raise InputError(f"{path}: column {name!r} holds {kind}, not {words}")
