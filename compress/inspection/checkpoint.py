"""What is in a checkpoint, compressed or not: layers, shapes, dtypes, bytes. Headers tell, and no tensor is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from calibration.skeleton import PartLoader, open_parts
from calibration.uncalled import uncalled_layers
from compress.bases import open_base, open_original
from compress.callbacks import Progress
from compress.errors import CheckpointError
from compress.exports.base import Exporter
from compress.exports.contents import Contents, StoredTensor, contents_of_base, dtype_name
from compress.exports.load import recognised
from compress.models.checkpoint import Tensors
from compress.models.devices import settle_dtype
from compress.models.dtype import Dtype
from compress.models.model_config import read_config
from compress.models.names import block_and_place
from compress.models.resolve import resolve_model
from compress.models.unstacked import unstacked
from compress.planning.make import Linears, chosen_linears, kept_tensors

COMPRESSIBLE = ""
STORED = "stored as it was"


@dataclass(frozen=True, kw_only=True)
class InspectedTensor:
    """A layer's weight, or another tensor."""

    name: str
    """Of the layer, for a weight of one; else of the tensor."""
    shape: tuple[int, ...]
    """(out, in) for a layer."""
    stored: str
    """A dtype, or a form in short: "4-bit g64 + rank 32"."""
    n_bytes: int
    reason: str
    """Why no method compresses it; empty for a layer that methods do."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """All tensors of a checkpoint; weights of layers first."""

    folder: Path
    format: str
    """"ordinary weights", "gptq, 4 bits, groups of 128"."""
    producer: str | None
    """The tool that wrote a compressed checkpoint, if it says so."""
    n_blocks: int
    tensors: tuple[InspectedTensor, ...]
    ordinary: Ordinary | None
    """What methods plan with; None for a checkpoint that is compressed already."""

    @property
    def n_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.n_bytes for tensor in self.tensors)

    @property
    def layers(self) -> tuple[InspectedTensor, ...]:
        """Those that methods compress, or have compressed."""
        return tuple(tensor for tensor in self.tensors if tensor.reason == COMPRESSIBLE)

    @property
    def others(self) -> tuple[InspectedTensor, ...]:
        """All others."""
        return tuple(tensor for tensor in self.tensors if tensor.reason != COMPRESSIBLE)


@dataclass(frozen=True)
class Ordinary:
    """A checkpoint of ordinary weights, its weights on disk."""

    reader: Tensors
    loader: PartLoader
    linears: Linears
    uncalled: frozenset[str]
    """Layers whose weight is read without a call, which no method compresses."""


class _Zeros(Mapping[str, Tensor]):
    """Zeros in the place of a checkpoint's tensors: which layers a model calls does not depend on their values."""

    def __init__(self, reader: Tensors) -> None:
        self._reader = reader

    def __getitem__(self, name: str) -> Tensor:
        return torch.zeros(tuple(self._reader.shape(name)), dtype=self._reader.dtype(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._reader)

    def __len__(self) -> int:
        return len(self._reader)


def inspect(spec: str, *, progress: Progress) -> Inspection:
    """A folder, a hub id, a .gguf file or `demo`: a model, an export of ours, or a checkpoint that another tool wrote.

    Raises CheckpointError or InputError saying what was found, and what `resolve_model` raises.
    """
    folder = Path(spec).expanduser()
    _refuse_several(folder)
    return _stored(folder, progress) or _ordinary(
        resolve_model(spec, None, progress=progress).folder
    )


def _inspected(folder: Path, progress: Progress) -> Inspection:
    return _stored(folder, progress) or _ordinary(folder)


def _refuse_several(folder: Path) -> None:
    """Raises CheckpointError for the output folder of a run whose exports have a folder each, naming these."""
    if not (folder / "report.json").is_file() or recognised(folder):
        return
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and recognised(path))
    if inside:
        raise CheckpointError(
            f"{folder}: it holds no checkpoint itself, but {', '.join(map(str, inside))}; inspect "
            f"{inside[0] if len(inside) == 1 else 'one of these'}"
        )


