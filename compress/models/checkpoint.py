"""Checkpoints on disk: a lazy, distrustful reader of safetensors folders, and a lean writer.

Tensors are read with plain reads, not mapped: a mapped file counts as memory of the process, and
one that shrinks meanwhile kills it.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import CheckpointError
from compress.models.links import inside
from compress.models.safetensors_file import (
    CHUNK,
    CODES,
    FORMAT,
    Entry,
    copy_bytes,
    make_header,
    read_header,
    read_tensor,
    write_bytes,
)

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Tensors(Mapping[str, Tensor]):
    """The tensors of an ordinary checkpoint by their names, each made when asked for; headers tell the rest."""

    folder: Path

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor. Raises KeyError."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor. Raises KeyError."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of all that the tensors are made of."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks for reports on how they are stored; none on ordinary ones."""
        return ()

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor's data."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(map(self.nbytes, self))


class Reader(Tensors):
    """The tensors of a Hugging Face folder by their names on disk, each read when asked for.

    Opening it checks everything but the values: every shard is there, inside the folder, whole,
    and holds what the index says.
    """

    def __init__(self, folder: Path, stem: str = "model") -> None:
        """Raises CheckpointError if the folder is not a whole safetensors checkpoint."""
        self.folder = Path(folder)
        index = _weight_map(self.folder, stem)
        single = f"{stem}.safetensors"
        names = [single] if index is None else sorted(set(index.values()))
        self.shards = tuple(_shard(self.folder, name) for name in names)
        self._entries: dict[str, Entry] = {}
        for name, shard in zip(names, self.shards, strict=True):
            for tensor, entry in read_header(shard).items():
                if index is not None and index.get(tensor, name) != name:
                    continue  # the index says that another shard's copy counts
                if tensor in self._entries:
                    raise CheckpointError(f"{self.folder}: two shards hold {tensor}")
                self._entries[tensor] = entry
        _refuse_absent(self.folder, index or {}, self._entries)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor, read now into memory of its own.

        Raises KeyError; CheckpointError if the file has shrunk since.
        """
        return read_tensor(self._entries[name])

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
        """The dtype of a tensor, from the header."""
        return self._entries[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header."""
        return self._entries[name].shape

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 of config.json and of every shard's name, size and bytes, all read: once."""
        digest = hashlib.sha256()
        config = self.folder / "config.json"
        digest.update(config.read_bytes() if config.is_file() else b"")
        for shard in self.shards:
            digest.update(f"\0{shard.name}\0{shard.stat().st_size}\0".encode())
            with shard.open("rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
        return digest.hexdigest()


class Writer:
    """Writes `<stem>.safetensors`, or shards and their index, with one tensor in memory at a time.

    Data goes to a scratch file as it comes; a full shard is put in order from it (the order and
    the bytes of the safetensors library). Final names appear in `close`, all at once, so that an
    interrupted folder holds no checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        shard_bytes: int = 2 << 30,
        stem: str = "model",
        metadata: Mapping[str, str] = FORMAT,
    ) -> None:
        """`folder` must exist; `shard_bytes`: the most data in one file (unless one tensor is)."""
        self.folder, self.shard_bytes, self.stem = Path(folder), shard_bytes, stem
        self.metadata = metadata
        self.n_bytes = 0
        self._names: set[str] = set()
        self._shards: list[tuple[Path, list[str]]] = []
        self._pending: dict[str, Entry] = {}
        self._pending_bytes = 0
        self._scratch = self.folder / f"{stem}.scratch"

    @property
    def names(self) -> Collection[str]:
        """Names of the tensors added so far."""
        return self._names

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor. Raises CheckpointError for a name twice or one without data; OSError."""
        if name in self._names:
            raise CheckpointError(f"{name} is written twice")
        if tensor.is_meta or tensor.dtype not in CODES:
            raise CheckpointError(
                f"{name}: a tensor of {tensor.dtype} on {tensor.device} cannot be written"
            )
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        n = raw.numel()
        if self._pending and self._pending_bytes + n > self.shard_bytes:
            self._flush()
        with FileIO(self._scratch, "a" if self._pending else "w") as file:
            write_bytes(file, raw)
        shape = tuple(tensor.shape)
        self._pending[name] = Entry(self._scratch, self._pending_bytes, n, tensor.dtype, shape)
        self._names.add(name)
        self._pending_bytes += n
        self.n_bytes += n

    def close(self) -> None:
        """Finish the last shard and give every file its name.

        Raises CheckpointError if nothing was added; OSError, and then no file has its name.
        """
        if not self._names:
            raise CheckpointError(f"{self.folder}: no tensor to write")
        self._flush()
        n = len(self._shards)
        finals = [f"{self.stem}-{k:05d}-of-{n:05d}.safetensors" for k in range(1, n + 1)]
        if n == 1:
            finals = [f"{self.stem}.safetensors"]
        else:
            pairs = zip(finals, self._shards, strict=True)
            places = {name: final for final, (_, names) in pairs for name in names}
            index = {
                "metadata": {"total_size": self.n_bytes},
                "weight_map": dict(sorted(places.items())),
            }
            write_json(self.folder / f"{self.stem}.safetensors.index.json", index)
        for final, (part, _) in zip(finals, self._shards, strict=True):
            part.rename(self.folder / final)

    def _flush(self) -> None:
        part = self.folder / f"{self.stem}-{len(self._shards) + 1:05d}.part"
        pending = self._pending
        # Widest dtype first keeps every tensor aligned without holes.
        order = sorted(pending, key=lambda name: (-pending[name].dtype.itemsize, name))
        with self._scratch.open("rb") as source, part.open("wb") as file:
            file.write(make_header({name: pending[name] for name in order}, self.metadata))
            for name in order:
                source.seek(pending[name].offset)
                copy_bytes(source, file, pending[name].n_bytes)
        self._scratch.unlink()
        self._shards.append((part, order))
        self._pending, self._pending_bytes = {}, 0


def write_json(path: Path, value: object) -> None:
    """Write JSON as people read it."""
    path.write_text(json_text(value), encoding="utf-8")


def json_text(value: object) -> str:
    """JSON as people read it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError if it is absent or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: there is no {path.name} in it") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def some(names: Collection[str]) -> str:
    """The first few of some names, for a message."""
    few = sorted(names)[:3]
    return ", ".join(few) + (f" and {len(names) - len(few)} more" if len(names) > 3 else "")


def _refuse_absent(folder: Path, index: Mapping[str, str], found: Collection[str]) -> None:
    absent = sorted(name for name in index if name not in found)
    if absent:
        raise CheckpointError(
            f"{folder / index[absent[0]]} lacks {some(absent)}, which the index says it holds; "
            "the checkpoint is incomplete, download it again"
        )


def _weight_map(folder: Path, stem: str) -> dict[str, str] | None:
    """The shard of every tensor; None for a single file (it wins over an index, as elsewhere)."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    single, path = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.exists():
        return None
    if path.exists():
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{path} has no weight_map that names a tensor")
        if not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CheckpointError(f"{path}: its weight_map gives something else than file names")
        return weight_map
    pickles = [entry.name for pattern in _PICKLES for entry in folder.glob(pattern)]
    if pickles:
        raise CheckpointError(
            f"{folder} holds only pickled weights ({some(pickles)}), which can run code when "
            "loaded and are never read; convert them where you trust them: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    raise CheckpointError(f"{folder} has neither {single.name} nor {path.name}")


def _shard(folder: Path, name: str) -> Path:
    """The path of a shard, which must be there. Raises CheckpointError for one outside the folder."""
    path = inside(folder, name)
    if not path.is_file():
        raise CheckpointError(f"{folder}: the shard {name} is missing from it; download it again")
    return path
