"""An export format: ordinary weights in float16, whatever the source's dtype."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from calibration.heads import Head
from compress.callbacks import Progress
from compress.exports.base import CorrectionStorage, LayerExport, Planned, Traits, Use
from compress.exports.card import CardFacts, whole_size
from compress.exports.checkpoint import LOADING_READS, CheckpointExporter
from compress.exports.contents import Contents, StoredTensor, dtype_name
from compress.exports.reading import load_bare
from compress.exports.storage import Outside
from compress.families.base import Compressor
from compress.models.checkpoint import Reader, read_json, write_json

KEY = "half_export"


class HalfExporter(CheckpointExporter, name="half"):
    """Every floating tensor in float16."""

    traits = Traits(
        uses=frozenset({Use.MODEL}),
        heads=frozenset({Head.NEXT_TOKEN}),
        corrections=CorrectionStorage.MERGED,
        needs_base=False,
        own_folder=False,
        adapter=None,
        ordinary=False,
        loading_reads=LOADING_READS,
        library="transformers",
        relation="quantized",
        weights="halved",
        engines=("transformers",),
        outside=Outside.WHOLE,
    )

    @classmethod
    def problem(cls, compressor: Compressor, shape: tuple[int, int]) -> str:
        """It holds weights alone, no offsets of outputs."""
        del shape
        return f"{compressor.name} shifts the outputs" if compressor.shifts_outputs else ""

    @classmethod
    def planned_bytes(cls, plan: Planned) -> int:
        """Two bytes a weight."""
        layers = sum(2 * layer.shape[0] * layer.shape[1] for layer in plan.layers)
        return layers + sum(
            2 * torch.Size(tensor.shape).numel() for tensor in plan.kept_in(cls.name)
        )

    @property
    def rounded(self) -> torch.dtype:
        """The dtype of everything."""
        return torch.float16

    def _write_layer(self, layer: LayerExport) -> None:
        weight = layer.form.dense()
        stored = (weight.T if layer.transposed else weight).contiguous()
        self.writer.add(f"{layer.name}.weight", stored.half())
        if layer.bias is not None:
            self.writer.add(f"{layer.name}.bias", layer.bias.half())

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        """Half of the bytes of the source's."""
        super().add_tensor(name, tensor.half())

    def _write_config(self) -> None:
        write_json(self.folder / "config.json", self.base_config() | {KEY: True})

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        """Whether config.json has the format's own key."""
        path = folder / "config.json"
        return path.is_file() and bool(read_json(path).get(KEY))

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype | None, device: torch.device) -> PreTrainedModel:
        """As transformers loads it."""
        return load_bare(folder, dtype, device)

    @classmethod
    def contents(cls, folder: Path, progress: Progress) -> Contents | None:
        """Matrices are layers, vectors are not."""
        del progress
        reader = Reader(folder)
        found = [
            StoredTensor(
                name=name,
                shape=tuple(reader.shape(name)),
                stored=dtype_name(reader.dtype(name)),
                n_bytes=reader.nbytes(name),
            )
            for name in reader
        ]
        return Contents(
            format="half",
            producer="half-export",
            layers=tuple(tensor for tensor in found if len(tensor.shape) > 1),
            others=tuple(tensor for tensor in found if len(tensor.shape) < 2),
        )

    @classmethod
    def introduction(cls, card: CardFacts) -> str:
        """What was halved."""
        return f"The weights of {card.layers} are halved after compression. {whole_size(card)}"

    @classmethod
    def how_to_load(cls, card: CardFacts) -> str:
        """With transformers."""
        return f'As half weights: `{card.auto_class}.from_pretrained("{card.folder}")`.'

    @classmethod
    def how_to_serve(cls, card: CardFacts) -> str:
        """Nobody has tried."""
        del card
        return "Nobody has tried to serve half weights."