def _ordinary(folder: Path) -> Inspection:
    config = read_config(folder)
    whole = open_original(folder)
    loader = open_parts(config, settle_dtype(Dtype.AUTO, config), whole)
    reader, blank = unstacked(loader), PartLoader(loader.model, _Zeros(whole))
    uncalled = uncalled_layers(loader.model, blank, torch.device("cpu"))
    linears = chosen_linears(loader, reader, uncalled=uncalled)
    layers = [
        InspectedTensor(
            name=name,
            shape=layer.shape,
            stored=dtype_name(layer.dtype),
            n_bytes=layer.n_bytes,
            reason=COMPRESSIBLE,
        )
        for name, layer in linears.shapes.items()
    ]
    replaced = set(linears.tensors.values())
    kept = kept_tensors(reader, loader, linears.prefix, replaced, linears.reasons)
    others = (_tensor(reader, tensor.name, tensor.reason) for tensor in kept)
    return Inspection(
        folder=folder,
        format="ordinary weights",
        producer=None,
        n_blocks=linears.n_blocks,
        tensors=(*layers, *others),
        ordinary=Ordinary(reader, loader, linears, uncalled),
    )


def _stored(folder: Path, progress: Progress) -> Inspection | None:
    """A checkpoint whose layers are forms, or codes that become some; None for ordinary weights, or no checkpoint."""
    kind = recognised(folder)
    base = None if kind is None else kind.base_of(folder)
    contents = _contents(folder, kind, progress)
    if contents is None:
        return None
    found = _inspection(folder, contents) if base is None else _inspected(base, progress)
    return _corrected(found, folder, contents.corrections) if contents.corrections else found


def _contents(folder: Path, kind: type[Exporter] | None, progress: Progress) -> Contents | None:
    if kind is not None:
        return kind.contents(folder, progress)
    if not (folder / "config.json").is_file():
        return None
    return contents_of_base(open_base(folder), progress)


def _inspection(folder: Path, contents: Contents) -> Inspection:
    layers = [_told(layer, COMPRESSIBLE) for layer in contents.layers]
    others = [_told(other, STORED) for other in contents.others]
    numbers = {block_and_place(layer.name)[0] for layer in layers}
    return Inspection(
        folder=folder,
        format=contents.format,
        producer=contents.producer,
        n_blocks=len(numbers),
        tensors=(*layers, *others),
        ordinary=None,
    )


def _told(tensor: StoredTensor, reason: str) -> InspectedTensor:
    return InspectedTensor(
        name=tensor.name,
        shape=tensor.shape,
        stored=tensor.stored,
        n_bytes=tensor.n_bytes,
        reason=reason,
    )


def _corrected(base: Inspection, folder: Path, corrections: Sequence[StoredTensor]) -> Inspection:
    """With the corrections of an adapter, each at its layer."""
    left = {correction.name: correction for correction in corrections}
    tensors = []
    for tensor in base.tensors:
        correction = left.pop(tensor.name, None)
        if correction is not None:
            tensor = replace(
                tensor,
                stored=f"{tensor.stored} + {correction.stored}",
                n_bytes=tensor.n_bytes + correction.n_bytes,
            )
        tensors.append(tensor)
    if left:
        raise CheckpointError(
            f"{folder}: the adapter has factors for {next(iter(left))}, which {base.folder} does not hold"
        )
    return replace(
        base, folder=folder, format=f"{base.format}, with an adapter", tensors=tuple(tensors)
    )


def _tensor(reader: Tensors, name: str, reason: str) -> InspectedTensor:
    return InspectedTensor(
        name=name,
        shape=tuple(reader.shape(name)),
        stored=dtype_name(reader.dtype(name)),
        n_bytes=reader.nbytes(name),
        reason=reason,
    )
