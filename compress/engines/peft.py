"""PEFT on transformers: adapters of a base that transformers loads."""

from __future__ import annotations

from compress.bases import open_base
from compress.engines.base import Export
from compress.engines.transformers import Transformers
from compress.exports.peft import corrections_in
from compress.models.kinds import has_experts


class Peft(Transformers, name="peft"):
    """Loads the base as its format asks, and the adapter on it."""

    module = "peft"

    @classmethod
    def problem(cls, export: Export) -> str:
        """Bases whose layers it does not know, and layers of single experts, which transformers stacks."""
        loading = open_base(export.model).loading
        if not loading.peft or loading.imports:
            return "it puts no adapter on the layers of the base"
        if export.adapter is not None and has_experts(
            layer.name for layer in corrections_in(export.adapter)
        ):
            return "it finds no layers of single experts"
        return super().problem(export)
