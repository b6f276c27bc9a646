"""One safetensors file: its header, checked against its size, and plain reads and writes.

The format (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header size, a
JSON header {name: {dtype, shape, data_offsets}}, then the data without holes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import Tensor

from compress.errors import CheckpointError

if TYPE_CHECKING:
    from typing_extensions import Buffer

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
if hasattr(torch, "float8_e8m0fnu"):  # since torch 2.7
    CODES[torch.float8_e8m0fnu] = "F8_E8M0"
CHUNK = 1 << 24
_DTYPES = {code: dtype for dtype, code in CODES.items()}
_MAX_HEADER = 100_000_000
_MAX_READ = 1 << 30
FORMAT = MappingProxyType({"format": "pt"})
"""The metadata of files of torch's tensors."""


@dataclass(frozen=True)
class Entry:
    """The place of a tensor: its file, the offset of its first byte, its dtype and shape."""

    file: Path
    offset: int
    n_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, Entry]:
    """The entries of a file's header. Raises CheckpointError if header and size contradict each other."""
    size = path.stat().st_size
    with path.open("rb") as file:
        n_header = int.from_bytes(file.read(8), "little")
        if size < 8 or n_header > min(size - 8, _MAX_HEADER):
            raise CheckpointError(
                f"{path} is truncated or no safetensors file: its header does not fit its size"
            )
        raw = file.read(n_header)
    start = 8 + n_header
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        items = [*header.items()]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is corrupt: its header cannot be read ({error})") from error
    entries = {name: _entry(path, start, name, value) for name, value in items}
    _refuse_holes(path, size, start, entries)
    return entries


def _refuse_holes(path: Path, size: int, start: int, entries: Mapping[str, Entry]) -> None:
    end = start
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.n_bytes)):
        if entry.offset != end:
            raise CheckpointError(f"{path} is corrupt: its tensors overlap or leave holes")
        end += entry.n_bytes
    if end != size:
        state = "truncated" if end > size else "corrupt"
        raise CheckpointError(f"{path} is {state}: it should have {end} bytes and has {size}")


def _entry(path: Path, start: int, name: str, value: Any) -> Entry:
    """The place of a tensor. Raises CheckpointError naming the part of its entry that is wrong."""
    given = value if isinstance(value, dict) else {}
    dtype, shape, offsets = (given.get(key) for key in ("dtype", "shape", "data_offsets"))
    wrong = None
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        wrong = f"dtype is {dtype!r}; there are {', '.join(_DTYPES)}"
    elif not _are_sizes(shape):
        wrong = f"shape is {shape!r}; a list of whole numbers is right"
    elif not _are_sizes(offsets) or len(offsets) != 2:
        wrong = f"data_offsets is {offsets!r}; two whole numbers are right"
    else:
        n_bytes = math.prod(shape) * _DTYPES[dtype].itemsize
        if offsets[1] - offsets[0] == n_bytes:
            return Entry(path, start + offsets[0], n_bytes, _DTYPES[dtype], tuple(shape))
        wrong = f"data_offsets is {offsets}; {shape} of {dtype} takes {n_bytes} bytes"
    raise CheckpointError(f"{path} is corrupt: {name!r}: {wrong[:300]}; download it again")


def _are_sizes(found: object) -> TypeGuard[list[int]]:
    """Whether this is a list of whole numbers from 0 on."""
    return isinstance(found, list) and all(type(each) is int and each >= 0 for each in found)


def make_header(entries: Mapping[str, Entry], metadata: Mapping[str, str] = FORMAT) -> bytes:
    """The first bytes of a file that holds these tensors and this metadata, both in the order given."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, entry in entries.items():
        header[name] = {
            "dtype": CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [end, end + entry.n_bytes],
        }
        end += entry.n_bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_tensor(entry: Entry) -> Tensor:
    """The tensor in memory of its own. Raises CheckpointError if the file is too short for it."""
    raw = torch.empty(entry.n_bytes, dtype=torch.uint8)
    view, done = memoryview(cast("Buffer", raw.numpy())), 0
    with FileIO(entry.file) as file:
        file.seek(entry.offset)
        while done < len(view):
            n_read = file.readinto(view[done : done + _MAX_READ])
            if not n_read:
                raise CheckpointError(f"{entry.file} was cut short while it was being read")
            done += n_read
    return raw.view(entry.dtype).reshape(entry.shape)


def write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a small file whole: equal contents give equal bytes, which the safetensors library does not promise."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    entries, raw, end = {}, [], 0
    for name in order:
        tensor = tensors[name].detach().cpu().contiguous()
        shape = tuple(tensor.shape)
        entries[name] = Entry(path, end, tensor.nbytes, tensor.dtype, shape)
        raw.append(tensor.reshape(-1).view(torch.uint8))
        end += tensor.nbytes
    with FileIO(path, "w") as file:
        file.write(make_header(entries, {name: metadata[name] for name in sorted(metadata)}))
        for each in raw:
            write_bytes(file, each)


def write_bytes(file: FileIO, raw: Tensor) -> None:
    """Write a flat uint8 tensor."""
    view, done = memoryview(cast("Buffer", raw.numpy())), 0
    while done < len(view):
        done += file.write(view[done : done + _MAX_READ])


def copy_bytes(source: IO[bytes], target: IO[bytes], n_bytes: int) -> None:
    """Copy from where `source` stands. Raises CheckpointError if it ends before."""
    while n_bytes > 0:
        chunk = source.read(min(n_bytes, CHUNK))
        if not chunk:
            raise CheckpointError(f"{source.name} was cut short while it was being read")
        target.write(chunk)
        n_bytes -= len(chunk)
