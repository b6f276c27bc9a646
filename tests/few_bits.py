"""Checkpoints in 8 and 4 bits of floating point, written by the plainest code, and what plain code reads in them."""

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from families import byte_tokenizer
from foreign import change_config
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP8_MAX = 448.0


def e4m3(byte: int) -> float:
    """S.EEEE.MMM with a bias of 7, no infinities."""
    sign, exponent, mantissa = -1 if byte >> 7 else 1, byte >> 3 & 15, byte & 7
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def fp4(code: int) -> float:
    return FP4[code & 7] * (-1 if code & 8 else 1)


def nearest_fp4(numbers: Tensor) -> Tensor:
    codes = (numbers.abs()[..., None] - torch.tensor(FP4)).abs().argmin(-1)
    return codes + 8 * (numbers < 0)


def bytes_of(tensor: Tensor) -> list[list[int]]:
    return tensor.view(torch.uint8).tolist()


@dataclass(frozen=True)
class Layer:
    """A layer's tensors by the last words of their names, and how to read the weight that they mean, fp32."""

    tensors: Mapping[str, Tensor]
    read: Callable[[], Tensor]

    @property
    def dense(self) -> Tensor:
        return self.read()


def fp8(weight: Tensor, block: tuple[int, int], scale: str = "float") -> tuple[Tensor, Tensor]:
    """Numbers of 8 bits (o, i), and one scale for each block."""
    (o, i), (r, c) = weight.shape, block
    scales = torch.empty(-(-o // r), -(-i // c))
    codes = torch.empty(o, i, dtype=torch.float8_e4m3fn)
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            rows, columns = slice(row * r, (row + 1) * r), slice(column * c, (column + 1) * c)
            size = float(weight[rows, columns].abs().max()) / FP8_MAX
            size = 2.0 ** math.ceil(math.log2(size)) if scale == "ue8m0" else size
            scales[row, column] = size
            codes[rows, columns] = (weight[rows, columns] / scales[row, column]).to(codes.dtype)
    return codes, scales


def meant_by_fp8(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Number by number, each product rounded to fp32 once."""
    o, i = codes.shape
    numbers = bytes_of(codes)
    dense = torch.empty(o, i)
    for row in range(o):
        for column in range(i):
            scale = float(scales[row // block[0], column // block[1]])
            dense[row, column] = e4m3(numbers[row][column]) * scale
    return dense


def fp8_layer(
    weight: Tensor, block: tuple[int, int] | None = (24, 40), scale: str = "float"
) -> Layer:
    """transformers' `fp8`; without a block one scale for all."""
    whole = tuple(weight.shape)
    codes, scales = fp8(weight, block or whole, scale)
    stored = scales if block else scales.reshape(())
    return Layer(
        {"weight": codes, "weight_scale_inv": stored},
        lambda: meant_by_fp8(codes, scales, block or whole),
    )


def fp8_bytes_layer(weight: Tensor, block: tuple[int, int] = (24, 40)) -> Layer:
    """The same with scales in powers of two, of which the exponents are stored."""
    codes, scales = fp8(weight, block, "ue8m0")
    powers = (torch.log2(scales) + 127).to(torch.uint8)
    stored = powers.view(torch.float8_e8m0fnu)
    return Layer(
        {"weight": codes, "weight_scale_inv": stored}, lambda: meant_by_fp8(codes, scales, block)
    )


def float_quantized_layer(weight: Tensor, strategy: str) -> Layer:
    """compressed-tensors' float-quantized."""
    o, i = weight.shape
    block = {"tensor": (o, i), "channel": (1, i), "block": (24, 40)}[strategy]
    codes, scales = fp8(weight, block)
    stored = scales.reshape(1) if strategy == "tensor" else scales
    return Layer(
        {"weight": codes, "weight_scale": stored}, lambda: meant_by_fp8(codes, scales, block)
    )


def pairs(codes: Tensor) -> Tensor:
    """Two codes a byte, the first in the low half."""
    return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)


def meant_by_pairs(codes: Tensor, sizes: Tensor) -> Tensor:
    """Number by number, each product rounded to fp32 once: codes (o, i), sizes (o, G)."""
    o, i = codes.shape
    group, dense = i // sizes.shape[1], torch.empty(o, i)
    for row in range(o):
        for column in range(i):
            size = float(sizes[row, column // group])
            dense[row, column] = fp4(int(codes[row, column])) * size
    return dense


def nvfp4_layer(weight: Tensor, writer: str) -> Layer:
    """compressed-tensors divides by its global scale, ModelOpt multiplies."""
    outer = torch.tensor(float(weight.abs().max()) / (FP8_MAX * 6))
    parts = weight.unflatten(-1, (-1, 16))
    scales = (parts.abs().amax(-1) / 6 / outer).to(torch.float8_e4m3fn)
    inner = torch.tensor([[e4m3(byte) for byte in row] for row in bytes_of(scales)])
    stored = 1 / outer if writer == "compressed-tensors" else outer
    sizes = inner / stored if writer == "compressed-tensors" else inner * stored
    codes = nearest_fp4(parts / sizes[..., None]).flatten(-2)
    if writer == "compressed-tensors":
        tensors = {"weight_packed": pairs(codes), "weight_global_scale": stored.reshape(1)}
    else:
        inputs = torch.tensor(0.01)
        tensors = {"weight": pairs(codes), "weight_scale_2": stored, "input_scale": inputs}
    return Layer({**tensors, "weight_scale": scales}, lambda: meant_by_pairs(codes, sizes))


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (o, i), powers of two (o, i / 32), and these as bytes."""
    parts = weight.unflatten(-1, (-1, 32))
    powers = parts.abs().amax(-1).log2().floor() - 2
    sizes = torch.tensor([[2.0 ** int(power) for power in row] for row in powers.tolist()])
    codes = nearest_fp4(parts / sizes[..., None]).flatten(-2)
    return codes, sizes, (powers + 127).to(torch.uint8)


def mxfp4_layer(weight: Tensor) -> Layer:
    """compressed-tensors' mxfp4-pack-quantized."""
    codes, sizes, powers = mxfp4(weight)
    tensors = {"weight_packed": pairs(codes), "weight_scale": powers}
    return Layer(tensors, lambda: meant_by_pairs(codes, sizes))


FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [24, 40],
    "modules_to_not_convert": ["lm_head"],
}
MODELOPT = {
    "quant_method": "modelopt",
    "quant_algo": "NVFP4",
    "ignore": ["lm_head"],
    "producer": {"name": "modelopt", "version": "0.39.0"},
}


def floats_config(
    form: str, bits: int, strategy: str, size: int | None, **more: object
) -> dict[str, object]:
    """compressed-tensors' settings of weights in floating point."""
    weights = {
        **{"num_bits": bits, "type": "float", "strategy": strategy, "group_size": size},
        **{"symmetric": True, **more},
    }
    inputs = {"num_bits": bits, "type": "float", "dynamic": True, "strategy": "token"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "version": "0.12.2",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


FLOAT_TENSOR = floats_config("float-quantized", 8, "tensor", None)
FLOAT_CHANNEL = floats_config("float-quantized", 8, "channel", None)
FLOAT_BLOCK = floats_config("float-quantized", 8, "block", None, block_structure=[24, 40])
NVFP4 = floats_config("nvfp4-pack-quantized", 4, "tensor_group", 16)
MXFP4 = floats_config("mxfp4-pack-quantized", 4, "group", 32)


GPT_OSS = {
    **{"vocab_size": 128, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    **{"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    **{"pad_token_id": 0, "eos_token_id": 2},
}
GPT_OSS_QUANTISATION = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
}


def save_gpt_oss(folder: Path) -> None:
    """A tiny random model with stacked experts, in bfloat16 as all of its kind."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", **GPT_OSS))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.05 * torch.randn_like(parameter))
    model.to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def as_mxfp4(source: Path, folder: Path) -> dict[str, Tensor]:
    """The model in `source` as gpt-oss is stored; its experts (E, i, o), as plain code reads them."""
    folder.mkdir()
    tensors, meant = {}, {}
    for key, tensor in load_file(source / "model.safetensors").items():
        if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[key] = tensor
            continue
        parts = [mxfp4(expert.float().T) for expert in tensor]
        blocks = torch.stack([pairs(codes) for codes, _, _ in parts])
        tensors[f"{key}_blocks"] = blocks.unflatten(-1, (-1, 16))
        tensors[f"{key}_scales"] = torch.stack([powers for _, _, powers in parts])
        meant[key] = torch.stack([meant_by_pairs(codes, sizes).T for codes, sizes, _ in parts])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
    change_config(folder, quantization_config=GPT_OSS_QUANTISATION)
    return meant
