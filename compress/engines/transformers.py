"""transformers, without the toolkit: plain weights, what its own quantisers read, and the code shipped with native."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from compress.engines.base import PROGRAMS, Arithmetic, Engine, Export, Origin
from compress.exports.compressed_tensors.schemes import CONV1D
from compress.models.checkpoint import Reader
from compress.models.kinds import expert_of

PACKED = "compressed-tensors"
_PACKAGES = {"gptq": "gptqmodel", PACKED: "compressed_tensors"}
"""What its quantisers import, by quant_method."""


class Transformers(Engine, name="transformers"):
    """Loads with `from_pretrained`, and PEFT for an adapter beside the checkpoint."""

    module = "transformers"
    requirements: ClassVar[tuple[str, ...]] = (
        "torch",
        "transformers>=5.20,<6",
        "accelerate",
        "peft",
        "compressed-tensors",
    )
    program = PROGRAMS / "with_transformers.py"

    @classmethod
    def problem(cls, export: Export) -> str:
        """It runs no code that it finds in a folder, but that which this program has just put there."""
        if "auto_map" in export.config and export.origin is Origin.ANYBODY:
            return "it would run the code in the folder"
        return _unread(export) if _method(export) == PACKED else ""

    @classmethod
    def modules(cls, export: Export) -> tuple[str, ...]:
        """transformers, the package of the checkpoint's quantisation, and PEFT for an adapter."""
        method = _method(export)
        packages = [_PACKAGES[method]] if method in _PACKAGES else []
        return ("transformers", *packages, *(["peft"] if export.adapter else []))

    @classmethod
    def request(cls, export: Export) -> dict[str, Any]:
        """The folder, in the dtype that the probe was computed in."""
        return {
            "model": str(export.model),
            "adapter": None if export.adapter is None else str(export.adapter),
            "loader": "transformers",
            "dtype": export.dtype,
            "packages": sorted(cls.modules(export), key=lambda it: it != cls.module),
            "own_code": "auto_map" in export.config,
            "sees": "vision_config" in export.config,
            "expand": _is_expanded(export),
        }

    @classmethod
    def arithmetic(cls, export: Export, answer: Mapping[str, Any]) -> Arithmetic:
        """The dtype that it was asked for, or that of a kernel for packed weights; expanded ones have their scales'."""
        weights = "float16" if _is_expanded(export) else "float32"
        return Arithmetic(activations=answer["dtype"], weights=weights)


def _method(export: Export) -> str:
    return str((export.config.get("quantization_config") or {}).get("quant_method"))


def _zero_points(export: Export) -> list[bool]:
    """For each grid of a compressed-tensors checkpoint, whether it has zero points."""
    groups = export.config["quantization_config"]["config_groups"].values()
    return [not group["weights"].get("symmetric", True) for group in groups]


def _is_expanded(export: Export) -> bool:
    """Whether codes have to be expanded before there are layers: for zero points and adapters (transformers 5.23)."""
    if _method(export) != PACKED:
        return False
    return export.adapter is not None or any(_zero_points(export))


def _unread(export: Export) -> str:
    """What transformers 5.23 does not load of a compressed-tensors checkpoint; empty if it loads all."""
    if export.config.get("model_type") in CONV1D:
        return "in compressed-tensors it loads no Conv1D"
    parts = {name.rpartition(".")[2] for name in Reader(export.model) if expert_of(name)}
    if "weight" in parts:
        return "it loads no compressed-tensors checkpoint whose experts are not quantised"
    if "weight_zero_point" in parts:
        return "it loads no experts with zero points"
    if len(_zero_points(export)) > 1 and _is_expanded(export):
        return "it loads no zero points, and takes no adapter, where layers have several grids"
    return ""
