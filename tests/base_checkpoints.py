"""A tiny checkpoint of every base format, for the contract: a new format needs its line in CHECKPOINTS."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import few_bits
import foreign
import torch
from foreign import change_config, grid, write
from torch import Tensor
from workspaces import recipe

import compress
from compress.methods.rtn import RTN

Maker = Callable[[Path, Path], Path]


def pruned(weight: Tensor) -> dict[str, Tensor]:
    """Half of the weights, 2:4."""
    kept = weight.abs().reshape(-1, 4).argsort(1).argsort(1) > 1
    return {"weight": weight * kept.reshape(weight.shape)}


def plain(source: Path, folder: Path) -> Path:
    write(source, folder, {}, pruned)
    change_config(folder, quantization_config=None)
    return folder


def native(source: Path, folder: Path) -> Path:
    compress.run(recipe(source.parent, method=RTN(group_size=16), out=folder))
    return folder


def int8_rows(weight: Tensor) -> dict[str, Tensor]:
    """Of docs/extend/int8_rows.py, a row at a time."""
    scales = torch.stack([row.abs().max() / 127 for row in weight]).half()
    rows = [(row / s.float()).round() for row, s in zip(weight, scales, strict=True)]
    return {"codes": torch.stack(rows).to(torch.int8), "row_scale": scales}


def stacked(source: Path, folder: Path) -> Path:
    """Of another model, whose experts are stacked."""
    shutil.rmtree(source)
    few_bits.save_gpt_oss(source)
    few_bits.as_mxfp4(source, folder)
    return folder


MLX = {"group_size": 32, "bits": 4, "mode": "affine"}


def mlx_layer(found: foreign.Grid) -> dict[str, Tensor]:
    """MLX's tensors of a grid, number by number: a stream of bits a row, and what code 0 stands for."""
    words = [foreign.stream(row, found.bits) for row in found.codes.tolist()]
    return {
        "weight": torch.tensor(words, dtype=torch.int32).view(torch.uint32),
        "scales": found.scales.half(),
        "biases": (-found.scales * found.zeros).half(),
    }


def mlx(source: Path, folder: Path) -> Path:
    """As mlx-lm writes it: the settings twice, and no method's name."""
    write(source, folder, MLX, lambda w: mlx_layer(grid(w, group_size=32)))
    change_config(folder, quantization=MLX)
    return folder


CHECKPOINTS: Mapping[str, Maker] = {
    "awq": lambda source, folder: write(
        source, folder, foreign.AWQ, lambda w: foreign.awq_layer(grid(w, kind="asymmetric"))
    ),
    "bitsandbytes": lambda source, folder: write(
        source,
        folder,
        foreign.BITSANDBYTES,
        lambda w: foreign.bitsandbytes_layer(foreign.blocks(w)),
    ),
    "compressed-tensors": lambda source, folder: write(
        source, folder, foreign.packed_config(), lambda w: foreign.packed_layer(grid(w))
    ),
    "fp8": lambda source, folder: write(
        source, folder, few_bits.FP8, lambda w: few_bits.fp8_layer(w).tensors
    ),
    "gptq": lambda source, folder: write(
        source, folder, foreign.GPTQ, lambda w: foreign.gptq_layer(grid(w))
    ),
    "int8-rows": lambda source, folder: write(
        source, folder, {"quant_method": "int8-rows"}, int8_rows
    ),
    "mlx": mlx,
    "modelopt": lambda source, folder: write(
        source, folder, few_bits.MODELOPT, lambda w: few_bits.nvfp4_layer(w, "modelopt").tensors
    ),
    "mxfp4": stacked,
    "native": native,
    "plain": plain,
}
"""By the format's name: from a folder with a model to one with its compressed checkpoint."""
