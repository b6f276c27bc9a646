"""The toolkit's own checkpoint: forms as they are, and the code that reads them.

Loads with `AutoModelForCausalLM.from_pretrained` after `import compress`, or without the toolkit
with `trust_remote_code=True`; otherwise it fails. Two entries of config.json see to that where a
reader ignores `model_type`: a vocabulary size that no config accepts, and a quantisation without a
method, which transformers refuses for every model class.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel

from calibration.heads import Head
from compress.bases import CheckpointFolder, format_in
from compress.callbacks import Progress
from compress.errors import CheckpointError
from compress.exports import alone
from compress.exports.base import CorrectionStorage, LayerExport, Planned, Traits, Use
from compress.exports.card import CardFacts, packed_introduction
from compress.exports.checkpoint import LOADING_READS, CheckpointExporter
from compress.exports.contents import Contents, StoredTensor, other_tensors
from compress.exports.reading import load_bare
from compress.exports.shipping import shipped
from compress.exports.storage import Outside
from compress.families.base import Compressor
from compress.forms.base import Form
from compress.forms.build import empty
from compress.forms.loading import FORMAT, FORMAT_VERSION, owner_of
from compress.models.checkpoint import Reader, read_json, write_json

REFUSAL = (
    "this is a compressed checkpoint: load it with AutoModelForCausalLM.from_pretrained after "
    "`import compress`, or with trust_remote_code=True"
)


class NativeExporter(CheckpointExporter, name="native"):
    """Holds every form there is, in as many bytes as it says."""

    traits = Traits(
        uses=frozenset(Use),
        heads=frozenset(Head),
        corrections=CorrectionStorage.CODES,
        needs_base=False,
        own_folder=False,
        adapter=None,
        ordinary=False,
        loading_reads=LOADING_READS,
        library="transformers",
        relation="quantized",
        weights="packed",
        engines=("transformers",),
        outside=Outside.CODES,
    )

    @classmethod
    def problem(cls, compressor: Compressor, shape: tuple[int, int]) -> str:
        """It holds every form."""
        del compressor, shape
        return ""

    @classmethod
    def experts_text(cls) -> str:
        """Packed, and run so."""
        return (
            "packed, each expert a module of layers, and run so in transformers; no server reads it"
        )

    @classmethod
    def planned_bytes(cls, plan: Planned) -> int:
        """The forms as they are."""
        return sum(layer.native_bytes for layer in plan.layers) + plan.rest_bytes(cls.name)

    def _begin(self) -> None:
        self._layers: dict[str, dict[str, Any]] = {}
        self._kinds: set[type[Form]] = set()

    def _write_layer(self, layer: LayerExport) -> None:
        kinds = {type(part) for part in layer.form.parts()} - self._kinds
        if kinds:
            shipped(kinds)  # refused at its first layer, not after the last
            self._kinds |= kinds
        self._layers[layer.name] = {
            "shape": list(layer.form.shape),
            "bias": layer.bias is not None,
            "form": layer.form.spec(),
        }
        for key, tensor in layer.form.state_dict().items():
            self.writer.add(f"{layer.name}.form.{key}", tensor)
        if layer.bias is not None:
            self.writer.add(f"{layer.name}.bias", layer.bias)

    def _write_config(self) -> None:
        base = self.base_config()
        base.pop("auto_map", None)
        head = self._layers.get("lm_head")
        if head is not None and not owner_of(head["form"]):
            base["tie_word_embeddings"] = False  # it has a form of its own
        files = shipped(self._kinds)
        for name, text in files.items():
            (self.folder / name).write_text(text, encoding="utf-8")
        config = {
            "model_type": FORMAT,
            "format_version": FORMAT_VERSION,
            "auto_map": {"AutoConfig": "loading.CompressedConfig"},
            "vocab_size": REFUSAL,
            "quantization_config": {"error": REFUSAL},
            # Not within base_config: a config class looks for its model_type in nested objects too.
            "base_model_type": base.pop("model_type"),
            "base_config": base,
            "code": sorted(files),
            "layers": self._layers,
        }
        write_json(self.folder / "config.json", config)

    @classmethod
    def verify_alone(cls, folder: Path) -> None:
        """Run the shipped code in a fresh process that cannot import the toolkit: it must build every form.

        Raises CheckpointError with that process's error, which names a file that is missing.
        """
        with TemporaryDirectory() as scratch:
            child = subprocess.run(
                [sys.executable, "-P", alone.__file__, str(folder.resolve())],
                # A cache of its own: copies of the code of unfinished folders are of use to nobody.
                env=os.environ | {"HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1"},
                cwd=scratch,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            )
        if child.returncode != 0:
            last = "\n".join(child.stderr.strip().splitlines()[-3:])
            raise CheckpointError(
                f"{folder}: without the toolkit its code does not build its forms:\n{last}"
            )

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        """Whether config.json has the format's model type."""
        return format_in(folder) == "native"

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype | None, device: torch.device) -> PreTrainedModel:
        """As transformers loads it, which knows the format by now."""
        return load_bare(folder, dtype, device)

    @classmethod
    def contents(cls, folder: Path, progress: Progress) -> Contents | None:
        """The forms of the table in config.json."""
        del progress
        reader = CheckpointFolder(folder).reader
        layers, taken = _stored_layers(reader, read_json(folder / "config.json"))
        return Contents(
            format="native",
            producer="compress-llm",
            layers=tuple(layers),
            others=other_tensors(reader, taken),
        )

    @classmethod
    def introduction(cls, card: CardFacts) -> str:
        """Forms, bits and size."""
        return packed_introduction(card)

    @classmethod
    def how_to_load(cls, card: CardFacts) -> str:
        """With the toolkit, or by the code beside the weights."""
        return f"""\
As a native checkpoint of compress-llm, with the toolkit installed:

```python
import compress  # registers the format
from transformers import {card.auto_class}, AutoTokenizer

model = {card.auto_class}.from_pretrained("{card.source}")
tokenizer = AutoTokenizer.from_pretrained("{card.source}")
```

Weights stay packed and are dequantised in every matmul. `compress.load_unpacked("{card.folder}")` dequantises them \
once: faster, in as much memory as dense weights or factors take.

Without the toolkit, `from_pretrained("{card.source}", trust_remote_code=True)` runs the code beside the weights."""

    @classmethod
    def how_to_serve(cls, card: CardFacts) -> str:
        """By no server."""
        del card
        return "vLLM and other servers do not read this format: the model runs in transformers."


def _stored_layers(
    reader: Reader, config: Mapping[str, Any]
) -> tuple[list[StoredTensor], set[str]]:
    """The layers of the table in config.json; and the names of the tensors that belong to them."""
    table = config.get("layers")
    if not isinstance(table, Mapping):
        raise CheckpointError(
            f"{reader.folder}: config.json lacks layers; download the checkpoint again"
        )
    layers, taken = [], set()
    for name, entry in table.items():
        o, i = entry["shape"]
        try:
            form = empty(entry["form"], (o, i), torch.float32, "meta")
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{reader.folder}: {name} has a form that cannot be read: {error}"
            ) from error
        keys = [f"{name}.form.{key}" for key in form.state_dict()]
        absent = [key for key in keys if key not in reader]
        if absent:
            raise CheckpointError(f"{reader.folder}: {absent[0]} is missing; download it again")
        taken.update(keys)
        n_bytes = sum(map(reader.nbytes, keys))
        layers.append(
            StoredTensor(name=name, shape=form.shape, stored=form.describe(), n_bytes=n_bytes)
        )
    return layers, taken
