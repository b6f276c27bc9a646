"""transformers, without the toolkit: plain weights, what its own quantisers read, and the code shipped with native."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from compress.engines.base import PROGRAMS, Arithmetic, Engine, Export, Origin

_PACKAGES = {"gptq": "gptqmodel", "compressed-tensors": "compressed_tensors"}
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
        return ""

    @classmethod
    def modules(cls, export: Export) -> tuple[str, ...]:
        """transformers, the package of the checkpoint's quantisation, and PEFT for an adapter."""
        method = str((export.config.get("quantization_config") or {}).get("quant_method"))
        packages = [_PACKAGES[method]] if method in _PACKAGES else []
        return ("transformers", *packages, *(["peft"] if export.adapter else []))

    @classmethod
    def request(cls, export: Export) -> dict[str, Any]:
        """The folder, in the dtype that the probe was computed in."""
        return {
            "model": str(export.model),
            "adapter": None if export.adapter is None else str(export.adapter),
            "dtype": export.dtype,
            "packages": sorted(cls.modules(export), key=lambda it: it != cls.module),
            "own_code": "auto_map" in export.config,
            "sees": "vision_config" in export.config,
        }

    @classmethod
    def arithmetic(cls, export: Export, answer: Mapping[str, Any]) -> Arithmetic:
        """The dtype that it was asked for, or that of a kernel for packed weights."""
        del export
        return Arithmetic(activations=answer["dtype"])
