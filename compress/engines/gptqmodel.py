"""gptqmodel, through transformers: GPTQ checkpoints of every kind, on any processor."""

from __future__ import annotations

from compress.engines.base import Export
from compress.engines.transformers import Transformers


class GptqModel(Transformers, name="gptqmodel"):
    """Loads packed weights with `from_pretrained`, and PEFT for an adapter beside them."""

    module = "gptqmodel"
    requirements = ("torch", "gptqmodel>=7.7", "optimum>=2.1", "peft")

    @classmethod
    def modules(cls, export: Export) -> tuple[str, ...]:
        """It, optimum, which transformers calls it through, and PEFT for an adapter."""
        return (*super().modules(export), "optimum")
