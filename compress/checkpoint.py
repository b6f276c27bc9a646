"""Checkpoints on disk: a lazy, distrustful reader of safetensors folders, and a writer of bounded memory.

The file format (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header size, a JSON header
{name: {dtype, shape, data_offsets}}, then the data without holes. Tensors are read with plain reads, not mapped: a
mapped file counts as memory of the process, and one that shrinks meanwhile kills it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from torch import Tensor

from compress.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000
_CHUNK = 1 << 24
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies: its file, the offset of its first byte in it, and what the bytes mean."""

    file: Path
    offset: int
    n_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Reader(Mapping[str, Tensor]):
    """The tensors of a Hugging Face folder by their names on disk, each read when asked for.

    Opening it checks everything but the values: every shard is there, inside the folder, whole, and holds what the
    index says.
    """

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError if the folder is not a whole safetensors checkpoint."""
        self.folder = Path(folder)
        index = _weight_map(self.folder)
        names = sorted(set(index.values())) if index is not None else ["model.safetensors"]
        self.shards = tuple(_inside(self.folder, name) for name in names)
        self._entries: dict[str, _Entry] = {}
        for name, shard in zip(names, self.shards, strict=True):
            for tensor, entry in _read_header(shard).items():
                if index is not None and index.get(tensor, name) != name:
                    continue  # the index says that another shard's copy counts
                if tensor in self._entries:
                    raise CheckpointError(f"{self.folder}: {tensor} is in two shards, and the index names neither")
                self._entries[tensor] = entry
        absent = sorted(set(index or ()) - set(self._entries))
        if index is not None and absent:
            raise CheckpointError(
                f"{self.folder / index[absent[0]]} lacks {_some(absent)}, which the index says it holds; "
                "the checkpoint is incomplete, get it again"
            )

    def __getitem__(self, name: str) -> Tensor:
        """The tensor, read now into memory of its own. Raises KeyError; CheckpointError if the file has shrunk."""
        entry = self._entries[name]
        raw = torch.empty(entry.n_bytes, dtype=torch.uint8)
        with entry.file.open("rb", buffering=0) as file:
            file.seek(entry.offset)
            _read_into(file, raw, entry.file)
        return raw.view(entry.dtype).reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def nbytes(self, name: str) -> int:
        """Bytes of the tensor's data."""
        return self._entries[name].n_bytes

    def dtype(self, name: str) -> torch.dtype:
        """Its dtype, without reading the data."""
        return self._entries[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, without reading the data."""
        return self._entries[name].shape

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.n_bytes for entry in self._entries.values())

    def fingerprint(self) -> str:
        """Hex sha256 of config.json and of every shard's name, size and bytes (reads everything once)."""
        digest = hashlib.sha256()
        config = self.folder / "config.json"
        digest.update(config.read_bytes() if config.is_file() else b"")
        for shard in self.shards:
            digest.update(f"\0{shard.name}\0{shard.stat().st_size}\0".encode())
            with shard.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
        return digest.hexdigest()


class Writer:
    """Writes `<stem>.safetensors`, or shards and their index, holding one tensor in memory at a time.

    Data goes to a scratch file as it comes; a full shard is put in order from it (the order and bytes of the safetensors
    library). Final names appear in `close`, all at once, so that an interrupted folder holds no checkpoint.
    """

    def __init__(self, folder: Path, shard_bytes: int = 2 << 30, stem: str = "model") -> None:
        """`folder` must exist; `shard_bytes` is the most tensor data in one file (a larger tensor has its own)."""
        self.folder, self.shard_bytes, self.stem = Path(folder), shard_bytes, stem
        self.n_bytes = 0
        self._names: set[str] = set()
        self._shards: list[tuple[Path, list[str]]] = []
        self._pending: dict[str, _Entry] = {}
        self._scratch = self.folder / f"{stem}.scratch"
        self._scratch_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor. Raises CheckpointError for a name twice or a tensor that has no data; OSError."""
        if name in self._names:
            raise CheckpointError(f"{name} is written twice")
        if tensor.is_meta or tensor.dtype not in _CODES:
            raise CheckpointError(f"{name}: a tensor of {tensor.dtype} on {tensor.device} cannot be written")
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        if self._pending and self._scratch_bytes + raw.numel() > self.shard_bytes:
            self._flush()
        with self._scratch.open("ab" if self._pending else "wb", buffering=0) as file:
            _write_all(file, raw)
        entry = _Entry(self._scratch, self._scratch_bytes, raw.numel(), tensor.dtype, tuple(tensor.shape))
        self._pending[name] = entry
        self._names.add(name)
        self._scratch_bytes += raw.numel()
        self.n_bytes += raw.numel()

    def close(self) -> None:
        """Finish the last shard and give every file its name. Raises CheckpointError if nothing was added; OSError."""
        if not self._names:
            raise CheckpointError(f"{self.folder}: no tensor to write")
        self._flush()
        self._scratch.unlink()
        n = len(self._shards)
        finals = [f"{self.stem}-{k:05d}-of-{n:05d}.safetensors" for k in range(1, n + 1)]
        if n == 1:
            finals = [f"{self.stem}.safetensors"]
        else:
            pairs = zip(finals, self._shards, strict=True)
            weight_map = {name: final for final, (_, names) in pairs for name in names}
            index = {"metadata": {"total_size": self.n_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self.folder / f"{self.stem}.safetensors.index.json", index)
        for final, (part, _) in zip(finals, self._shards, strict=True):
            part.rename(self.folder / final)

    def _flush(self) -> None:
        if not self._pending:
            return
        part = self.folder / f"{self.stem}-{len(self._shards) + 1:05d}.part"
        # Widest dtype first keeps every tensor aligned without holes.
        order = sorted(self._pending, key=lambda name: (-self._pending[name].dtype.itemsize, name))
        with self._scratch.open("rb") as source, part.open("wb") as file:
            file.write(_header({name: self._pending[name] for name in order}))
            for name in order:
                source.seek(self._pending[name].offset)
                _copy(source, file, self._pending[name].n_bytes)
        self._shards.append((part, order))
        self._pending, self._scratch_bytes = {}, 0


def write_json(path: Path, value: object) -> None:
    """Write JSON as people read it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError if it is absent, not JSON or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: there is no {path.name} in it") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _weight_map(folder: Path) -> dict[str, str] | None:
    """The shard of every tensor, None for a single file (which wins over an index, as in transformers)."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    if (folder / "model.safetensors").exists():
        return None
    path = folder / "model.safetensors.index.json"
    if path.exists():
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CheckpointError(f"{path} has no weight_map of tensor names to file names")
        if not weight_map:
            raise CheckpointError(f"{path} names no tensor")
        return weight_map
    pickles = sorted(entry.name for pattern in _PICKLES for entry in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} holds only pickled weights ({_some(pickles)}), which can run code when loaded and are never "
            "read; convert them where you trust them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    raise CheckpointError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")


def _inside(folder: Path, name: str) -> Path:
    """The shard's path. Refuses one outside the folder, except a link into the blobs of the hub's cache."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or Path(name).is_absolute() or "\\" in name:
        raise CheckpointError(f"{folder}: the index points outside the folder: {name!r}")
    path, home = folder / name, folder.resolve()
    real = path.resolve()
    # The hub's cache: models--x/snapshots/<revision>/name -> models--x/blobs/<hash>
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if not real.is_relative_to(home) and real.parent != blobs:
        raise CheckpointError(f"{path} is a link that points outside the folder, to {real}")
    if not real.is_file():
        raise CheckpointError(f"{folder}: the shard {name} that the index names is missing; get it again")
    return path


def _read_header(path: Path) -> dict[str, _Entry]:
    size = path.stat().st_size
    with path.open("rb") as file:
        n_header = int.from_bytes(file.read(8), "little")
        if size < 8 or n_header > min(size - 8, _MAX_HEADER):
            raise CheckpointError(f"{path} is truncated or no safetensors file: its header does not fit its size")
        raw = file.read(n_header)
    try:
        header = json.loads(raw)
        entries = {
            name: _entry(path, 8 + n_header, value) for name, value in header.items() if name != "__metadata__"
        }
    except (UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is corrupt: its header cannot be read ({error})") from error
    end = 8 + n_header
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.n_bytes)):
        if entry.offset != end:
            raise CheckpointError(f"{path} is corrupt: its tensors overlap or leave holes")
        end += entry.n_bytes
    if end != size:
        state = "truncated" if end > size else "corrupt"
        raise CheckpointError(f"{path} is {state}: it should have {end} bytes and has {size}")
    return entries


