"""Statistics on disk, under a fingerprint of everything that decides them.

One safetensors file for each decoder block, in a folder named by the fingerprint. The folder gets its name when it is
complete, so what is found can be used. Grams are stored in fp64 (as sums, exactly), lower triangle only.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from calibration.stats import STATISTICS, Gram, Statistics
from calibration.walk import SharedInput

FORMAT = 1


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Sha256 of the settings (JSON-able) and of this file's format."""
    text = json.dumps({"format": FORMAT, **settings}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class Store:
    """The statistics of one model, text and set of settings."""

    def __init__(self, root: Path, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)
        self.key = fingerprint(settings)
        self.folder = root / self.key[:32]
        self._partial = root / f".{self.key[:32]}.partial"

    @property
    def complete(self) -> bool:
        """Whether all blocks are there."""
        return (self.folder / "manifest.json").is_file()

    def load(self, block: int) -> list[SharedInput]:
        """The statistics of one block, as they were observed."""
        with safe_open(_file(self.folder, block), framework="pt") as file:
            metadata = file.metadata()
            return [
                SharedInput(tuple(entry["names"]), _decode(file.get_tensor, f"{k}", entry))
                for k, entry in enumerate(json.loads(metadata["groups"]))
            ]

    def save(self, block: int, shared: list[SharedInput]) -> None:
        """Write one block's statistics; nothing counts before `finish`."""
        self._partial.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        groups = [_encode(tensors, f"{k}", entry) for k, entry in enumerate(shared)]
        save_file(tensors, _file(self._partial, block), metadata={"groups": json.dumps(groups)})

    def finish(self) -> None:
        """All blocks are saved: give the folder its name."""
        (self._partial / "manifest.json").write_text(
            json.dumps(self.settings, indent=2), encoding="utf-8"
        )
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self._partial.rename(self.folder)

    def discard(self) -> None:
        """Remove what an unfinished run left."""
        shutil.rmtree(self._partial, ignore_errors=True)


def stored_bytes(n_inputs: int) -> int:
    """Bytes that the statistics of one input of this width take."""
    return n_inputs * (n_inputs + 1) // 2 * 8 + 2 * n_inputs * 8


def _file(folder: Path, block: int) -> Path:
    return folder / f"block-{block:04d}.safetensors"


def _encode(tensors: dict[str, Tensor], key: str, shared: SharedInput) -> dict[str, Any]:
    kinds = {}
    for kind, statistic in shared.stats.items():
        kinds[kind.name] = {"n_tokens": statistic.n_tokens, "n_sequences": statistic.n_sequences}
        for name, tensor in statistic.tensors().items():
            value = tensor[_lower(tensor.shape[0])] if kind is Gram else tensor
            tensors[f"{key}.{kind.name}.{name}"] = value.cpu().contiguous()
    return {"names": list(shared.names), "statistics": kinds}


def _decode(read: Any, key: str, entry: Mapping[str, Any]) -> Statistics:
    stats = Statistics()
    for kind_name, counts in entry["statistics"].items():
        kind = STATISTICS[kind_name]
        tensor = read(f"{key}.{kind_name}.{'sum_ii' if kind is Gram else 'sum_i'}")
        if kind is Gram:
            stats[kind] = Gram(sum_ii=_symmetric(tensor), **counts)
        else:
            stats[kind] = kind(sum_i=tensor, **counts)  # type: ignore[call-arg]
    return stats


def _lower(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril_()


def _symmetric(packed: Tensor) -> Tensor:
    n = int((2 * packed.numel()) ** 0.5)
    full = torch.zeros(n, n, dtype=packed.dtype)
    full[_lower(n)] = packed
    return full + full.T - full.diagonal().diag()
