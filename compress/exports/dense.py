"""An ordinary checkpoint: every layer is the dense weight that its form stands for."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from calibration.heads import Head
from compress.bases import format_in
from compress.callbacks import Progress
from compress.exports.base import CorrectionStorage, LayerExport, Planned, Traits, Use
from compress.exports.card import CardFacts, load_with_transformers, vllm, whole_size
from compress.exports.checkpoint import (
    LOADING_READS,
    CheckpointExporter,
    main_dtype,
)
from compress.exports.contents import Contents
from compress.exports.reading import load_bare
from compress.exports.storage import Outside
from compress.families.base import Compressor
from compress.models.checkpoint import Reader, write_json


class DenseExporter(CheckpointExporter, name="dense"):
    """Loads wherever the source does, and is as large; weights are rounded to the source's dtype."""

    traits = Traits(
        uses=frozenset({Use.MODEL}),
        heads=frozenset(Head),
        corrections=CorrectionStorage.MERGED,
        needs_base=False,
        own_folder=False,
        adapter=None,
        ordinary=True,
        loading_reads=LOADING_READS,
        library="transformers",
        relation="quantized",
        weights="dequantised to full precision",
        engines=("vllm", "openvino", "transformers"),
        outside=Outside.WHOLE,
    )

    @classmethod
    def problem(cls, compressor: Compressor, shape: tuple[int, int]) -> str:
        """A shifted mean has no place in most layers; every weight has."""
        del shape
        method: object = compressor
        while isinstance(method, Compressor):
            if method.shifts_outputs:
                return (
                    f"{method.name} puts the outputs' mean back, and most layers have no bias to hold that; choose "
                    "native, or --centre none"
                )
            method = getattr(method, "base", None)
        return ""

    @classmethod
    def experts_text(cls) -> str:
        """As before."""
        return "dense weights as the source stores them, stacks included: whatever loads the source loads it"

    @classmethod
    def planned_bytes(cls, plan: Planned) -> int:
        """Every weight in the source's dtype."""
        weights = sum(layer.shape[0] * layer.shape[1] for layer in plan.layers)
        return weights * plan.dtype.itemsize + plan.rest_bytes(cls.name)

    def _write_layer(self, layer: LayerExport) -> None:
        self._write_dense(layer)

    def _write_config(self) -> None:
        write_json(self.folder / "config.json", self.base_config())

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        """Whether no base format but that of ordinary weights recognises it."""
        return format_in(folder) == "plain"

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype | None, device: torch.device) -> PreTrainedModel:
        """As transformers loads it."""
        return load_bare(folder, dtype, device)

    @classmethod
    def weights_dtype(cls, folder: Path) -> torch.dtype | None:
        """The dtype of most weights."""
        return main_dtype(Reader(folder))

    @classmethod
    def contents(cls, folder: Path, progress: Progress) -> Contents | None:
        """None: they are ordinary weights."""
        del folder, progress
        return None

    @classmethod
    def introduction(cls, card: CardFacts) -> str:
        """That the weights are those of the compressed layers, and save nothing."""
        return (
            f"The weights of {card.layers} are those of their compressed forms, {card.forms}, dequantised to full "
            f"precision: it answers as the compressed model does and is not smaller. {whole_size(card)} Nothing was "
            "trained."
        )

    @classmethod
    def how_to_load(cls, card: CardFacts) -> str:
        """With transformers, as the original."""
        return (
            "As ordinary dense weights in full precision, which every tool reads; not smaller than the original:\n\n"
            f"{load_with_transformers(card)}"
        )

    @classmethod
    def how_to_serve(cls, card: CardFacts) -> str:
        """With vLLM."""
        return vllm(card)
