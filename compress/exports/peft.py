"""Low-rank corrections as a PEFT LoRA adapter: W + BA, with scaling exactly 1 for every layer.

PEFT scales a layer by alpha / r, taken from `alpha_pattern` and `rank_pattern` where ranks differ:
both patterns are equal here. Servers that ignore the patterns divide lora_alpha by r, also 1, but
take every layer for one of rank r: for them zeros fill the factors up to one rank, and layers
without a correction have factors of zeros.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from compress.errors import CheckpointError
from compress.exports.base import LayerExport
from compress.exports.contents import StoredTensor
from compress.families.low_rank import Factors, as_low_rank
from compress.forms.low_rank import LowRank
from compress.models.checkpoint import Reader, Writer, read_json, write_json
from compress.models.resolve import Wanted, snapshot

PREFIX = "base_model.model."
STEM = "adapter_model"
CONFIG = "adapter_config.json"
_UNSUPPORTED = ("use_dora", "lora_bias", "modules_to_save")


class AdapterWriter:
    """Writes `adapter_config.json` and `adapter_model.safetensors` into a folder."""

    def __init__(self, folder: Path) -> None:
        """Make the folder, if it is not there."""
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.ranks: dict[str, int] = {}
        """The rank, zeros included, of each layer that has factors."""
        self.empty = True
        """Whether no layer has a correction."""
        self.rounded: torch.dtype | None = None
        self._transposed: set[bool] = set()
        self._zeros: dict[str, tuple[int, int]] = {}
        self._dtype = torch.float16
        self._writer = Writer(folder, shard_bytes=1 << 62, stem=STEM)

    def add(self, layer: LayerExport, correction: Factors | None) -> None:
        """Add a layer's factors (r, i) and (o, r): those on grids by their values, for PEFT knows no such format.

        Without a correction they are zeros of the layer's padded rank, which then has to be given.
        """
        self._transposed.add(layer.transposed)
        if correction is None:
            assert layer.padded_rank is not None
            self.ranks[layer.name] = layer.padded_rank
            self._zeros[layer.name] = layer.form.shape
            return
        self.empty = False
        form = as_low_rank(correction)
        if form is not correction:
            self.rounded = form.up.weight.dtype
        up_or, down_ri = form.up.weight, form.down.weight
        if layer.padded_rank is not None:
            more = layer.padded_rank - form.rank
            up_or, down_ri = pad(up_or, (0, more)), pad(down_ri, (0, 0, 0, more))
        self._write(layer.name, up_or, down_ri)

    def _write(self, name: str, up_or: Tensor, down_ri: Tensor) -> None:
        self.ranks[name], self._dtype = down_ri.shape[0], down_ri.dtype
        self._writer.add(f"{PREFIX}{name}.lora_A.weight", down_ri)
        self._writer.add(f"{PREFIX}{name}.lora_B.weight", up_or)

    def close(
        self, others: Collection[str], base_reference: str | None, revision: str | None = None
    ) -> None:
        """Finish, given the names of the linear layers that have no factors.

        `revision`: the commit of a base that is an id of the hub.
        A leaf name stands for all layers of that name only if each of them has factors.
        """
        for name, (o, i) in self._zeros.items():
            rank = self.ranks[name]
            zeros = (torch.zeros(size, dtype=self._dtype) for size in ((o, rank), (rank, i)))
            self._write(name, *zeros)
        leaves = {name.rpartition(".")[2] for name in self.ranks}
        shared = leaves & {name.rpartition(".")[2] for name in others}
        targets = {
            name if name.rpartition(".")[2] in shared else name.rpartition(".")[2]
            for name in self.ranks
        }
        rank = max(self.ranks.values())
        pattern = {name: r for name, r in sorted(self.ranks.items()) if r != rank}
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_reference,
            "revision": revision,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": pattern,
            "alpha_pattern": pattern,
            "target_modules": sorted(targets),
            "bias": "none",
            "lora_dropout": 0.0,
            # The factors are the same for GPT-2's Conv1D; PEFT turns their product when it merges.
            "fan_in_fan_out": self._transposed == {True},
            "init_lora_weights": True,
            "use_rslora": False,
            "use_dora": False,
        }
        write_json(self.folder / CONFIG, config)
        self._writer.close()


def local_reference(folder: str) -> str:
    """A folder as an adapter names its base: a path that is the id of no repository, as out/gptq may be."""
    is_path = Path(folder).is_absolute() or folder.startswith(("./", "../"))
    return folder if is_path else f"./{folder}"


def find_base(folder: Path) -> Path:
    """The checkpoint that an adapter in a folder of its own says it belongs to.

    A relative path counts from the current folder, or else from the adapter's; an id of the hub, which has a commit
    beside it, is looked up in its cache, or fetched. Raises CheckpointError.
    """
    config = read_json(folder / CONFIG)
    named, commit = config.get("base_model_name_or_path"), config.get("revision")
    if named and commit:
        wanted = Wanted(
            f"{folder / CONFIG}: base_model_name_or_path",
            "load it once where the hub can be reached",
        )
        return snapshot(f"{named}@{commit}", wanted)[0]
    places = [Path(str(named)).expanduser(), folder / str(named)] if named else []
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise CheckpointError(
            f"{folder}: its base_model_name_or_path, {named!r}, is no folder here; correct {CONFIG}, or call from "
            "the folder that the path counts from"
        )
    return found


def read_adapter(folder: Path) -> dict[str, LowRank]:
    """The factors of every layer, the adapter's scaling folded into `up`.

    Raises CheckpointError for an adapter that is more than W + BA, or that contradicts itself.
    """
    config, reader = read_json(folder / CONFIG), Reader(folder, STEM)
    odd = [key for key in _UNSUPPORTED if config.get(key)]
    if odd or config.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder}: only plain LoRA adapters are read; found {odd or config}")
    suffix = ".lora_A.weight"
    names = [key.removeprefix(PREFIX).removesuffix(suffix) for key in reader if suffix in key]
    if len(reader) != 2 * len(names):
        raise CheckpointError(f"{folder}: it holds something else than pairs of lora_A and lora_B")
    return {name: _factors(reader, config, name) for name in names}


def _factors(reader: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> LowRank:
    down = reader[f"{PREFIX}{name}.lora_A.weight"]
    up_name = f"{PREFIX}{name}.lora_B.weight"
    if up_name not in reader:
        raise CheckpointError(f"the adapter has lora_A of {name} and no lora_B")
    up = reader[up_name]
    rank = _matching(config.get("rank_pattern"), name, config["r"])
    if (down.shape[0], up.shape[1]) != (rank, rank):
        raise CheckpointError(f"the adapter's {name} has rank {down.shape[0]}, its config {rank}")
    alpha = _matching(config.get("alpha_pattern"), name, config["lora_alpha"])
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LowRank.from_factors(up if scaling == 1 else up * scaling, down)


def _matching(patterns: Mapping[str, float] | None, name: str, default: float) -> float:
    """As PEFT reads its patterns: a regular expression for the end of the name."""
    found = [
        value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name)
    ]
    return found[0] if found else default


def corrections_in(folder: Path) -> tuple[StoredTensor, ...]:
    """The low-rank correction of every layer, as the headers of an adapter tell; none where there is no adapter."""
    if not (folder / CONFIG).is_file():
        return ()
    reader, suffix = Reader(folder, STEM), ".lora_A.weight"
    found = []
    for key in reader:
        if suffix not in key:
            continue
        up = key.replace("lora_A", "lora_B")
        found.append(
            StoredTensor(
                name=key.removeprefix(PREFIX).removesuffix(suffix),
                shape=(reader.shape(up)[0], reader.shape(key)[1]),
                stored=f"rank {reader.shape(key)[0]}",
                n_bytes=reader.nbytes(key) + reader.nbytes(up),
            )
        )
    return tuple(found)
