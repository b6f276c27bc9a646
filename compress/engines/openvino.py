"""OpenVINO on processors: plain weights, and compressed-tensors in 4 bits by groups, which stay packed in its graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.engines.base import PROGRAMS, Arithmetic, Engine, Export, n_experts

METHOD = "compressed-tensors"


class OpenVino(Engine, name="openvino"):
    """Converts the model that transformers makes of the folder, and computes in float32."""

    module = "openvino"
    requirements = (
        *("torch", "openvino==2026.4.1", "openvino-genai==2026.4.1", "nncf==3.4.0"),
        *("optimum-intel==2.2.0", "compressed-tensors>=0.18"),
    )
    program = PROGRAMS / "with_openvino.py"

    @classmethod
    def problem(cls, export: Export) -> str:
        """Of packed weights it takes layers of no expert, in 4 bits by groups; adapters in no dialect of PEFT."""
        if export.adapter is not None:
            return "it reads no PEFT adapter beside weights"
        settings = export.config.get("quantization_config")
        if settings is None:
            return ""
        if n_experts(export.config):
            return "the transformers that optimum-intel takes loads no packed experts"
        if settings.get("quant_method") != METHOD:
            return f"it reads no {settings.get('quant_method')}"
        weights = [group["weights"] for group in settings["config_groups"].values()]
        if any(it["num_bits"] != 4 or it["strategy"] != "group" for it in weights):
            return "of packed weights it reads 4 bits by groups alone"
        return ""

    @classmethod
    def modules(cls, export: Export) -> tuple[str, ...]:
        """It, and what loads plain weights into it, or packed ones."""
        packed = "quantization_config" in export.config
        loader = "optimum" if n_experts(export.config) else "transformers"
        return ("openvino", loader, *(("compressed_tensors",) if packed else ()))

    @classmethod
    def request(cls, export: Export) -> dict[str, Any]:
        """The folder."""
        return {
            "model": str(export.model),
            "packed": "quantization_config" in export.config,
            "mixture": n_experts(export.config) > 0,
        }

    @classmethod
    def arithmetic(cls, export: Export, answer: Mapping[str, Any]) -> Arithmetic:
        """Products in float32, as its program asks for."""
        del export, answer
        return Arithmetic(activations="float32")
