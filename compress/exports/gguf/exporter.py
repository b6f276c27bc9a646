"""The GGUF export: our codes in ggml's blocks, and beside them the corrections as an adapter.

What is no codes stays in the dtype that it has, but for what llama.cpp reads in fp32 alone: vectors and routers.

Shapes: o = out_features, i = in_features.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from calibration.heads import Head
from compress.callbacks import Progress
from compress.errors import CheckpointError
from compress.exports.base import CorrectionStorage, LayerExport, MadeOf, Traits, Use
from compress.exports.card import CardFacts, packed_introduction, widened_note
from compress.exports.checkpoint import CheckpointExporter
from compress.exports.codes import quantised_part
from compress.exports.contents import Contents
from compress.exports.gguf import cards, planned, reading
from compress.exports.gguf.adapter import AdapterFile
from compress.exports.gguf.blocks import (
    BLOCK,
    Q8_0,
    Bytes,
    problem_of_groups,
    quantised_blocks,
    row_blocks,
    symmetric_type,
    type_of,
)
from compress.exports.gguf.families import context_of, problem_of_config
from compress.exports.gguf.file import FLOATS, GgufFile
from compress.exports.gguf.metadata import (
    Parameters,
    describe_source,
    file_name,
    write_description,
    write_sizes,
)
from compress.exports.gguf.names import Names, Place, is_float32
from compress.exports.gguf.rope import problem_of_rope, rope_tensors
from compress.exports.gguf.vocabulary import (
    problem_of_tokenizer,
    read_vocabulary,
    write_vocabulary,
)
from compress.exports.planned import Planned, VocabularyMatrix
from compress.exports.storage import Outside
from compress.families.base import Compressor
from compress.families.correction import Correction
from compress.forms.dense import Dense
from compress.forms.int8 import Int8
from compress.forms.tied import Tied
from compress.models.companions import LICENCES
from compress.models.model_config import read_config
from compress.models.resolve import SourceModel
from eval.footprint import Stored

if TYPE_CHECKING:
    from gguf import GGUFWriter

Part = tuple[str, Bytes]
"""A type and the bytes of one expert."""


class GgufExporter(CheckpointExporter, name="gguf"):
    """One file for llama.cpp, ollama and LM Studio, and `adapter.gguf` beside it where layers have corrections."""

    traits = Traits(
        uses=frozenset({Use.MODEL}),
        heads=frozenset({Head.NEXT_TOKEN}),
        corrections=CorrectionStorage.HALF,
        needs_base=False,
        own_folder=False,
        adapter=None,
        ordinary=False,
        loading_reads=("*.gguf",),
        library="gguf",
        relation="quantized",
        weights="packed in blocks of 32",
        engines=("llama.cpp",),
        outside=Outside.CODES,
    )

    def _begin(self) -> None:
        self._model_config = read_config(self.source.folder)
        self._names = Names(self._model_config)
        self._file = GgufFile(self.folder, self._names.family.architecture)
        self._adapter: AdapterFile | None = None
        self._experts: dict[str, dict[int, Part]] = {}
        self._rounded: torch.dtype | None = None

    @property
    def rounded(self) -> torch.dtype | None:
        """The dtype of layers that are stored in floats, or, in the adapter, of factors that were on grids."""
        of_adapter = None if self._adapter is None else self._adapter.rounded
        return self._rounded or of_adapter

    # Before a run

    @classmethod
    def problem(cls, compressor: Compressor, shape: tuple[int, int]) -> str:
        """It holds codes whose grid is that of a type of blocks."""
        del shape
        problem = planned.problem_of_method(compressor)
        return f"{problem}; choose native or dense" if problem else ""

    @classmethod
    def stores_dense(cls, compressor: Compressor, shape: tuple[int, int]) -> str:
        """Weights whose inputs or groups are not made of blocks."""
        return planned.dense_reason(compressor, shape)

    @classmethod
    def problem_of_model(
        cls,
        source: SourceModel,
        config: PretrainedConfig,
        compressors: Mapping[str, Compressor],
        shapes: Mapping[str, tuple[int, int]],
    ) -> str:
        """llama.cpp has code for each family, and rules for each tokenizer; what it has none for is refused."""
        own_head = source.has_own_head or not config.tie_word_embeddings
        return (
            problem_of_config(config, "lm_head" if own_head else "")
            or problem_of_rope(config)
            or problem_of_tokenizer(source.folder, config.vocab_size)
            or planned.problem_of_stacks(compressors, shapes, config)
        )

    @classmethod
    def problem_of_expert(cls, compressor: Compressor) -> str:
        """Factors of a stack would all have one rank."""
        if isinstance(compressor, Correction):
            return "a GGUF adapter stacks the factors of all experts, which must have one rank"
        return ""

    @classmethod
    def experts_text(cls) -> str:
        """As stacks."""
        return "in blocks, those of a layer stacked in one tensor, as llama.cpp reads them"

    @classmethod
    def planned_bytes(cls, plan: Planned) -> int:
        """Blocks, floats, and the factors in the adapter."""
        return planned.planned_bytes(plan, cls.name)

    @classmethod
    def warnings_of_model(cls, config: PretrainedConfig) -> tuple[str, ...]:
        """llama.cpp knows no windows in most families."""
        context = context_of(config)
        if context >= config.max_position_embeddings:
            return ()
        return (
            f"llama.cpp knows no window of attention in {config.model_type}: the file's context is the window, "
            f"{context} tokens and not {config.max_position_embeddings}, within which it computes the same",
        )

    @classmethod
    def problem_of_table(cls, table: VocabularyMatrix, bits: int) -> str:
        """It holds embeddings and heads whose rows are made of blocks, without corrections of their own."""
        if table.shape[1] % BLOCK:
            return f"blocks of {BLOCK} do not divide rows of {table.shape[1]}"
        if table.is_corrected(bits):
            return "its adapter holds no correction of embeddings or heads; take 8"
        return ""

    @classmethod
    def table_bytes(cls, table: VocabularyMatrix, bits: int) -> int:
        """Blocks of a symmetric grid."""
        return symmetric_type(bits).bytes_of(table.shape)

    # In a run

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of the source that no layer replaces, a stack of experts that are not compressed included."""
        self._copied[name] = tuple(tensor.shape)
        for place, part_of in self._names.tensor(name):
            value, order = part_of(tensor), self._names.rows(name)
            if order is not None:
                value = value[order]
            if value.dtype not in FLOATS or is_float32(place.name, value.ndim):
                value = value.float()
            self._put(place, FLOATS[value.dtype], _bytes_of(value))

    def _write_layer(self, layer: LayerExport) -> None:
        if isinstance(layer.form, Tied):
            return  # llama.cpp takes the embeddings for a head that is absent
        kind, data = self._stored(layer)
        order = self._names.rows(f"{layer.name}.weight")
        self._put(self._names.weight(layer.name), kind, data if order is None else data[order])
        if layer.bias is not None:
            ((place, _),) = self._names.tensor(f"{layer.name}.bias")
            bias = layer.bias.detach().float()
            self._put(place, "F32", _bytes_of(bias if order is None else bias[order]))

    def _stored(self, layer: LayerExport) -> Part:
        """The type and the bytes (o, bytes of an output) of a layer; its correction goes to the adapter."""
        if isinstance(layer.form, Int8):
            return Q8_0.name, row_blocks(layer.form)
        if isinstance(layer.form, Dense):
            weight = layer.form.weight.detach()
            return FLOATS[weight.dtype], _bytes_of(weight)
        base, correction = quantised_part(layer, self.name)
        if problem_of_groups(base.group_size, base.shape[1]):
            self._rounded = self.dtype
            weight = layer.form.dense().to(self.dtype)
            return FLOATS[self.dtype], _bytes_of(weight)
        kind = type_of(base)
        if kind is None or base.g_idx is not None:
            raise CheckpointError(
                f"gguf export: {layer.name} is {base.describe()}, which no type of blocks holds"
            )
        if correction is not None:
            if self._adapter is None:
                self._adapter = AdapterFile(self.folder, self._names)
            self._adapter.add(layer, correction)
        try:
            return kind.name, quantised_blocks(base, kind)
        except ValueError as error:
            raise CheckpointError(f"gguf export: {layer.name}: {error}") from error

    def _put(self, place: Place, kind: str, data: Bytes) -> None:
        """Write a tensor; an expert's waits for the others of its stack."""
        if place.expert is None:
            self._file.add(place.name, kind, data)
            return
        stack = self._experts.setdefault(place.name, {})
        stack[place.expert] = kind, data
        if len(stack) < self._names.n_experts:
            return
        kinds = {kind for kind, _ in stack.values()}
        if len(kinds) > 1:
            raise CheckpointError(
                f"gguf export: experts of {place.name} are {' and '.join(sorted(kinds))}; one tensor of one type holds "
                "them all"
            )
        whole = np.stack([stack[number][1] for number in sorted(stack)])
        self._file.add(place.name, kind, whole)
        del self._experts[place.name]

    def close(self) -> None:
        """Write the keys, give the files their names, and copy the licences.

        Raises CheckpointError if a tensor of the source is neither copied nor replaced, or if there is none.
        """
        self._refuse_lost()
        if self._experts:
            raise CheckpointError(
                f"gguf export: experts of {next(iter(self._experts))} are missing"
            )
        for name, tensor in rope_tensors(self._model_config).items():
            self._file.add_floats(name, tensor)
        self._write_config()
        for pattern in LICENCES:
            for path in self.source.folder.glob(pattern):
                shutil.copyfile(path, self.folder / path.name)

    def _write_config(self) -> None:
        metadata = describe_source(self.source, self._parameters())
        file_type = self._file.main_type()
        vocabulary = read_vocabulary(self.source.folder, self._model_config.vocab_size)

        def describe(writer: GGUFWriter) -> None:
            write_description(writer, metadata, file_type)
            write_sizes(writer, self._model_config)
            write_vocabulary(writer, vocabulary, self.source.folder)

        name = file_name(metadata, file_type, self.source.folder)
        self._file.close(self.folder / name, describe)
        if self._adapter is not None:
            self._adapter.close(f"{metadata.name}, corrections")

    def _parameters(self) -> Parameters:
        sizes = {name: math.prod(self.reader.shape(name)) for name in self.reader}
        of_experts = sum(n for name, n in sizes.items() if ".experts." in name)
        n_experts = self._names.n_experts if of_experts else 0
        return Parameters(sum(sizes.values()), of_experts, n_experts)

    # On disk

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        """Whether there is a GGUF file of a model, and no configuration of another checkpoint."""
        return reading.is_in(folder)

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype | None, device: torch.device) -> PreTrainedModel:
        """The model that the keys and tensors of the file make, dequantised, with the corrections beside it."""
        return reading.load(folder, dtype, device)

    @classmethod
    def tensors(cls, folder: Path) -> Iterator[tuple[str, Tensor]]:
        """The bytes of each, those of the adapter last."""
        yield from reading.tensors(folder)

    @classmethod
    def stored(cls, folder: Path) -> Stored:
        """Bytes of the folder and of the tensors."""
        return reading.stored(folder)

    @classmethod
    def contents(cls, folder: Path, progress: Progress) -> Contents | None:
        """The type of every tensor, and ranks of the corrections, by the names in the file."""
        del progress
        return reading.contents(folder)

    @classmethod
    def config_in(cls, folder: Path) -> Mapping[str, Any]:
        """What the keys of the file make."""
        return reading.config_of(folder).to_dict()

    @classmethod
    def file_in(cls, folder: Path) -> str | None:
        """The model's file."""
        return reading.model_files(folder)[0].name

    # On the card

    @classmethod
    def repository_suffix(cls, made: MadeOf) -> str:
        """As others name them: "-GGUF"."""
        del made
        return "-GGUF"

    @classmethod
    def introduction(cls, card: CardFacts) -> str:
        """Forms, bits and size."""
        return "\n\n".join([packed_introduction(card), *widened_note(card)])

    @classmethod
    def how_to_load(cls, card: CardFacts) -> str:
        """With llama.cpp, or with the toolkit."""
        return cards.how_to_load(card)

    @classmethod
    def how_to_serve(cls, card: CardFacts) -> str:
        """With llama-server, or ollama."""
        return cards.how_to_serve(card)


def _bytes_of(tensor: Tensor) -> Bytes:
    """A tensor's numbers as bytes along its last dimension."""
    found: Bytes = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
    return found
