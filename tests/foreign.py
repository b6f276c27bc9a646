"""Checkpoints as other tools write them, made by the plainest code, of a model that `families.save_tiny` wrote."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LINEAR = re.compile(r".*\.(q|k|v|o|gate|up|down)_proj\.weight")
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0),
        *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
    ]
)
"""Dettmers et al. 2023, arXiv:2305.14314, appendix E, in fp32."""


@dataclass(frozen=True)
class Grid:
    """Codes and zeros as unsigned numbers: (o, i), (o, G); scales (o, G); the group of each input (i,)."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    groups: Tensor
    bits: int

    def dense(self) -> Tensor:
        """(o, i), fp32, number by number."""
        o, i = self.codes.shape
        weight = torch.empty(o, i)
        for row in range(o):
            for column in range(i):
                g = int(self.groups[column])
                steps = int(self.codes[row, column]) - int(self.zeros[row, g])
                weight[row, column] = float(self.scales[row, g]) * steps
        return weight


def grid(
    weight: Tensor,
    bits: int = 4,
    group_size: int = 16,
    kind: str = "symmetric",
    order: str = "in order",
) -> Grid:
    """Rounded to a coarse grid; asymmetric ones have zeros of 0 and of the largest code among them."""
    o, i = weight.shape
    groups = torch.arange(i) // group_size
    if order == "mixed":
        groups = groups[torch.randperm(i, generator=torch.Generator().manual_seed(i))]
    n_groups, middle, top = -(-i // group_size), 1 << (bits - 1), (1 << bits) - 1
    scales = torch.empty(o, n_groups)
    for g in range(n_groups):
        scales[:, g] = weight[:, groups == g].abs().amax(1) / max(middle - 1, 1)
    scales = scales.half().float()
    zeros = torch.full((o, n_groups), middle)
    if kind == "asymmetric":
        zeros = torch.randint(0, top + 1, (o, n_groups), generator=torch.Generator().manual_seed(o))
        zeros[0, 0], zeros[1, 0] = 0, top
    codes = ((weight / scales[:, groups]).round() + zeros[:, groups]).clamp(0, top).long()
    return Grid(codes, scales, zeros, groups, bits)


def stream(codes: list[int], bits: int) -> list[int]:
    """GPTQ's: codes of b bits one after the other, cut into words of 32."""
    number = sum(code << (bits * k) for k, code in enumerate(codes))
    return [signed(number >> (32 * k) & 0xFFFFFFFF) for k in range(len(codes) * bits // 32)]


def whole(codes: list[int], bits: int) -> list[int]:
    """compressed-tensors': as many whole codes a word as fit, the last word filled up with noughts."""
    k = 32 // bits
    parts = [codes[start : start + k] for start in range(0, len(codes), k)]
    return [signed(sum(code << (bits * n) for n, code in enumerate(part))) for part in parts]


def signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def rows_of(matrix: Tensor, pack: Callable[[list[int], int], list[int]], bits: int) -> Tensor:
    return torch.tensor([pack(row, bits) for row in matrix.tolist()], dtype=torch.int32)


def gptq_layer(
    one: Grid, version: int = 1, scale_dtype: torch.dtype = torch.float16
) -> dict[str, Tensor]:
    zeros = (one.zeros - 1) % (1 << one.bits) if version == 1 else one.zeros
    return {
        "qweight": rows_of(one.codes, stream, one.bits).T.contiguous(),
        "qzeros": rows_of(zeros.T, stream, one.bits),
        "scales": one.scales.T.contiguous().to(scale_dtype),
        "g_idx": one.groups.to(torch.int32),
    }


def packed_layer(one: Grid, scale_dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    o, i = one.codes.shape
    tensors = {
        "weight_packed": rows_of(one.codes, whole, one.bits),
        "weight_scale": one.scales.to(scale_dtype),
        "weight_shape": torch.tensor([o, i]),
    }
    if not bool((one.zeros == 1 << (one.bits - 1)).all()):
        tensors["weight_zero_point"] = rows_of(one.zeros.T, whole, one.bits).T.contiguous()
    if bool((one.groups.diff() < 0).any()):
        tensors["weight_g_idx"] = one.groups.to(torch.int32)
    return tensors


def awq_layer(one: Grid) -> dict[str, Tensor]:
    def words(codes: list[int], bits: int) -> list[int]:
        eights = [codes[start : start + 8] for start in range(0, len(codes), 8)]
        return [
            signed(sum(eight[AWQ_ORDER[k]] << (bits * k) for k in range(8))) for eight in eights
        ]

    return {
        "qweight": rows_of(one.codes.T, words, 4),
        "qzeros": rows_of(one.zeros.T, words, 4),
        "scales": one.scales.T.contiguous().half(),
    }


@dataclass(frozen=True)
class Blocks:
    """Codes (o, i) of a table of 16 numbers, and what each block of `size` weights, row by row, is multiplied by."""

    codes: Tensor
    sizes: Tensor
    size: int

    def dense(self) -> Tensor:
        """(o, i), fp32, number by number."""
        o, i = self.codes.shape
        weight = torch.empty(o, i)
        for place in range(o * i):
            row, column = divmod(place, i)
            weight[row, column] = NF4[self.codes[row, column]] * self.sizes[place // self.size]
        return weight


def blocks(weight: Tensor, size: int = 48) -> Blocks:
    """Each weight the nearest of the table, times the largest of its block; blocks run over the ends of rows."""
    flat = weight.flatten()
    sizes = torch.stack([part.abs().max() for part in flat.split(size)])
    spread = torch.stack([sizes[place // size] for place in range(len(flat))])
    codes = ((flat / spread)[:, None] - NF4).abs().argmin(1)
    return Blocks(codes.reshape(weight.shape), sizes, size)


def twice(one: Blocks, size: int = 16) -> tuple[Blocks, dict[str, Tensor], dict[str, object]]:
    """Double quantisation: the sizes in bytes; what they then are, the tensors that say so, and the words."""
    table, offset = torch.linspace(-1, 1, 256), float(one.sizes.mean())
    outer = torch.stack([(part - offset).abs().max() for part in one.sizes.split(size)])
    codes = [
        int(((number - offset) / outer[b // size] - table).abs().argmin())
        for b, number in enumerate(one.sizes)
    ]
    sizes = torch.stack([table[c] * outer[b // size] + offset for b, c in enumerate(codes)])
    tensors = {
        "weight.absmax": torch.tensor(codes, dtype=torch.uint8),
        "weight.nested_absmax": outer,
        "weight.nested_quant_map": table,
    }
    words = {"nested_blocksize": size, "nested_dtype": "float32", "nested_offset": offset}
    return Blocks(one.codes, sizes, one.size), tensors, words


def bitsandbytes_layer(
    one: Blocks,
    nested: tuple[dict[str, Tensor], dict[str, object]] | None = None,
    storage: torch.dtype = torch.uint8,
) -> dict[str, Tensor]:
    codes = one.codes.flatten().tolist()
    pairs = [codes[start] * 16 + codes[start + 1] for start in range(0, len(codes), 2)]
    state: dict[str, object] = {"quant_type": "nf4", "blocksize": one.size, "dtype": "float32"}
    state |= {"shape": list(one.codes.shape), **(nested[1] if nested else {})}
    return {
        "weight": torch.tensor(pairs, dtype=torch.uint8).view(storage)[:, None],
        "weight.quant_map": NF4.clone(),
        "weight.absmax": one.sizes,
        **(nested[0] if nested else {}),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }


BITSANDBYTES = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": False,
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 16, "zero_point": True}


def packed_config(
    bits: int = 4, group_size: int | None = 16, **changes: object
) -> dict[str, object]:
    weights = {
        **{"num_bits": bits, "type": "int", "symmetric": True, "group_size": group_size},
        "strategy": "group" if group_size else "channel",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "version": "0.19.0",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {**weights, **changes}}},
        "ignore": ["lm_head"],
    }


def write(
    source: Path,
    folder: Path,
    config: Mapping[str, object],
    make_layer: Callable[[Tensor], Mapping[str, Tensor]],
    *,
    stem: str = "model",
    layers: re.Pattern[str] = LINEAR,
) -> Path:
    """The model in `source` with these layers packed; `config` goes where today's tools put it."""
    folder.mkdir()
    tensors: dict[str, Tensor] = {}
    for key, tensor in load_file(source / "model.safetensors").items():
        if not layers.fullmatch(key):
            tensors[key] = tensor
            continue
        name = key.removesuffix(".weight")
        tensors |= {f"{name}.{part}": value for part, value in make_layer(tensor.float()).items()}
    save_file(tensors, folder / f"{stem}.safetensors", {"format": "pt"})
    model = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**model, "quantization_config": config}))
    for path in source.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def change(folder: Path, edit: Callable[[dict[str, Tensor]], None], stem: str = "model") -> None:
    """Edit the tensors of a checkpoint in one file."""
    tensors = load_file(folder / f"{stem}.safetensors")
    edit(tensors)
    save_file(tensors, folder / f"{stem}.safetensors", {"format": "pt"})


def change_config(folder: Path, **changes: object) -> None:
    """Entries of config.json; None takes one away."""
    config = json.loads((folder / "config.json").read_text())
    config |= changes
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
