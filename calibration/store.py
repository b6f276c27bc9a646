"""Statistics on disk, under a fingerprint of everything that decides them.

One safetensors file for each decoder block, in a folder named by the fingerprint. The folder gets its name when it is
complete, so what is found can be used. While a folder is written its writer holds a lock in it, which ends with the
process however that ends: the next writer removes folders that nobody holds. Grams are stored in fp64 (as sums,
exactly), lower triangle only.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from filelock import BaseFileLock, FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from calibration.errors import InputError
from calibration.experts.pooling import Routed
from calibration.statistics import load_statistics
from calibration.statistics.base import SYMMETRIC, Statistic
from calibration.statistics.collection import Statistics
from calibration.walk import SharedInput

FORMAT = 3
MANIFEST = "manifest.json"
PARTIAL, LOCK = ".partial", "writer.lock"


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Sha256 of the settings (JSON-able) and of this file's format."""
    text = json.dumps({"format": FORMAT, **settings}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class Store:
    """The statistics of one model, text and set of settings.

    Processes may share a root: each writes into a folder of its own, and the first to finish gives it its name.
    """

    def __init__(self, root: Path, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)
        self.key = fingerprint(settings)
        self.folder = root / self.key[:32]
        self._partial: Path | None = None
        self._lock: BaseFileLock | None = None

    @property
    def complete(self) -> bool:
        """Whether all blocks are there, in the sizes they were written in."""
        try:
            sizes = {name: entry["bytes"] for name, entry in self._manifest().items()}
        except (OSError, ValueError, KeyError, TypeError):
            return False  # no manifest, or not one of ours: as good as nothing
        return all(_size(self.folder / name) == size for name, size in sizes.items())

    def load(self, block: int, device: torch.device) -> list[SharedInput]:
        """The statistics of one block, as they were observed. Raises InputError if the file has changed since."""
        path = _file(self.folder, block)
        if file_sha256(path) != self._manifest()[path.name]["sha256"]:
            raise InputError(
                f"statistics: {path} is damaged; remove {self.folder}, or run with --statistics off"
            )
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            return [
                SharedInput(
                    tuple(entry["names"]),
                    _decode(file.get_tensor, f"{k}", entry).to(device),
                    Routed(**entry["routed"]) if entry["routed"] else None,
                )
                for k, entry in enumerate(json.loads(metadata["groups"]))
            ]

    def save(self, block: int, shared: list[SharedInput]) -> None:
        """Write one block's statistics; nothing counts before `finish`."""
        if self._partial is None:
            root = self.folder.parent
            root.mkdir(parents=True, exist_ok=True)
            remove_abandoned(root)
            prefix = f".{self.folder.name}-"
            self._partial = Path(mkdtemp(prefix=prefix, suffix=PARTIAL, dir=root))
            self._lock = FileLock(self._partial / LOCK)
            self._lock.acquire()
        tensors: dict[str, Tensor] = {}
        groups = [_encode(tensors, f"{k}", entry) for k, entry in enumerate(shared)]
        path = _file(self._partial, block)
        save_file(tensors, path, metadata={"groups": json.dumps(groups)})

    def finish(self) -> None:
        """All blocks are saved: give the folder its name, unless an equal run was first."""
        if self._partial is None or self.complete:
            self.discard()
            return
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in sorted(self._partial.iterdir())
            if path.name != LOCK
        }
        manifest = {"settings": self.settings, "files": files}
        text = json.dumps(manifest, indent=2)
        (self._partial / MANIFEST).write_text(text, encoding="utf-8")
        shutil.rmtree(self.folder, ignore_errors=True)  # what was there was not complete
        # Held until it has its name: a folder that is not held may be removed.
        self._partial.rename(self.folder)
        self._partial = None
        self._release()
        (self.folder / LOCK).unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove what an unfinished run of this process left."""
        if self._partial is not None:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial = None
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _manifest(self) -> Mapping[str, Any]:
        text = (self.folder / MANIFEST).read_text(encoding="utf-8")
        files: Mapping[str, Any] = json.loads(text)["files"]
        return files


def remove_abandoned(root: Path) -> None:
    """Remove what writers that were killed left; folders without a lock are of a writer that is only beginning."""
    for folder in root.glob(f".*{PARTIAL}"):
        if not (folder / LOCK).is_file():
            continue
        try:
            with FileLock(folder / LOCK, timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
        except (Timeout, OSError):
            continue  # it is held, or was removed by another process in between


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def stored_bytes(shape: tuple[int, int], kinds: Collection[type[Statistic]]) -> int:
    """Bytes that these statistics of a layer (o, i) take, if it shares them with none."""
    return 8 * sum(kind.n_numbers(shape) for kind in kinds)


def _file(folder: Path, block: int) -> Path:
    return folder / f"block-{block:04d}.safetensors"


def _encode(tensors: dict[str, Tensor], key: str, shared: SharedInput) -> dict[str, Any]:
    kinds = {}
    for kind, statistic in shared.stats.items():
        kind.refuse_unregistered()
        kinds[kind.name] = statistic.counts()
        for name, tensor in statistic.tensors().items():
            value = _packed(tensor, f"{kind.name}.{name}") if name in SYMMETRIC else tensor
            # Experts may have the same sums, and a file of tensors must not share memory.
            tensors[f"{key}.{kind.name}.{name}"] = value.detach().clone().cpu().contiguous()
    routed = None if shared.routed is None else vars(shared.routed)
    return {"names": list(shared.names), "statistics": kinds, "routed": routed}


def _decode(read: Any, key: str, entry: Mapping[str, Any]) -> Statistics:
    stats, known = Statistics(), load_statistics()
    for kind_name, counts in entry["statistics"].items():
        kind = known.get(kind_name)
        if kind is None:
            raise InputError(
                f"statistics: saved sums are called {kind_name!r}, and no statistic is; there are "
                f"{', '.join(sorted(known))}; import the module that defines it"
            )
        tensors = {
            name: read(f"{key}.{kind_name}.{name}")
            for name in (field.name for field in fields(kind))
            if name not in counts
        }
        # A matrix of second moments is named for its two equal sides.
        whole = {
            name: _symmetric(tensor) if name in SYMMETRIC else tensor
            for name, tensor in tensors.items()
        }
        stats[kind] = kind(**counts, **whole)  # type: ignore[arg-type]  # its fields, by name
    return stats


def _packed(tensor: Tensor, name: str) -> Tensor:
    """The lower triangle, row after row. Raises TypeError for a matrix that this would change."""
    if not torch.equal(tensor, tensor.T):
        raise TypeError(f"statistic {name} is not symmetric, as its name says; call it sum_ij")
    return tensor[_lower(tensor.shape[0])]


def _lower(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril_()


def _symmetric(packed: Tensor) -> Tensor:
    n = int((2 * packed.numel()) ** 0.5)
    full = torch.zeros(n, n, dtype=packed.dtype)
    full[_lower(n)] = packed
    return full + full.T - full.diagonal().diag()
