"""A folder with a checkpoint, and what its own files say of how the weights are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from compress.errors import CheckpointError
from compress.models.checkpoint import Reader, read_json
from compress.models.model_config import MODELOPT_SETTINGS, QUANTISATION, is_leftover, method_of

_SIDE_FILES = ("quantize_config.json", "quant_config.json")
"""Files in which tools wrote their settings before config.json had a place for them."""
_MLX = "quantization"
_USUAL = frozenset({"model.safetensors", "model.safetensors.index.json"})


@dataclass(frozen=True)
class CheckpointFolder:
    """A folder by which formats are recognised. Files are read when they are asked for; no tensor is read."""

    path: Path

    def __post_init__(self) -> None:
        """Raises CheckpointError if there is no such folder."""
        if not self.path.is_dir():
            raise CheckpointError(
                f"{self.path}: no such folder; name one that holds config.json and safetensors"
            )

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The whole config.json. Raises CheckpointError if it cannot be read."""
        return read_json(self.path / "config.json")

    @cached_property
    def model_config(self) -> Mapping[str, Any]:
        """config.json without what it says of a quantisation."""
        own = (*QUANTISATION, *([_MLX] if self._mlx_quantisation else ()))
        return {key: value for key, value in self.config.items() if key not in own}

    @cached_property
    def quantisation(self) -> Mapping[str, Any] | None:
        """Settings of a quantisation, in config.json or in a file beside it; None if there are none, or left over."""
        found = self._named_quantisation()
        # compressed-tensors describes pruned weights that are stored as ordinary ones, too.
        if found is None or method_of(found) == "compressed-tensors":
            return found
        return None if is_leftover(self.path, found) else found

    @cached_property
    def _mlx_quantisation(self) -> Mapping[str, Any] | None:
        """Settings in the entry that mlx-lm alone writes; it repeats them where others have theirs, without a name."""
        found = self.config.get(_MLX)
        is_one = isinstance(found, Mapping) and {"bits", "group_size"} <= set(found)
        return {"quant_method": "mlx", **found} if is_one and isinstance(found, Mapping) else None

    def _named_quantisation(self) -> Mapping[str, Any] | None:
        if self._mlx_quantisation is not None:
            return self._mlx_quantisation
        for key in QUANTISATION:
            found = self.config.get(key)
            if isinstance(found, Mapping) and found:
                return found
        for name in _SIDE_FILES:
            if (self.path / name).is_file():
                return read_json(self.path / name)
        if (self.path / MODELOPT_SETTINGS).is_file():
            told = read_json(self.path / MODELOPT_SETTINGS)
            settings = told.get("quantization")
            settings = settings if isinstance(settings, Mapping) else {}
            return {"quant_method": "modelopt", "producer": told.get("producer"), **settings}
        return None

    @property
    def quant_method(self) -> str | None:
        """The name that the quantisation gives itself; None without a quantisation, or without a name (old files)."""
        named = (self.quantisation or {}).get("quant_method")
        return str(named) if named else None

    @cached_property
    def reader(self) -> Reader:
        """The tensors, under the name that everybody uses, or the only other one there is (auto-gptq's)."""
        names = {path.name for path in self.path.iterdir()}
        if names & _USUAL:
            return Reader(self.path)
        for end in (".safetensors.index.json", ".safetensors"):
            stems = {name.removesuffix(end) for name in names if name.endswith(end)}
            stems -= {"adapter_model", "probe"}
            if len(stems) == 1:
                return Reader(self.path, stems.pop())
        return Reader(self.path)
