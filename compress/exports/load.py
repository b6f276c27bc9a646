"""Loads any of our exports, and compressed checkpoints of other tools, into a transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from calibration.heads import Head
from calibration.outputs import AUTO_CLASSES, head_of
from compress.bases import Dequantised, open_base, open_original
from compress.errors import CheckpointError
from compress.exports.base import EXPORTS, Exporter
from compress.exports.reading import Device, add_generation_config, load_bare
from compress.forms.embedding import CompressedEmbedding
from compress.forms.linear import CompressedLinear
from compress.models.model_config import read_config
from eval.footprint import Stored, bytes_on_disk, tensor_bytes


def recognised(folder: Path) -> type[Exporter] | None:
    """The export format that a folder holds, by the folder's own configuration; None if no format recognises it.

    Raises CheckpointError for a folder that two formats recognise.
    """
    found = [kind for kind in EXPORTS.values() if kind.is_in(folder)]
    special = [kind for kind in found if not kind.traits.ordinary]
    if len(special) > 1:
        names = " and ".join(kind.name for kind in special)
        raise CheckpointError(f"{folder}: it looks like {names} at once; keep one of them there")
    return next(iter(special or found), None)


def format_of(folder: Path) -> type[Exporter] | None:
    """The export format that a folder holds; None for a checkpoint in a format that only other tools write.

    Raises CheckpointError for what is neither.
    """
    found = recognised(folder)
    if found is None:
        open_base(folder)
    return found


def loader_name(folder: Path) -> str:
    """The name of the export format that a folder holds, or of the format of another tool's checkpoint ("awq").

    Raises CheckpointError for a quantisation that is not read.
    """
    kind = format_of(Path(folder))
    return open_base(folder).format if kind is None else kind.name


def load_export(
    folder: Path | str, dtype: torch.dtype | None = None, device: Device = "cpu"
) -> PreTrainedModel:
    """The model of an export in eval mode; `dtype` None is the one that its config names.

    Raises CheckpointError for a checkpoint that is incomplete or does not fit its config.
    """
    folder = Path(folder)
    kind = format_of(folder)
    if kind is None:
        return load_bare(folder, dtype, device)
    return kind.load(folder, dtype, torch.device(device))


def load_original(
    folder: Path | str, dtype: torch.dtype | None = None, device: Device = "cpu"
) -> PreTrainedModel:
    """The uncompressed model in eval mode; one that is published in few bits is dequantised as a whole.

    Raises CheckpointError as `open_original`.
    """
    folder = Path(folder)
    tensors, config = open_original(folder), read_config(folder)
    kind: Any = AUTO_CLASSES[head_of(config) or Head.NEXT_TOKEN]
    wanted = "auto" if dtype is None else dtype
    if isinstance(tensors, Dequantised):
        config.name_or_path = str(folder)
        model = kind._model_mapping[type(config)].from_pretrained(
            None, config=config, state_dict=dict(tensors), dtype=dtype or tensors.own_dtype
        )
        add_generation_config(model, folder)
    else:
        model = kind.from_pretrained(folder, config=config, dtype=wanted)
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


def stored_in(folder: Path) -> Stored:
    """Bytes of an export, together with those of the base checkpoint that it belongs to."""
    kind = format_of(folder)
    if kind is None:
        return Stored(bytes_on_disk(folder), tensor_bytes(folder))
    own, base = kind.stored(folder), kind.base_of(folder)
    if base is None:
        return own
    return Stored(
        own.bytes_on_disk + bytes_on_disk(base),
        own.tensor_bytes + open_base(base).reader.total_bytes,
    )


def load_unpacked(
    folder: Path | str, dtype: torch.dtype | None = None, device: Device = "cpu"
) -> PreTrainedModel:
    """The model of an export, dequantised once: faster, in as much memory as dense weights or factors take."""
    model = load_export(folder, dtype, device)
    unpack(model)
    return model


def unpack(model: PreTrainedModel) -> None:
    """Expand the codes of every compressed layer: the same outputs, faster, and as large as dense."""
    for module in model.modules():
        if isinstance(module, CompressedLinear | CompressedEmbedding):
            module.form = module.form.unpacked(model.dtype)
