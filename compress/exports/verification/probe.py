"""The probe of an export: a few tokens, what the compressed model makes of them, and digests of what was written.

It lies at `verification/probe.st`, where no loader looks: several servers read every `*.safetensors` beside a
configuration. Exports of earlier versions have it as `probe.safetensors` among the weights, and are still read.

Shapes: t = tokens, n = positions whose logits are kept, v = vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from calibration.heads import Head
from compress.bases import open_base
from compress.errors import CheckpointError
from compress.exports.base import Exporter
from compress.exports.load import format_of
from compress.exports.verification.places import PROBE, probe_in
from compress.models.companions import module_files
from compress.models.safetensors_file import write_file

POSITIONS = 8
_FREE = ("report.json",)


@dataclass(frozen=True)
class Probe:
    """Token ids, and what the compressed model makes of them."""

    input_ids: Tensor
    """(1, t) int64."""
    logits: Tensor
    """(n, v) fp32, at `positions`."""
    positions: Tensor
    """(n,) int64."""
    log_probabilities: Tensor | None
    """(t - 1,) fp32: of each token but the first, after those before it. None: the model predicts no next token, or the
    export is of an earlier version."""


def make_probe(input_ids: Tensor, logits: Tensor, head: Head = Head.NEXT_TOKEN) -> Probe:
    """The probe of a model from its predictions (t, v) for input_ids (1, t); (1, v) where it has one for a sequence."""
    n = len(logits)
    positions = torch.linspace(0, n - 1, min(POSITIONS, n)).round().long()
    found = log_probabilities_of(input_ids, logits) if head.writes_text and n > 1 else None
    return Probe(input_ids, logits[positions].float(), positions, found)


def log_probabilities_of(input_ids: Tensor, logits: Tensor) -> Tensor:
    """(t - 1,) fp32: the log-probability of each token but the first, from the logits (t, v) of a sequence (1, t)."""
    following = input_ids[0, 1:].to(logits.device)
    found = logits[:-1].double().log_softmax(-1).gather(1, following[:, None])
    return found[:, 0].float().cpu()


def write_probe(
    folder: Path,
    probe: Probe,
    dtype: torch.dtype | None = None,
    rounded: torch.dtype | None = None,
) -> None:
    """Write the probe of a finished export.

    `dtype`: what the model computed in (None: the dtype that config.json names). `rounded`: the dtype that the format
    rounds to and the compressed model does not (None: it rounds nothing).
    """
    metadata = {
        "tensors": json.dumps(digests(folder)),
        "files": json.dumps(file_digests(folder)),
        "base": json.dumps(base_digest(folder)),
    }
    if dtype is not None:
        metadata["dtype"] = str(dtype).removeprefix("torch.")
    if rounded is not None:
        metadata["rounded"] = str(rounded).removeprefix("torch.")
    _write(folder, probe, metadata)


def copy_probe(folder: Path, target: Path, changed: Mapping[str, str]) -> None:
    """Write the probe of an export into a copy of it, with the digests of files that are changed there."""
    probe, metadata = read_probe(folder)
    files = json.dumps(json.loads(metadata["files"]) | changed)
    _write(target, probe, {**metadata, "files": files})


def _write(folder: Path, probe: Probe, metadata: Mapping[str, str]) -> None:
    tensors = {
        "input_ids": probe.input_ids,
        "logits": probe.logits.float(),
        "positions": probe.positions,
    }
    if probe.log_probabilities is not None:
        tensors["log_probabilities"] = probe.log_probabilities
    (folder / PROBE).parent.mkdir(exist_ok=True)
    write_file(folder / PROBE, tensors, metadata)


def read_probe(folder: Path) -> tuple[Probe, Mapping[str, str]]:
    """The probe of an export, and its digests. Raises CheckpointError if there is none, or the file is damaged."""
    path = probe_in(folder)
    if path is None:
        raise CheckpointError(f"{folder} has no {PROBE}, which every export has; is it an export?")
    try:
        with safe_open(path, framework="pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            names = file.keys()
            probe = Probe(
                input_ids=file.get_tensor("input_ids"),
                logits=file.get_tensor("logits"),
                positions=file.get_tensor("positions"),
                log_probabilities=file.get_tensor("log_probabilities")
                if "log_probabilities" in names
                else None,
            )
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); get the export again") from error
    absent = [name for name in ("tensors", "files") if name not in metadata]
    if absent:
        raise CheckpointError(
            f"{path} has no digests of {' and '.join(absent)}: it is damaged or of another version;"
            " get the export again"
        )
    for name, text in metadata.items():
        if not _is_read(name, text):
            raise CheckpointError(
                f"{path} is damaged: {name} in its metadata is {text[:40]!r}; get the export again"
            )
    return probe, metadata


def _is_read(name: str, text: str) -> bool:
    """Whether an entry of a probe's metadata is what `write_probe` wrote: a table of digests, or a dtype's name."""
    if name in ("dtype", "rounded"):
        return isinstance(getattr(torch, text, None), torch.dtype)
    try:
        return isinstance(json.loads(text), dict)
    except json.JSONDecodeError:
        return name not in ("tensors", "files", "base")


def digests(folder: Path) -> dict[str, str]:
    """A digest of dtype, shape and bytes of every tensor of an export, its adapter's too."""
    return {name: _digest(tensor) for name, tensor in kind_of(folder).tensors(folder)}


def file_digests(folder: Path) -> dict[str, str]:
    """Sha256 of every file of an export that loading reads, its tensors apart."""
    patterns = kind_of(folder).traits.loading_reads
    paths = {path for pattern in patterns for path in folder.glob(pattern)}
    paths |= {folder / name for name in module_files(folder)}
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(paths)
        if path.is_file() and path.name not in _FREE
    }


def base_digest(folder: Path) -> dict[str, str]:
    """Sha256 of the checkpoint that an export belongs to and does not hold; empty for one that is whole."""
    base = kind_of(folder).base_of(folder)
    return {} if base is None else {"sha256": open_base(base).reader.fingerprint}


def kind_of(folder: Path) -> type[Exporter]:
    """The format of an export. Raises CheckpointError for a checkpoint that is none."""
    found = format_of(folder)
    if found is None:
        raise CheckpointError(f"{folder} is in a format that other tools write, so it is no export")
    return found


def _digest(tensor: Tensor) -> str:
    head = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    digest = hashlib.sha256(head)
    digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
