"""Loads any of our exports, and GPTQ checkpoints of other tools, into a transformers model.

GPTQ is read without gptqmodel: every layer becomes the form that its tensors describe, an
`adapter/` beside them its low-rank repair.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from calibration.heads import AUTO_CLASSES, Head, head_of
from compress import loading
from compress.checkpoint import Reader, read_json, some
from compress.errors import CheckpointError
from compress.exports.adapter import read_adapter
from compress.exports.gptq import ADAPTER
from compress.forms import CompressedLinear, Form, Quantised, Sum
from compress.packing import pack
from compress.packing import unpack as unpack_codes

Device = torch.device | str
_TENSORS = ("qweight", "qzeros", "scales", "g_idx")


def loader_name(folder: Path) -> str:
    """What loads this export: "native", "gptq" or "dense".

    Raises CheckpointError for a quantisation that is none of ours.
    """
    config = read_json(Path(folder) / "config.json")
    if config.get("model_type") == loading.FORMAT:
        return "native"
    method = (config.get("quantization_config") or {"quant_method": "dense"}).get("quant_method")
    if method not in ("dense", "gptq"):
        raise CheckpointError(f"{folder}: quant_method {method!r} is not read; gptq is")
    return str(method)


def load_export(
    folder: Path, dtype: torch.dtype | None = None, device: Device = "cpu"
) -> PreTrainedModel:
    """The model of an export in eval mode; `dtype` None is the one that its config names.

    Raises CheckpointError for a checkpoint that is incomplete or does not fit its config.
    """
    folder = Path(folder)
    load = _load_gptq if loader_name(folder) == "gptq" else _load_plain
    reader = Reader(folder)
    try:
        model: Any = load(folder, reader, dtype or "auto")
    except (ValueError, RuntimeError, OSError) as error:
        raise CheckpointError(f"{folder} does not load: {error}") from error
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


def load_unpacked(
    folder: Path, dtype: torch.dtype | None = None, device: Device = "cpu"
) -> PreTrainedModel:
    """The same with its codes expanded."""
    model = load_export(folder, dtype, device)
    unpack(model)
    return model


def unpack(model: PreTrainedModel) -> None:
    """Expand the codes of every compressed layer: the same outputs, faster, and as large as dense."""
    for module in model.modules():
        if isinstance(module, CompressedLinear):
            module.form = module.form.unpacked(model.dtype)


def _load_plain(folder: Path, _: Reader, dtype: torch.dtype | str) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    found: Any = AUTO_CLASSES[head_of(config) or Head.NEXT_TOKEN].from_pretrained(
        folder, output_loading_info=True, local_files_only=True, dtype=dtype
    )
    _refuse_differences(found[1])
    model: PreTrainedModel = found[0]
    return model


def _refuse_differences(info: Mapping[str, Any]) -> None:
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        found = [str(key) for key in info.get(what, ())]
        if found:
            raise CheckpointError(f"{what.replace('_', ' ')}: {some(found)}")


def _load_gptq(folder: Path, reader: Reader, dtype: torch.dtype | str) -> PreTrainedModel:
    """Turn the tensors into those of the native format, and load them as such."""
    layers = read_gptq(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    dropped = {f"{name}.{key}" for name in layers for key in _TENSORS}
    state = {name: reader[name] for name in reader if name not in dropped}
    table = {}
    for name, form in layers.items():
        bias = f"{name}.bias" in state
        table[name] = {"shape": form.shape, "bias": bias, "form": form.spec()}
        state |= {f"{name}.form.{key}": value for key, value in form.state_dict().items()}
    loading.register_quantizer()
    config.quantization_config = loading.CompressedQuantizationConfig(table)
    config.name_or_path = str(folder)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model: PreTrainedModel = model_class.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype
    )
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


def read_gptq(folder: Path) -> dict[str, Form]:
    """The form of every quantised layer of a GPTQ checkpoint, with the repair of its adapter.

    Raises CheckpointError for a format that is not read and for tensors that contradict it.
    """
    folder = Path(folder)
    config, reader = read_json(folder / "config.json")["quantization_config"], Reader(folder)
    names = [key.removesuffix(".qweight") for key in reader if key.endswith(".qweight")]
    if not names:
        raise CheckpointError(f"{folder}: its config.json says gptq, and no tensor is quantised")
    repairs = read_adapter(folder / ADAPTER) if (folder / ADAPTER).is_dir() else {}
    odd = sorted(set(repairs) - set(names))
    if odd:
        raise CheckpointError(f"{folder}: the adapter has factors for {some(odd)}, not quantised")
    forms: dict[str, Form] = {}
    for name in names:
        base = read_gptq_layer(reader, name, GptqSettings.for_layer(config, name))
        forms[name] = Sum([base, repairs[name]]) if name in repairs else base
    return forms


@dataclass(frozen=True)
class GptqSettings:
    """What a layer's configuration says that its tensors do not."""

    bits: int
    group_size: int
    """-1: a whole row."""
    zero_offset: int
    """What is to be added to a stored zero: 1 in v1, 0 in v2."""
    in_order: bool
    """Whether g_idx may be absent."""

    @classmethod
    def for_layer(cls, config: Mapping[str, Any], name: str) -> GptqSettings:
        """From a quantization_config and its `dynamic` overrides. Raises CheckpointError."""
        settings = dict(config)
        for rule, override in (config.get("dynamic") or {}).items():
            if not rule.startswith("-:") and re.match(rule.removeprefix("+:"), name):
                settings |= override
        kind = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        offsets = {"gptq": 1, "gptq_v2": 0}
        if kind not in offsets:
            raise CheckpointError(f"checkpoint_format {kind!r} is not read; gptq and gptq_v2 are")
        in_order = not settings.get("desc_act", False)
        return cls(int(settings["bits"]), int(settings["group_size"]), offsets[kind], in_order)


