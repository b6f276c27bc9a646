"""Checks of a GGUF file's metadata against its tensors, before anything is made of either.

The sizes in the metadata are what a model is built with: a damaged one asks for more memory or blocks than there are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CheckpointError

if TYPE_CHECKING:
    from gguf import GGUFReader

_POSITIVE = ("block_count", "embedding_length", "attention.head_count", "context_length")
"""Sizes that every decoder has."""
_WITHIN = (
    *("embedding_length", "feed_forward_length", "expert_feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length"),
    *("attention.value_length", "rope.dimension_count", "expert_count", "expert_used_count"),
)
"""Sizes that no dimension of a tensor falls short of, in all tensors together."""
_LONGEST = (1 << 31) - 1
_BLOCK = re.compile(r"blk\.(\d+)\.")
TOKENS = "tokenizer.ggml.tokens"
_TEXTS = (TOKENS, "tokenizer.ggml.merges", "tokenizer.ggml.pre", "tokenizer.chat_template")


def refuse_other_kinds(path: Path, reader: GGUFReader) -> None:
    """Raises CheckpointError unless it is a whole model in one file, with a tokenizer, and of possible sizes."""
    if field_of(reader, "general.architecture") is None or not reader.tensors:
        raise CheckpointError(
            f"{path}: this GGUF file holds no model (no general.architecture, or no tensors)"
        )
    kind = field_of(reader, "general.type")
    if kind not in (None, "model"):
        raise CheckpointError(f"{path}: this GGUF file holds a {kind}, not a model")
    n_files = field_of(reader, "split.count")
    if n_files is not None and int(n_files) > 1:
        raise CheckpointError(
            f"{path}: this is one of {n_files} parts; join them with `llama-gguf-split --merge`"
        )
    tokens = reader.get_field(TOKENS)
    if tokens is None or not len(tokens.data):
        raise CheckpointError(
            f"{path}: this GGUF file has no tokenizer ({TOKENS} is "
            f"{'absent' if tokens is None else 'empty'}); text needs one"
        )
    for key in _TEXTS:
        try:
            field_of(reader, key)
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{path}: {key} holds text that is no UTF-8 ({error}); the file is damaged, download it again"
            ) from error
    for key, value, right in _impossible(reader):
        raise CheckpointError(
            f"{path}: {key} is {value}, {right}; the file is damaged, download it again"
        )


def _impossible(reader: GGUFReader) -> Iterator[tuple[str, object, str]]:
    """Sizes that cannot be true: their key, their value, and what would be right."""
    prefix = str(field_of(reader, "general.architecture"))
    largest = max(max(map(int, tensor.shape), default=1) for tensor in reader.tensors)
    blocks = {int(found[1]) for each in reader.tensors if (found := _BLOCK.match(each.name))}
    for name in dict.fromkeys((*_POSITIVE, *_WITHIN)):
        key = f"{prefix}.{name}"
        for value in _values(field_of(reader, key)):
            if not isinstance(value, int):
                yield key, repr(value), "which is no whole number"
            elif value < (name in _POSITIVE):
                yield key, value, f"which is less than {int(name in _POSITIVE)}"
            elif name in _WITHIN and value > largest:
                yield key, value, f"but no tensor has a dimension above {largest}"
            elif value > _LONGEST:
                yield key, value, f"which is more than {_LONGEST}"
            elif name == "block_count" and value > len(blocks):
                yield key, value, f"but there are tensors of {len(blocks)} blocks"


def _values(value: Any) -> list[Any]:
    """The value of each layer, or the one of all; none if it is absent."""
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def field_of(reader: GGUFReader, key: str) -> Any:
    """An entry of the metadata; None if it is absent. Raises UnicodeDecodeError for text that is none."""
    field = reader.get_field(key)
    return None if field is None else field.contents()
