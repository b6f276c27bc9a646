"""Where calibration text comes from: built-in prose, files, data sets of the Hugging Face hub.

Opening a source checks all of it (every line of a JSONL file is parsed once) but keeps only what is
needed to find a document again, so that a large file costs one pass and little memory.
"""

import hashlib
import math
import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from calibration.errors import InputError
from calibration.text.documents import Chats, Documents, Rows
from calibration.text.prose import python_docs
from calibration.text.tables import open_json_lines, open_parquet

BUILT_IN = "python-docs"

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


def open_source(
    source: TextSource, split: Split, *, n_tokens: int, seed: int
) -> Documents | Chats | Rows:
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
    from calibration.text.hub import read_hub

    return read_hub(source.spec, split.value, n_tokens=n_tokens, seed=seed)


def _open_built_in(split: Split) -> Documents:
    texts, provenance = python_docs(split.value)
    return Documents(texts, [len(text) for text in texts], provenance)


def _open_file(path: Path) -> Documents | Chats | Rows:
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
    return open_json_lines(path, provenance) if kind == "jsonl" else open_parquet(path, provenance)


def _open_text(path: Path, provenance: dict[str, Any]) -> Documents:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 text (byte {error.start}); convert it first"
        ) from error
    return Documents([text], [len(text)], provenance)