def read_gptq_layer(reader: Mapping[str, Tensor], name: str, settings: GptqSettings) -> Quantised:
    """The form of one layer from its tensors. Raises CheckpointError if they do not fit together."""
    needed = _TENSORS[:3] if settings.in_order else _TENSORS
    absent = [key for key in needed if f"{name}.{key}" not in reader]
    if absent:
        raise CheckpointError(f"{name} has a qweight and no {some(absent)}")
    bits, qweight, scales = settings.bits, reader[f"{name}.qweight"], reader[f"{name}.scales"]
    o, i = qweight.shape[1], qweight.shape[0] * 32 // bits
    size = i if settings.group_size == -1 else settings.group_size
    g_idx = reader.get(f"{name}.g_idx")
    in_order = torch.arange(i) // size
    groups = in_order if g_idx is None else g_idx.to(torch.int64)
    n_groups = -(-i // size)
    expected = {"scales": (n_groups, o), "qzeros": (n_groups, o * bits // 32)}
    found = {key: tuple(reader[f"{name}.{key}"].shape) for key in expected}
    if found != expected or groups.shape != (i,) or not 0 <= int(groups.min()) <= int(groups.max()):
        raise CheckpointError(f"{name}: shapes {found} for {i} inputs; expected {expected}")
    if int(groups.max()) >= n_groups:
        raise CheckpointError(f"{name}: g_idx names group {int(groups.max())} of {n_groups}")
    zeros_og = unpack_codes(reader[f"{name}.qzeros"].T.contiguous(), bits, o)
    zeros_og = (zeros_og + settings.zero_offset) & ((1 << bits) - 1)
    symmetric = bool((zeros_og == 1 << (bits - 1)).all())
    tensors = {"qweight": qweight, "scales": _exact_fp16(name, scales)}
    if not symmetric:
        tensors["qzeros"] = pack(zeros_og, bits).T.contiguous()
    if not torch.equal(groups, in_order):
        tensors["g_idx"] = groups.to(torch.int32)
    return Quantised((o, i), bits, size, tensors)


def _exact_fp16(name: str, scales: Tensor) -> Tensor:
    half = scales.to(torch.float16)
    if not torch.equal(half.to(scales.dtype), scales):
        raise CheckpointError(f"{name}: its {scales.dtype} scales are not exact in fp16")
    return half
