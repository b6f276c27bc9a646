"""gptqmodel, through transformers: GPTQ checkpoints of every kind, on any processor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.engines.base import Arithmetic, Export, n_experts
from compress.engines.transformers import Transformers


class GptqModel(Transformers, name="gptqmodel"):
    """Loads packed weights with `from_pretrained`, and PEFT for an adapter beside them."""

    module = "gptqmodel"
    requirements = ("torch", "gptqmodel>=7.7", "optimum>=2.1", "peft")

    @classmethod
    def modules(cls, export: Export) -> tuple[str, ...]:
        """It, optimum, which transformers calls it through, and PEFT for an adapter."""
        return (*super().modules(export), "optimum")

    @classmethod
    def request(cls, export: Export) -> dict[str, Any]:
        """The folder; a mixture is loaded by gptqmodel itself: transformers stacks experts and finds no packed ones."""
        loader = "gptqmodel" if n_experts(export.config) else "transformers"
        return super().request(export) | {"loader": loader}

    @classmethod
    def arithmetic(cls, export: Export, answer: Mapping[str, Any]) -> Arithmetic:
        """That of transformers, with codes expanded in the dtype of their scales."""
        of_others = super().arithmetic(export, answer)
        return Arithmetic(activations=of_others.activations, weights="float16")
