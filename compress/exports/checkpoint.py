"""Common to formats that are a folder of safetensors: the rest of the source, and the proof that nothing was lost."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.bases import AsDense, open_original
from compress.errors import CheckpointError
from compress.exports.base import Exporter, LayerExport
from compress.exports.peft import STEM
from compress.exports.stacks import Stacks
from compress.forms.dense import Dense
from compress.models.checkpoint import Reader, Tensors, Writer, read_json, some
from compress.models.companions import READ, copy_companions
from compress.models.model_config import QUANTISATION
from eval.footprint import Stored, bytes_on_disk, tensor_bytes

if TYPE_CHECKING:
    from compress.models.resolve import SourceModel

LOADING_READS = ("*.py", "*.json", *READ)
"""Files that transformers reads to load a folder, weights apart."""
ADAPTER = "adapter"
"""The folder of an adapter that lies beside its checkpoint."""


class CheckpointExporter(Exporter):
    """A folder that transformers loads: config.json, the source's other tensors, tokenizer and licence."""

    def __init__(
        self,
        folder: Path,
        source: SourceModel,
        base_reference: str | None = None,
        base: AsDense | None = None,
        base_revision: str | None = None,
    ) -> None:
        self.folder, self.source, self.base_reference = Path(folder), source, base_reference
        self.base_revision = base_revision
        self.reader = open_original(source.folder) if base is None else base
        self.config = _config_of(self.reader)
        self.dtype = main_dtype(self.reader)
        self.writer = Writer(self.folder)
        self._replaced: set[str] = set()
        self._copied: dict[str, tuple[int, ...]] = {}
        self._stacks = Stacks()
        self._dense: dict[str, tuple[int, int]] = {}
        self._begin()

    def _begin(self) -> None:
        """Make room for what a format notes of its layers."""

    def add_layer(self, layer: LayerExport) -> None:
        """Write a finished layer. Raises CheckpointError for what the format cannot hold."""
        if layer.slices:
            self._replaced |= {name for one in layer.slices if (name := self._stacks.noted(one))}
        elif layer.in_source:
            self._replaced.add(f"{layer.stored_name}.weight")
        if layer.bias is not None and not layer.slices:
            self._replaced.add(f"{layer.stored_name}.bias")
        self._write_layer(layer)

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of the source that no layer replaces, as it is."""
        self._copied[name] = tuple(tensor.shape)
        self.writer.add(name, tensor)

    def leave_out(self, name: str) -> None:
        """Note a tensor of the source that is not written, for it is equal to another that the model ties it to."""
        self._replaced.add(name)

    def close(self) -> None:
        """Write what goes with the weights, and give everything its final name.

        Raises CheckpointError if a tensor of the source is neither copied nor replaced, or if there is none.
        """
        self._refuse_lost()
        if not self.writer.names:
            raise CheckpointError(f"{self.name} export: no tensor to write")
        copy_companions(self.source.folder, self.folder)
        self._write_config()
        self.writer.close()

    @abstractmethod
    def _write_layer(self, layer: LayerExport) -> None: ...

    @abstractmethod
    def _write_config(self) -> None: ...

    def _write_dense(self, layer: LayerExport) -> None:
        """Write the weight that a layer's form stands for, in the source's dtype and place, and note its shape."""
        weight = layer.form.dense().contiguous()
        stored = (weight.T if layer.transposed else weight).to(self.dtype).contiguous()
        if not bool(torch.isfinite(stored).all()):
            largest = float(weight.abs().max())
            raise CheckpointError(
                f"{layer.name}: a weight of {largest:.3g} does not fit the source's {self.dtype}; "
                "choose the native export"
            )
        self._dense[layer.stored_name] = layer.form.shape
        values = (stored,) if layer.bias is None else (stored, layer.bias)
        if layer.slices:
            for one, value in zip(layer.slices, values, strict=True):
                if whole := self._stacks.put(one, value):
                    self.writer.add(*whole)
            return
        for leaf, value in zip(("weight", "bias"), values, strict=False):
            self.writer.add(f"{layer.stored_name}.{leaf}", value)

    def _copy_expert(self, layer: LayerExport) -> None:
        """Write the weight of an expert that stays as it was beside others, and its bias."""
        assert isinstance(layer.form, Dense)
        values = {"weight": layer.form.weight.detach(), "bias": layer.bias}
        for leaf, value in values.items():
            if value is not None:
                self._copied[f"{layer.stored_name}.{leaf}"] = tuple(value.shape)
                self.writer.add(f"{layer.stored_name}.{leaf}", value)

    def base_config(self) -> dict[str, Any]:
        """The source's config.json, with the dtype that it may leave to the weights, and without a tie that is none."""
        config = {key: value for key, value in self.config.items() if key != "torch_dtype"}
        dtype = config.get("dtype") or self.config.get("torch_dtype")
        if self.source.has_own_head:
            config |= {"tie_word_embeddings": False}
            text = config.get("text_config")
            if isinstance(text, dict) and "tie_word_embeddings" in text:
                config["text_config"] = text | {"tie_word_embeddings": False}
        return config | {"dtype": dtype or str(self.dtype).removeprefix("torch.")}

    def _refuse_lost(self) -> None:
        """Compare numbers, because a source may name its tensors otherwise than the model."""
        written = self._replaced | set(self._copied)
        if len(written) == len(self.reader):
            return
        lost = [name for name in self.reader if not _known(name, written)]
        odd = [name for name in written if not _known(name, set(self.reader))]
        raise CheckpointError(
            f"{self.name} export: {len(self.reader)} tensors in {self.source.folder}, and "
            f"{len(written)} copied or replaced"
            + (f"; lost: {some(lost)}" if lost else "")
            + (f"; not from there: {some(odd)}" if odd else "")
        )

    @classmethod
    def base_of(cls, folder: Path) -> Path | None:
        """The checkpoint is whole."""
        del folder
        return None

    @classmethod
    def tensors(cls, folder: Path) -> Iterator[tuple[str, Tensor]]:
        """Those of the shards, then those of an adapter beside them by its folder's name."""
        yield from Reader(folder).items()
        if (folder / ADAPTER).is_dir():
            for name, tensor in Reader(folder / ADAPTER, STEM).items():
                yield f"{ADAPTER}/{name}", tensor

    @classmethod
    def stored(cls, folder: Path) -> Stored:
        """Bytes of the folder, an adapter beside the checkpoint included."""
        return Stored(bytes_on_disk(folder), tensor_bytes(folder))


def _known(name: str, names: set[str]) -> bool:
    """Whether the name is among others, up to a prefix such as GPT-2's `transformer.`."""
    return name in names or any(
        other.endswith(f".{name}") or name.endswith(f".{other}") for other in names
    )


def _config_of(reader: Tensors | AsDense) -> dict[str, Any]:
    """The config.json of ordinary weights."""
    if isinstance(reader, Tensors):
        config = read_json(reader.folder / "config.json")
        return {key: value for key, value in config.items() if key not in QUANTISATION}
    return reader.base.config


def main_dtype(reader: Tensors | AsDense) -> torch.dtype:
    """The floating dtype that holds most of a checkpoint's bytes; float32 if none does."""
    sizes: Counter[torch.dtype] = Counter()
    for name in reader:
        if reader.dtype(name).is_floating_point:
            sizes[reader.dtype(name)] += reader.nbytes(name)
    return sizes.most_common(1)[0][0] if sizes else torch.float32
