"""Where calibration text comes from: built-in prose, files, data sets of the Hugging Face hub.

Opening a source checks all of it (every line of a JSONL file is parsed once) but keeps only what is
needed to find a document again, so that a large file costs one pass and little memory.
"""

import hashlib
import json
import math
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, overload

from calibration.errors import InputError
from calibration.prose import python_docs

BUILT_IN = "python-docs"
TEXT_FIELDS = ("text", "content")
IDS_FIELD = "input_ids"
MASK_FIELD = "attention_mask"

_FILE_KINDS = {".txt": "text", ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
_ACCEPTED = (
    f"{BUILT_IN}, a .txt, .jsonl or .parquet file, or a data set of the hub (owner/name, or"
    " owner/name@config)"
)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w.-]+)?")


class Split(Enum):
    """Which part of a source: to learn from, or to judge by. A plain file has only one part."""

    CALIBRATION = "calibration"
    HELDOUT = "heldout"


@dataclass(frozen=True)
class TextSource:
    """A source as the user wrote it, and its share among several (any positive number)."""

    spec: str
    weight: float = 1.0


@dataclass(frozen=True)
class Documents:
    """Texts in a fixed order, each fetched when asked for, with their lengths in characters."""

    texts: Sequence[str]
    lengths: Sequence[int]
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rows:
    """Ready token ids, one sequence each, in a fixed order; `masks` has as many, or is None."""

    ids: Sequence[Sequence[int]]
    masks: Sequence[Sequence[int]] | None
    provenance: dict[str, Any] = field(default_factory=dict)


def parse_source(text: str) -> TextSource:
    """Read "spec" or "spec:weight"; raises InputError for an empty spec or a bad weight."""
    spec, colon, suffix = text.rpartition(":")
    if not colon or Path(text).exists() or "/" in suffix or "\\" in suffix:
        spec, suffix = text, "1"
    spec = spec.strip()
    if not spec:
        raise InputError(f"calibration: {text!r} names no source; there are {_ACCEPTED}")
    try:
        weight = float(suffix)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise InputError(
            f"calibration: {text!r} has weight {suffix!r}; a weight is a positive number, as in"
            f" {spec}:0.5"
        )
    return TextSource(spec, weight)


def open_source(source: TextSource, split: Split, *, n_tokens: int, seed: int) -> Documents | Rows:
    """Open and check a source.

    `n_tokens` and `seed` matter to hub data sets only: they are streamed in a seeded order, and no
    further than needed. Raises InputError, naming the source (and line) and what would be right.
    """
    if source.spec == BUILT_IN:
        return _open_built_in(split)
    path = Path(source.spec).expanduser()
    if path.is_file():
        return _open_file(path)
    if path.is_dir():
        raise InputError(f"{source.spec}: this is a folder; name a file in it. Text is {_ACCEPTED}")
    if path.suffix in _FILE_KINDS or not _HUB_NAME.fullmatch(source.spec):
        raise InputError(f"{source.spec}: no such file. Text is {_ACCEPTED}")
    # datasets takes seconds to import, and only this kind of source needs it.
    from calibration.hub import read_hub

    texts, provenance = read_hub(source.spec, split.value, n_tokens=n_tokens, seed=seed)
    return Documents(texts, [len(text) for text in texts], provenance)


def _open_built_in(split: Split) -> Documents:
    texts, provenance = python_docs(split.value)
    return Documents(texts, [len(text) for text in texts], provenance)


def _open_file(path: Path) -> Documents | Rows:
    kind = _FILE_KINDS.get(path.suffix)
    if kind is None:
        raise InputError(
            f"{path}: files of type {path.suffix or '(none)'!r} are not read. Text is {_ACCEPTED}"
        )
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    provenance = {
        "source": str(path),
        "kind": kind,
        "sha256": digest,
        "bytes": path.stat().st_size,
    }
    if kind == "text":
        return _open_text(path, provenance)
    return (
        _open_json_lines(path, provenance) if kind == "jsonl" else _open_parquet(path, provenance)
    )


def _open_text(path: Path, provenance: dict[str, Any]) -> Documents:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 text (byte {error.start}); convert it first"
        ) from error
    return Documents([text], [len(text)], provenance)


@dataclass(frozen=True)
class _JsonField(Sequence[Any]):
    """One field of every row of a JSONL file, read again from disk at each access."""

    path: Path
    name: str
    offsets: "array[int]"

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


def _open_json_lines(path: Path, provenance: dict[str, Any]) -> Documents | Rows:
    offsets, lengths, name = array("q"), array("q"), ""
    first: dict[str, Any] = {}
    offset = 0
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
    if not offsets:
        raise InputError(f"{path}: there is no row in the file")
    provenance = provenance | {"field": name, "rows": len(offsets)}
    values = _JsonField(path, name, offsets)
    if name == IDS_FIELD:
        masks = _JsonField(path, MASK_FIELD, offsets) if MASK_FIELD in first else None
        return Rows(values, masks, provenance)
    return Documents(values, lengths, provenance)


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


def _open_parquet(path: Path, provenance: dict[str, Any]) -> Documents | Rows:
    # pyarrow is slow to import, and only this kind of source needs it.
    import pyarrow
    from pyarrow import compute, parquet

    try:
        names = parquet.read_schema(path).names
        name = choose_field(names, str(path))
        wanted = [name] + ([MASK_FIELD] if name == IDS_FIELD and MASK_FIELD in names else [])
        table = parquet.read_table(path, columns=wanted)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable parquet file ({error})") from error
    column = table.column(name)
    if len(column) == 0:
        raise InputError(f"{path}: there is no row in the file")
    if any(table.column(each).null_count for each in wanted):
        raise InputError(f"{path}: a row has no value in column {' or '.join(wanted)}")
    provenance = provenance | {"field": name, "rows": len(column)}
    if name == IDS_FIELD:
        if not (pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type)):
            raise InputError(
                f"{path}: column {name!r} holds {column.type}, not lists of whole numbers"
            )
        masks = _Column(table.column(MASK_FIELD)) if MASK_FIELD in wanted else None
        return Rows(_Column(column), masks, provenance)
    if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
        raise InputError(f"{path}: column {name!r} holds {column.type}, not text")
    return Documents(_Column(column), compute.utf8_length(column).to_pylist(), provenance)
