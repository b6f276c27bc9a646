"""The corrections of a base checkpoint alone, as a PEFT LoRA adapter: the base stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from calibration.heads import Head
from compress.callbacks import Progress
from compress.errors import CheckpointError
from compress.exports.base import (
    CorrectionStorage,
    LayerExport,
    MadeOf,
    Planned,
    Traits,
    Use,
)
from compress.exports.card import (
    CardBase,
    CardFacts,
    adapter_line,
    other_servers,
    unserved,
    vllm_lora,
    widened_note,
)
from compress.exports.checkpoint import CheckpointExporter
from compress.exports.contents import Contents
from compress.exports.peft import (
    CONFIG,
    STEM,
    AdapterWriter,
    corrections_in,
    find_base,
    read_adapter,
)
from compress.exports.reading import add_corrections, load_bare
from compress.exports.storage import Outside
from compress.families.base import Compressor
from compress.models.checkpoint import Reader
from eval.footprint import Stored, bytes_on_disk


class AdapterExporter(CheckpointExporter, name="adapter"):
    """Factors in 16 bits, by the names that PEFT gives them."""

    traits = Traits(
        uses=frozenset({Use.ON_BASE}),
        heads=frozenset({Head.NEXT_TOKEN, Head.IMAGE_TEXT}),
        corrections=CorrectionStorage.HALF,
        needs_base=True,
        own_folder=True,
        adapter=".",
        ordinary=False,
        loading_reads=("*.json",),
        library="peft",
        relation="adapter",
        weights="corrections, without the base",
        engines=("vllm", "peft"),
        outside=Outside.ABSENT,
    )

    def _begin(self) -> None:
        self._adapter = AdapterWriter(self.folder)
        self._bare: set[str] = set()

    @classmethod
    def problem(cls, compressor: Compressor, shape: tuple[int, int]) -> str:
        """It holds every correction; the runs that write it have nothing else."""
        del compressor, shape
        return ""

    @classmethod
    def experts_text(cls) -> str:
        """Factors for layers of single experts."""
        return (
            "factors for each expert's layers, for what keeps these apart; PEFT finds no such layers in classes of "
            "transformers that stack experts in one parameter"
        )

    @classmethod
    def planned_bytes(cls, plan: Planned) -> int:
        """Two factors of 16 bits a number for each corrected layer."""
        return sum(layer.adapter_bytes for layer in plan.layers)

    @property
    def rounded(self) -> torch.dtype | None:
        """The dtype of factors that were on grids."""
        return self._adapter.rounded

    def _write_layer(self, layer: LayerExport) -> None:
        if layer.correction is None and layer.padded_rank is None:
            self._bare.add(layer.name)
        else:
            self._adapter.add(layer, layer.correction)

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        """Nothing is copied; matrices are remembered, as the names of layers without a correction."""
        self._copied[name] = tuple(tensor.shape)
        if tensor.ndim > 1 and name.endswith(".weight"):
            self._bare.add(name.removesuffix(".weight"))

    def close(self) -> None:
        """Give the files their names. Raises CheckpointError if there is no correction, or a tensor was lost."""
        self._refuse_lost()
        if self._adapter.empty:
            raise CheckpointError(
                f"{self.name} export: no correction to write, for none lowered the error on the held-out sequences; "
                "use other text, or --holdout none"
            )
        self._write_config()

    def _write_config(self) -> None:
        self._adapter.close(self._bare, self.base_reference, self.base_revision)

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        """Whether there is a PEFT adapter and no model of its own."""
        return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype | None, device: torch.device) -> PreTrainedModel:
        """The base checkpoint's model with a correction added to each layer that the adapter has factors for."""
        model = load_bare(find_base(folder), dtype, device)
        add_corrections(model, read_adapter(folder), folder)
        return model

    @classmethod
    def base_of(cls, folder: Path) -> Path | None:
        """The checkpoint that the adapter's configuration names."""
        return find_base(folder)

    @classmethod
    def tensors(cls, folder: Path) -> Iterator[tuple[str, Tensor]]:
        """Two factors for each layer."""
        yield from Reader(folder, STEM).items()

    @classmethod
    def stored(cls, folder: Path) -> Stored:
        """Bytes of the folder and of the factors."""
        return Stored(bytes_on_disk(folder), Reader(folder, STEM).total_bytes)

    @classmethod
    def contents(cls, folder: Path, progress: Progress) -> Contents | None:
        """The correction of each layer; the layers are the base's."""
        del progress
        return Contents(
            format="adapter",
            producer=None,
            layers=(),
            others=(),
            corrections=corrections_in(folder),
        )

    @classmethod
    def repository_suffix(cls, made: MadeOf) -> str:
        """The method that made the corrections and their rank: "-EoRA-r64"."""
        return f"-{made.method}" if made.rank is None else f"-{made.method}-r{made.rank}"

    @classmethod
    def introduction(cls, card: CardFacts) -> str:
        """Sizes of the corrections alone and together with the base."""
        text = (
            f"This is a PEFT adapter that holds the corrections alone, {card.added_size}. With the base they take "
            f"{card.size}; the original takes {card.original_size}."
        )
        return "\n\n".join([text, *widened_note(card)])

    @classmethod
    def how_to_load(cls, card: CardFacts) -> str:
        """With PEFT, on the base as its format is loaded; with the toolkit where PEFT knows no such layers."""
        assert card.base is not None  # the runs that write it have one
        loading = card.base.loading
        if loading is not None and not loading.peft:
            return f"""\
PEFT puts no adapter on the layers of a {card.base.kind} checkpoint; the toolkit does, on `{card.base.name}`:

```python
import compress

model = compress.load_export("{card.folder}")
```"""
        revision = f', revision="{card.base.revision}"' if card.base.revision else ""
        further = {} if loading is None else loading.arguments
        arguments = revision + "".join(f", {name}={value}" for name, value in further.items())
        lines = [
            *(() if loading is None else loading.imports),
            "from peft import PeftModel",
            f"from transformers import {card.auto_class}",
            "",
            f'model = {card.auto_class}.from_pretrained("{card.base.name}"{arguments})',
            adapter_line(card),
        ]
        return "\n".join([_on_base(card.base), "", "```python", *lines, "```"])

    @classmethod
    def how_to_serve(cls, card: CardFacts) -> str:
        """As a LoRA on the base, where vLLM serves the base."""
        assert card.base is not None
        loading = card.base.loading
        if loading is not None and loading.vllm is None:
            return f"vLLM does not serve it: its base is in the {card.base.kind} format, which vLLM does not read."
        if card.base.unserved:
            return unserved(card.base.unserved, "its base")
        arguments = () if loading is None or loading.vllm is None else loading.vllm
        served = vllm_lora(card, card.base.name, card.base.revision, arguments)
        return f"{served}\n\n{other_servers(card)}" if card.rank is not None else served


def _on_base(base: CardBase) -> str:
    """What the adapter belongs to, and what loading that needs."""
    start = f"As a PEFT adapter of the checkpoint `{base.name}`"
    if base.loading is None:
        return f"{start}, which is loaded as the tool that wrote it wants:"
    if not base.loading.packages:
        return f"{start}:"
    return (
        f"{start}, which transformers loads with {' and '.join(base.loading.packages)} installed:"
    )
