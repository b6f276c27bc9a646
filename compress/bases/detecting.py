"""Finds out from a folder's own config what compressed checkpoint it holds, and refuses what it cannot read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.bases.awq import AwqBase
from compress.bases.base import Base
from compress.bases.bitsandbytes import BitsandbytesBase
from compress.bases.gptq import GptqBase
from compress.bases.native import NativeBase
from compress.bases.packed import PackedBase
from compress.bases.plain import PlainBase
from compress.errors import CheckpointError
from compress.forms.loading import FORMAT
from compress.models.checkpoint import Reader, read_json

READERS: Mapping[str, type[Base]] = {
    kind.format: kind for kind in (GptqBase, AwqBase, PackedBase, BitsandbytesBase)
}
"""By quant_method."""
_SIDE_FILES = ("quantize_config.json", "quant_config.json")
"""Where tools wrote their settings before config.json had a place for them."""
_CONFIG_KEYS = ("quantization_config", "compression_config")


def open_base(folder: Path) -> Base:
    """The checkpoint in a folder; headers are read, no tensor is.

    Raises CheckpointError saying what was found and what is read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such folder; name one that holds config.json and safetensors"
        )
    config = read_json(folder / "config.json")
    if config.get("model_type") == FORMAT:
        return NativeBase(folder, open_reader(folder), config)
    settings = quantisation_of(folder, config)
    plain = {key: value for key, value in config.items() if key not in _CONFIG_KEYS}
    if settings is None:
        return PlainBase(folder, open_reader(folder), plain, {})
    method = str(settings.get("quant_method"))
    if method not in READERS:
        raise CheckpointError(
            f"{folder}: quant_method {method!r} is not read; there are {', '.join(READERS)}, checkpoints of this "
            "toolkit, and folders of ordinary weights"
        )
    return READERS[method](folder, open_reader(folder), plain, settings)


def quantisation_of(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What config.json, or a file beside it, says of a quantisation, with its quant_method; None if nothing does."""
    for key in _CONFIG_KEYS:
        found = config.get(key)
        if isinstance(found, Mapping) and found:
            return _with_method(found)
    for name in _SIDE_FILES:
        if (folder / name).is_file():
            return _with_method(read_json(folder / name))
    return None


def _with_method(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Old files do not name their method; their keys do."""
    if settings.get("quant_method"):
        return dict(settings)
    if "w_bit" in settings:
        return {**settings, "quant_method": "awq"}
    return {**settings, "quant_method": "gptq"} if "bits" in settings else dict(settings)


def open_reader(folder: Path) -> Reader:
    """The tensors under the name that everybody uses, or under the only other one there is (auto-gptq's)."""
    names = {path.name for path in folder.iterdir()}
    if names & {"model.safetensors", "model.safetensors.index.json"}:
        return Reader(folder)
    ends = (".safetensors.index.json", ".safetensors")
    for end in ends:
        stems = {n.removesuffix(end) for n in names if n.endswith(end)} - {"adapter_model", "probe"}
        if len(stems) == 1:
            return Reader(folder, stems.pop())
    return Reader(folder)
