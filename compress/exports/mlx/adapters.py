"""Low-rank corrections as an adapter that mlx-lm adds: `adapters/`, with one rank and scale 1 for all layers.

A layer's factors are lora_a (i, r) and lora_b (r, o), those of a stack of experts lora_a (e, r, i) and lora_b
(e, o, r). mlx-lm knows one rank for all, so that smaller factors are filled up with zeros, which changes no product.
Keys are paths within a decoder block: layers of that path without factors get some that add nothing.

Shapes: o = out_features, i = in_features, r = rank, e = experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from compress.bases.mlx import Place, expert_name, place_of
from compress.errors import CheckpointError
from compress.exports.contents import StoredTensor
from compress.families.low_rank import Factors, as_low_rank
from compress.forms.low_rank import LowRank
from compress.models.checkpoint import Reader, Writer, read_json, write_json

FOLDER = "adapters"
STEM = "adapters"
CONFIG = "adapter_config.json"
_UNPADDED = "unpadded"
_IN_BLOCK = re.compile(r"model\.layers\.\d+\.(?P<key>.+)")


class MlxAdapterWriter:
    """Writes `adapter_config.json` and `adapters.safetensors` into a folder."""

    def __init__(self, folder: Path) -> None:
        """Make the folder, if it is not there."""
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.ranks: dict[str, int] = {}
        self.rounded: torch.dtype | None = None
        self._unpadded = Writer(folder, stem=_UNPADDED)

    def add(self, name: str, correction: Factors) -> None:
        """Add the factors of a layer by its name in the source; those on grids by their values, in 16 bits."""
        form = as_low_rank(correction)
        if form is not correction:
            self.rounded = form.up.weight.dtype
        self.ranks[name] = form.rank
        self._unpadded.add(f"{name}.down", form.down.weight)
        self._unpadded.add(f"{name}.up", form.up.weight)

    def close(self, n_layers: int, n_experts: Mapping[str, int]) -> None:
        """Finish. `n_layers`: decoder blocks of the model; `n_experts`: in each stack, by its path."""
        self._unpadded.close()
        factors, rank = Reader(self.folder, _UNPADDED), max(self.ranks.values())
        writer = Writer(self.folder, shard_bytes=1 << 62, stem=STEM)
        for path, members in self._members().items():
            for leaf, tensor in _padded(factors, members, rank, n_experts.get(path)).items():
                writer.add(f"{path}.{leaf}", tensor)
        writer.close()
        for unpadded in self.folder.glob(f"{_UNPADDED}*"):
            unpadded.unlink()
        keys = {_key(path) for path in self._members()}
        config = {
            "fine_tune_type": "lora",
            "num_layers": n_layers,
            "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)},
        }
        write_json(self.folder / CONFIG, config)

    def _members(self) -> dict[str, dict[int, str]]:
        """The layers of each of MLX's paths: that of experts holds one for each, by number."""
        found: dict[str, dict[int, str]] = {}
        for name in self.ranks:
            place = place_of(name) or Place(name, 0)
            found.setdefault(place.path, {})[place.number] = name
        return found


def padded_bytes(shape: tuple[int, int], rank: int) -> int:
    """Bytes of two factors of this rank in 16 bits."""
    return 2 * rank * sum(shape)


def _key(path: str) -> str:
    found = _IN_BLOCK.fullmatch(path)
    return path if found is None else found["key"]


def _padded(
    factors: Reader, members: Mapping[int, str], rank: int, n_experts: int | None
) -> dict[str, Tensor]:
    """The two tensors of a path, filled up with zeros to the rank, and for experts without factors."""
    names = list(members.values())
    pairs = {n: (factors[f"{one}.down"], factors[f"{one}.up"]) for n, one in members.items()}
    (i, o), dtype = (
        (factors.shape(f"{names[0]}.down")[1], factors.shape(f"{names[0]}.up")[0]),
        factors.dtype(f"{names[0]}.down"),
    )
    lora_a = torch.zeros(n_experts or 1, rank, i, dtype=dtype)
    lora_b = torch.zeros(n_experts or 1, o, rank, dtype=dtype)
    for number, (down, up) in pairs.items():
        lora_a[number, : down.shape[0]] = down
        lora_b[number, :, : up.shape[1]] = up
    if n_experts is not None:
        return {"lora_a": lora_a, "lora_b": lora_b}
    return {"lora_a": lora_a[0].T.contiguous(), "lora_b": lora_b[0].T.contiguous()}


def read_mlx_adapter(folder: Path) -> dict[str, LowRank]:
    """The factors of every layer by its name in the source, the adapter's scale folded into `up`.

    Raises CheckpointError for an adapter that is none, or that contradicts itself.
    """
    config, reader = read_json(folder / CONFIG), Reader(folder, STEM)
    parameters = config.get("lora_parameters")
    if config.get("fine_tune_type", "lora") != "lora" or not isinstance(parameters, Mapping):
        raise CheckpointError(f"{folder}: only LoRA adapters of mlx-lm are read; found {config}")
    found = {}
    for name, down, up in _factors(reader):
        if down.shape[0] != parameters.get("rank") or up.shape[1] != down.shape[0]:
            raise CheckpointError(
                f"{folder}: the factors of {name} have the ranks {down.shape[0]} and {up.shape[1]}, {CONFIG} says "
                f"{parameters.get('rank')}"
            )
        scale = float(parameters["scale"])
        found[name] = LowRank.from_factors(up if scale == 1 else up * scale, down)
    return found


def _factors(reader: Reader) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, down (r, i) and up (o, r) of each layer."""
    for key in reader:
        path, _, leaf = key.rpartition(".")
        if leaf != "lora_a":
            continue
        if f"{path}.lora_b" not in reader:
            raise CheckpointError(f"the adapter has lora_a of {path} and no lora_b")
        first, second = reader[key], reader[f"{path}.lora_b"]
        if first.ndim == 2:
            yield path, first.T.contiguous(), second.T.contiguous()
            continue
        for number, (down, up) in enumerate(zip(first, second, strict=True)):
            yield expert_name(path, number), down.clone(), up.clone()


def corrections_in(folder: Path) -> tuple[StoredTensor, ...]:
    """The correction of every path of an adapter, from headers; none where there is no adapter."""
    if not folder.is_dir():
        return ()
    reader, found = Reader(folder, STEM), []
    for key in reader:
        path, _, leaf = key.rpartition(".")
        if leaf != "lora_a":
            continue
        first, second = reader.shape(key), reader.shape(f"{path}.lora_b")
        stacked = len(first) > 2
        i, rank = (first[2], first[1]) if stacked else (first[0], first[1])
        found.append(
            StoredTensor(
                name=path,
                shape=(second[1], i),
                stored=f"rank {rank}",
                n_bytes=reader.nbytes(key) + reader.nbytes(f"{path}.lora_b"),
            )
        )
    return tuple(found)
