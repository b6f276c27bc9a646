"""Dataclasses that are read from JSON as strictly as they are written: of the right type, complete, nothing unknown.

`STRICT` is the configuration of such a class. Its fields' docstrings become the descriptions of a JSON Schema.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from compress.errors import CheckpointError

STRICT = ConfigDict(strict=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
_MOST = 60
T = TypeVar("T")


def read_strictly(kind: type[T], text: str, name: str) -> T:
    """A `kind` from the text of a JSON file. `name`: what the text is, in messages: "report".

    Raises:
        CheckpointError: not JSON, or a value that is missing, unknown or of another type, with its path.
    """
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        raise CheckpointError(_sentence(error, name)) from None


def _sentence(error: ValidationError, name: str) -> str:
    """One sentence about the first object that is wrong."""
    found = error.errors(include_url=False)
    first = found[0]
    if first["type"] == "json_invalid":
        return f"{name}: not JSON: {first['ctx']['error']}"
    if first["type"] == "missing" and isinstance(first["loc"][-1], int):
        return f"{_path(name, first['loc'][:-1])}: {_shown(first['input'])} has too few values"
    beside = [it for it in found if it["loc"][:-1] == first["loc"][:-1]]
    unknown = [str(it["loc"][-1]) for it in beside if it["type"] == "unexpected_keyword_argument"]
    missing = [str(it["loc"][-1]) for it in beside if it["type"] == "missing"]
    if not unknown and not missing:
        return f"{_path(name, first['loc'])}: {_shown(first['input'])} does not fit: {first['msg']}"
    wrong = [f"unknown {', '.join(sorted(unknown))}"] if unknown else []
    wrong += [f"missing {', '.join(missing)}"] if missing else []
    return f"{_path(name, first['loc'][:-1])}: {'; '.join(wrong)}"


def _path(name: str, places: tuple[int | str, ...]) -> str:
    """The path of a value: "report.layers[2].shape"."""
    return name + "".join(f"[{it}]" if isinstance(it, int) else f".{it}" for it in places)


def _shown(value: Any) -> str:
    """A value of the file, cut to a few words."""
    text = repr(dict(value) if isinstance(value, Mapping) else value)
    return text if len(text) <= _MOST else f"{text[:_MOST]}..."
