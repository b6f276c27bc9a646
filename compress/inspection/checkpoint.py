"""What is in a checkpoint, compressed or not: layers, shapes, dtypes, bytes. Headers tell, and no model is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoConfig

from calibration.skeleton import PartLoader, build_skeleton
from compress.bases import Base, open_base
from compress.bases.detecting import open_reader, quantisation_of
from compress.bases.plain import PlainBase
from compress.callbacks import Progress
from compress.errors import CheckpointError
from compress.exports.adapter import CONFIG, PREFIX, STEM, find_base
from compress.exports.gptq import ADAPTER
from compress.forms.build import empty
from compress.forms.loading import FORMAT
from compress.models.checkpoint import Reader, read_json
from compress.models.devices import settle_dtype
from compress.models.dtype import Dtype
from compress.models.resolve import resolve_model
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

    reader: Reader
    loader: PartLoader
    linears: Linears


def inspect(spec: str, *, progress: Progress) -> Inspection:
    """A folder, a hub id, a .gguf file or `demo`: a model, an export of ours, or a checkpoint that another tool wrote.

    Raises CheckpointError or InputError saying what was found, and what `resolve_model` raises.
    """
    folder = Path(spec).expanduser()
    if (folder / CONFIG).is_file() and not (folder / "config.json").is_file():
        return _adapted(_stored(find_base(folder), progress), folder, Reader(folder, STEM))
    if (folder / "config.json").is_file() and _is_compressed(folder):
        return _stored(folder, progress)
    _refuse_several(folder)
    return _ordinary(resolve_model(spec, None, progress=progress).folder)


def _refuse_several(folder: Path) -> None:
    """Raises CheckpointError for the output folder of a run whose exports have a folder each, naming these."""
    if not (folder / "report.json").is_file() or (folder / "config.json").is_file():
        return
    inside = sorted(
        path.parent for name in (CONFIG, "config.json") for path in folder.glob(f"*/{name}")
    )
    if inside:
        raise CheckpointError(
            f"{folder}: it holds no checkpoint itself, but {', '.join(map(str, inside))}; inspect "
            f"{inside[0] if len(inside) == 1 else 'one of these'}"
        )


def _is_compressed(folder: Path) -> bool:
    config = read_json(folder / "config.json")
    return config.get("model_type") == FORMAT or quantisation_of(folder, config) is not None


def _ordinary(folder: Path) -> Inspection:
    reader, config = Reader(folder), AutoConfig.from_pretrained(folder)
    loader = PartLoader(build_skeleton(config, settle_dtype(Dtype.AUTO, config)), reader)
    linears = chosen_linears(loader, reader)
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
        ordinary=Ordinary(reader, loader, linears),
    )


def _stored(folder: Path, progress: Progress) -> Inspection:
    """Of a checkpoint whose layers are forms, or codes that become some."""
    config = read_json(folder / "config.json")
    if config.get("model_type") == FORMAT:
        reader = open_reader(folder)
        layers, taken = _native_layers(reader, config)
        found = ("native", "compress-llm")
    else:
        base = open_base(folder)
        if isinstance(base, PlainBase):
            return _ordinary(folder)
        reader = base.reader
        layers = list(_packed_layers(base, progress))
        taken = {tensor for name in base.layers for tensor in base.tensors_of(name)}
        found = (base.description, base.producer or "")
    others = (_tensor(reader, name, STORED) for name in reader if name not in taken)
    numbers = {part for layer in layers for part in layer.name.split(".") if part.isdigit()}
    inspected = Inspection(
        folder=folder,
        format=found[0],
        producer=found[1] or None,
        n_blocks=len(numbers),
        tensors=(*layers, *others),
        ordinary=None,
    )
    if (folder / ADAPTER / CONFIG).is_file():
        return _adapted(inspected, folder, Reader(folder / ADAPTER, STEM))
    return inspected


def _native_layers(
    reader: Reader, config: Mapping[str, object]
) -> tuple[list[InspectedTensor], set[str]]:
    """By the table in config.json; and the names of the tensors that belong to them."""
    table = config.get("layers")
    if not isinstance(table, Mapping):
        raise CheckpointError(
            f"{reader.folder}: config.json lacks layers; get the checkpoint again"
        )
    layers, taken = [], set()
    for name, entry in table.items():
        o, i = entry["shape"]
        try:
            form = empty(entry["form"], (o, i), torch.float32, "meta")
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{reader.folder}: {name} has a form that cannot be read: {error}"
            ) from error
        keys = [f"{name}.form.{key}" for key in form.state_dict()]
        absent = [key for key in keys if key not in reader]
        if absent:
            raise CheckpointError(f"{reader.folder}: {absent[0]} is missing; get it again")
        taken.update(keys)
        layers.append(_layer(name, form.shape, form.describe(), sum(map(reader.nbytes, keys))))
    return layers, taken


def _packed_layers(base: Base, progress: Progress) -> Iterator[InspectedTensor]:
    """Each is read, and let go: only its codes tell whether it has zeros, or groups in another order."""
    for index, name in enumerate(base.layers):
        progress("read layers", index, len(base.layers))
        form = base.form(name)
        yield _layer(name, form.shape, form.describe(), base.stored_bytes(name))
    progress("read layers", len(base.layers), len(base.layers))


def _layer(name: str, shape: tuple[int, int], stored: str, n_bytes: int) -> InspectedTensor:
    return InspectedTensor(
        name=name, shape=shape, stored=stored, n_bytes=n_bytes, reason=COMPRESSIBLE
    )


def _adapted(base: Inspection, folder: Path, adapter: Reader) -> Inspection:
    """With the paths of an adapter, each at its layer."""
    suffix = ".lora_A.weight"
    paths = {key.removeprefix(PREFIX).removesuffix(suffix): key for key in adapter if suffix in key}
    tensors = []
    for tensor in base.tensors:
        key = paths.pop(tensor.name, None)
        if key is None:
            tensors.append(tensor)
            continue
        rank = adapter.shape(key)[0]
        more = adapter.nbytes(key) + adapter.nbytes(key.replace("lora_A", "lora_B"))
        stored = f"{tensor.stored} + rank {rank}"
        tensors.append(replace(tensor, stored=stored, n_bytes=tensor.n_bytes + more))
    if paths:
        raise CheckpointError(
            f"{folder}: the adapter has factors for {next(iter(paths))}, which {base.folder} does not hold"
        )
    return replace(
        base, folder=folder, format=f"{base.format}, with an adapter", tensors=tuple(tensors)
    )


def _tensor(reader: Reader, name: str, reason: str) -> InspectedTensor:
    return InspectedTensor(
        name=name,
        shape=tuple(reader.shape(name)),
        stored=dtype_name(reader.dtype(name)),
        n_bytes=reader.nbytes(name),
        reason=reason,
    )


def dtype_name(dtype: torch.dtype) -> str:
    """As people write it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")