def _entry(path: Path, start: int, value: Mapping[str, Any]) -> _Entry:
    dtype, shape = DTYPES[value["dtype"]], tuple(int(n) for n in value["shape"])
    begin, end = (int(n) for n in value["data_offsets"])
    if min(shape, default=0) < 0 or begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"shape {shape} of {dtype} does not take {end - begin} bytes")
    return _Entry(path, start + begin, end - begin, dtype, shape)


def _header(entries: Mapping[str, _Entry]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in entries.items():
        offsets = [end, end := end + entry.n_bytes]
        header[name] = {"dtype": _CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _read_into(file: IO[bytes], raw: Tensor, path: Path) -> None:
    view, done = memoryview(raw.numpy()), 0
    while done < len(view):
        n_read = file.readinto(view[done : done + (1 << 30)])  # type: ignore[attr-defined]
        if not n_read:
            raise CheckpointError(f"{path} has been cut short while it was being read")
        done += n_read


def _write_all(file: IO[bytes], raw: Tensor) -> None:
    view, done = memoryview(raw.numpy()), 0
    while done < len(view):
        done += file.write(view[done : done + (1 << 30)])


def _copy(source: IO[bytes], target: IO[bytes], n_bytes: int) -> None:
    while n_bytes > 0:
        chunk = source.read(min(n_bytes, _CHUNK))
        if not chunk:
            raise CheckpointError("the scratch file of a checkpoint was cut short while it was being written")
        target.write(chunk)
        n_bytes -= len(chunk)
