"""Checkpoints of mlx-lm, and our own for it: affine grids of 2, 3, 4, 5, 6 and 8 bits.

Tensors of a layer: weight (o, i * bits / 32) uint32, the codes of each row as one stream of bits, the lowest first;
scales and biases (o, G) in floats: w = scales * code + biases. Experts lie in stacks, `switch_mlp.gate_proj.weight`
(e, o, ...): here each is a layer by the name that the model's own checkpoint has for it. Which bits and groups a path
has stands in config.json's `quantization`, below its name or as the default of all.
Facts: mlx-lm's `utils.load_model`.
Shapes: o = out_features, i = in_features, G = number of groups of inputs, e = experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.bases.base import Base, Loading, is_whole, refuse_bad_scales
from compress.errors import CheckpointError
from compress.forms.base import Form
from compress.forms.dense import Dense
from compress.forms.packing import WORD, pack, unpack
from compress.forms.quantised import Quantised

BITS = (2, 3, 4, 5, 6, 8)
EMBEDDINGS, HEAD = "embed_tokens", "lm_head"
STACK = "switch_mlp"
MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""Names of an expert's layers in checkpoints whose blocks hold `block_sparse_moe`, and those in MLX's stacks."""
_EXPERT = re.compile(r"(?P<above>.+)\.experts\.(?P<number>\d+)\.(?P<leaf>\w+)")
_STACK = re.compile(rf"(?P<above>.+)\.{STACK}\.(?P<leaf>\w+)")
_NUMBERS = (".scales", ".biases")
_FLOATS = (torch.float16, torch.bfloat16)
_SPARSE = "block_sparse_moe"


@dataclass(frozen=True)
class Place:
    """The place of an expert's layer in a stack."""

    path: str
    """Of the stack: "model.layers.0.mlp.switch_mlp.gate_proj"."""
    number: int


def place_of(name: str) -> Place | None:
    """Where MLX keeps an expert's layer of a checkpoint; None for a layer that is no expert's."""
    found = _EXPERT.fullmatch(name)
    if found is None:
        return None
    leaf = MIXTRAL.get(found["leaf"], found["leaf"])
    return Place(f"{found['above']}.{STACK}.{leaf}", int(found["number"]))


def expert_name(path: str, number: int) -> str:
    """The name that the model's own checkpoint has for an expert's layer in a stack."""
    found = _STACK.fullmatch(path)
    assert found is not None
    leaf = found["leaf"]
    if found["above"].endswith(f".{_SPARSE}"):
        leaf = next(own for own, one in MIXTRAL.items() if one == leaf)
    return f"{found['above']}.experts.{number}.{leaf}"


