"""Text from a data set of the Hugging Face hub, streamed no further than a calibration needs."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import datasets
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from calibration.errors import InputError
from calibration.text.chats import refuse_bad_messages
from calibration.text.documents import Chats, Documents, refuse_half_surrogates
from calibration.text.tables import CHAT_FIELDS, TEXT_FIELDS

_SHUFFLE_BUFFER = 10_000
_CHARACTERS_PER_TOKEN = 16
"""How much text is read for each token asked for: well above what any tokenizer needs."""

_PARTS = {"calibration": ("train",), "heldout": ("test", "validation")}


def read_hub(spec: str, part: str, *, n_tokens: int, seed: int) -> Documents | Chats:
    """Documents or chats of the data set "owner/name" or "owner/name@config".

    `part` "calibration" reads the split train, in an order shuffled by `seed` within a buffer of
    10,000 rows; "heldout" reads test, or else validation, in order. Raises InputError if the data
    set cannot be reached or has no such split or no text.
    """
    name, _, config = spec.partition("@")
    try:
        split = _choose_split(name, config or None, part)
        rows = datasets.load_dataset(name, config or None, split=split, streaming=True)
        if part == "calibration":
            rows = rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
        field, values = _read_until(iter(rows), _CHARACTERS_PER_TOKEN * n_tokens, spec)
    except InputError:
        raise
    except (OfflineModeIsEnabled, HfHubHTTPError, ConnectionError) as error:
        raise InputError(
            f"{spec}: no such file, and the hub cannot be asked for a data set of that name"
            f" ({error}); use python-docs, or a .txt, .jsonl or .parquet file"
        ) from error
    except (ValueError, FileNotFoundError) as error:
        raise InputError(
            f"{spec}: neither a file nor a data set of the hub that can be read ({error})"
        ) from error
    provenance = {
        "source": name,
        "kind": "hub",
        "config": config or None,
        "split": split,
        "field": field,
        "order": f"shuffled in a buffer of {_SHUFFLE_BUFFER}" if part == "calibration" else "as is",
    }
    if field in CHAT_FIELDS:
        return Chats(values, lambda index: f"{spec}: row {index}", provenance)
    return Documents(values, [len(text) for text in values], provenance)


def _choose_split(name: str, config: str | None, part: str) -> str:
    there_are = datasets.get_dataset_split_names(name, config)
    for split in _PARTS[part]:
        if split in there_are:
            return split
    raise InputError(
        f"{name}: no split {' or '.join(_PARTS[part])}; there are {', '.join(there_are)}"
    )


def _read_until(
    rows: Iterator[dict[str, Any]], n_characters: int, spec: str
) -> tuple[str, list[Any]]:
    """The field that is read, and its values until there are so many characters."""
    first = next(rows, None)
    if first is None:
        raise InputError(f"{spec}: the data set has no rows")
    field = next((name for name in (*TEXT_FIELDS, *CHAT_FIELDS) if name in first), None)
    if field is None:
        raise InputError(
            f"{spec}: no field 'text', 'content', 'messages' or 'conversations'; there are {', '.join(first)}"
        )
    values: list[Any] = []
    total = 0
    for row in chain([first], rows):
        total += _checked_length(row.get(field), field, f"{spec}: row {len(values)}")
        values.append(row[field])
        if total >= n_characters:
            break
    return field, values


def _checked_length(value: Any, field: str, where: str) -> int:
    """Characters of a text, or of all that is said in a chat."""
    if field in CHAT_FIELDS:
        refuse_bad_messages(value, field, where)
        return sum(len(part) for entry in value for part in entry.values() if isinstance(part, str))
    if not isinstance(value, str):
        raise InputError(f"{where}: {field!r} is not text")
    refuse_half_surrogates(value, where)
    return len(value)