class MlxBase(Base, name="mlx"):
    """Layers as MLX's three tensors, stacks of experts taken apart."""

    parts = ("scales", "biases", "weight")
    loading = Loading(packages=("mlx-lm",), imports=(), arguments={}, peft=False, vllm=None)

    def _find_layers(self) -> tuple[str, ...]:
        coded = {key.rpartition(".")[0]: None for key in self.reader if key.endswith(_NUMBERS)}
        if not coded:
            raise CheckpointError(
                f"{self.folder}: its config says mlx, but no tensor's name ends in .scales; the two do not belong "
                "together, download the checkpoint again"
            )
        for path in coded:
            for part in self.parts:
                self._shape_of(path, part)
        dense = [key.removesuffix(".weight") for key in self.reader if key.endswith(".weight")]
        stacks = dict.fromkeys(path for path in (*coded, *dense) if _STACK.fullmatch(path))
        self._places: dict[str, Place] = {}
        for path in stacks:
            for number in range(self._shape_of(path, "weight")[0]):
                self._places[expert_name(path, number)] = Place(path, number)
        return (*(path for path in coded if path not in stacks), *self._places)

    @property
    def tied_heads(self) -> Mapping[str, str]:
        """The head, where none is stored and the embeddings are packed."""
        embeddings = [name for name in self.layers if name.endswith(f".{EMBEDDINGS}")]
        has_own = any(key.startswith(f"{HEAD}.") for key in self.reader)
        return {} if has_own or not embeddings else {HEAD: embeddings[0]}

    @property
    def grid(self) -> str:
        """Bits and group size that most layers have: "4 bits, groups of 64"."""
        return f"{self.settings['bits']} bits, groups of {self.settings['group_size']}"

    def tensors_of(self, name: str) -> list[str]:
        """The tensors of the layer, or of the stack that it is in."""
        path = self._path(name)
        return [f"{path}.{part}" for part in self.parts if f"{path}.{part}" in self.reader]

    def stored_bytes(self, name: str) -> int:
        """Bytes of the layer's weight; of an expert's, its share of the stack's."""
        share = self._shape_of(self._path(name), "weight")[0] if name in self._places else 1
        return super().stored_bytes(name) // share

    def shape(self, name: str) -> tuple[int, int]:
        """(o, i), from the shape of the packed words and the bits."""
        path = self._path(name)
        o, words = self._shape_of(path, "weight")[-2:]
        if not self._is_coded(path):
            return o, words
        bits, size = self._grid_of(path)
        n_groups = self._shape_of(path, "scales")[-1]
        if words * WORD != n_groups * size * bits:
            raise CheckpointError(
                f"{self.folder}: {path}.weight has {words} words a row and {n_groups} scales; config.json says {bits} "
                f"bits in groups of {size}, which would be {n_groups * size * bits // WORD} words"
            )
        return o, words * WORD // bits

    def form(self, name: str) -> Form:
        """The quantised weight, its codes as stored; dense where no form holds its numbers."""
        path = self._path(name)
        weight = self._part(name, "weight")
        if not self._is_coded(path):
            return Dense(weight)
        shape, (bits, size) = self.shape(name), self._grid_of(path)
        if weight.dtype != torch.uint32:
            raise CheckpointError(
                f"{self.folder}: {path}.weight is stored as {weight.dtype}; MLX packs codes in uint32"
            )
        scales_og, biases_og = self._part(name, "scales"), self._part(name, "biases")
        for numbers in (scales_og, biases_og):
            refuse_bad_scales(f"{self.folder}: {name}", numbers)
        if scales_og.shape != biases_og.shape:
            self._refuse_shape(path, "biases", self._shape_of(path, "scales"), "its scales")
        tensors = {"qweight": weight.view(torch.int32).T.contiguous()}
        zeros_og = zero_points(scales_og, biases_og, bits)
        stored = (scales_og,) if zeros_og is not None else (scales_og, biases_og)
        dtype = next((one for one in _FLOATS if all(holds(one, it) for it in stored)), None)
        if dtype is None:
            return _dense(tensors["qweight"], (scales_og, biases_og), bits, size)
        tensors["scales"] = scales_og.T.to(dtype).contiguous()
        if zeros_og is None:
            tensors["offsets"] = biases_og.T.to(dtype).contiguous()
        elif not bool((zeros_og == 1 << (bits - 1)).all()):
            tensors["qzeros"] = pack(zeros_og, bits).T.contiguous()
        return Quantised(shape, bits, size, tensors)

    def _path(self, name: str) -> str:
        return self._places[name].path if name in self._places else name

    def _part(self, name: str, part: str) -> Tensor:
        """A layer's tensor, or its slice of a stack."""
        if name not in self._places:
            return self._tensor(name, part)
        place = self._places[name]
        return self._tensor(place.path, part)[place.number]

    def _is_coded(self, path: str) -> bool:
        return f"{path}.scales" in self.reader

    def _grid_of(self, path: str) -> tuple[int, int]:
        """Bits and group size, by the path's own entry or the default."""
        own = self.settings.get(path)
        found = own if isinstance(own, Mapping) else self.settings
        bits, size = found.get("bits"), found.get("group_size")
        mode = found.get("mode", "affine")
        if mode != "affine" or bits not in BITS or not is_whole(size, 1):
            raise CheckpointError(
                f"{self.folder}: {path} has mode {mode!r}, {bits!r} bits, groups of {size!r}; read are affine grids of "
                f"{', '.join(map(str, BITS))} bits"
            )
        return bits, size


def holds(dtype: torch.dtype, values: Tensor) -> bool:
    """Whether a dtype holds every one of them."""
    return bool((values.to(dtype).double() == values.double()).all())


def zero_points(scales: Tensor, biases: Tensor, bits: int) -> Tensor | None:
    """The integers z in [0, 2**bits) with biases = -scales * z, to the bit; None if there are none."""
    wide = scales.double()
    # A group whose scale is nought is all zeros whatever its zero point.
    steps = torch.where(wide == 0, 1.0, wide)
    zeros = torch.where((wide == 0) & (biases == 0), 1 << (bits - 1), -biases.double() / steps)
    whole = zeros.round().clamp(0, (1 << bits) - 1)
    return whole.to(torch.int32) if bool((whole * wide == -biases.double()).all()) else None


def _dense(words: Tensor, numbers: tuple[Tensor, Tensor], bits: int, size: int) -> Dense:
    """The weight in fp32."""
    scales_og, biases_og = (each.float().repeat_interleave(size, 1) for each in numbers)
    codes_oi = unpack(words, bits, scales_og.shape[1]).T.float()
    return Dense(codes_oi * scales_og + biases_og)
