"""MLX checkpoints, as mlx-lm loads them on Apple's machines and on a CPU, with corrections as its adapter.

`tensors.py` has the tensors of a layer, `architectures.py` the models that mlx-lm runs, `stacks.py` how it keeps
experts, `adapters.py` its adapters. Everything else is written as the source has it, for mlx-lm converts it at every
loading. It takes `model*.safetensors` of the folder and nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from calibration.heads import Head
from compress.bases import format_in, open_base
from compress.bases.mlx import EMBEDDINGS, place_of
from compress.callbacks import Progress
from compress.errors import CheckpointError
from compress.exports.base import (
    CorrectionStorage,
    LayerExport,
    Traits,
    Use,
)
from compress.exports.card import CardFacts, packed_introduction
from compress.exports.checkpoint import LOADING_READS, CheckpointExporter
from compress.exports.codes import dense_bytes, innermost, quantised_part, quantiser_of
from compress.exports.contents import Contents, contents_of_base
from compress.exports.mlx.adapters import (
    FOLDER,
    STEM,
    MlxAdapterWriter,
    corrections_in,
    padded_bytes,
    read_mlx_adapter,
)
from compress.exports.mlx.architectures import complete, n_experts, problem_of, warnings_of
from compress.exports.mlx.stacks import ExpertStacks
from compress.exports.mlx.tensors import (
    GROUPS,
    LEAST,
    WIDE_ZEROS,
    bytes_of,
    mlx_tensors,
    stored_group,
)
from compress.exports.planned import Planned, PlannedLayer, VocabularyMatrix
from compress.exports.reading import add_corrections, load_bare
from compress.exports.storage import Outside
from compress.families.base import Compressor
from compress.families.correction import Correction
from compress.families.quantiser import Quantiser
from compress.forms.dense import Dense
from compress.forms.int8 import Int8
from compress.forms.quantised import Quantised
from compress.forms.tied import Tied
from compress.models.checkpoint import Reader, Writer, write_json
from compress.models.resolve import SourceModel
from compress.solvers.grid import Symmetry
from eval.footprint import Stored, bytes_on_disk

_HALF, _FULL = torch.float16.itemsize, torch.float32.itemsize


class MlxExporter(CheckpointExporter, name="mlx"):
    """Quantised layers and embeddings in MLX's tensors, low-rank corrections in `adapters/` beside them."""

    traits = Traits(
        uses=frozenset({Use.MODEL}),
        heads=frozenset({Head.NEXT_TOKEN}),
        corrections=CorrectionStorage.HALF,
        needs_base=False,
        own_folder=False,
        adapter=FOLDER,
        ordinary=False,
        loading_reads=(*LOADING_READS, f"{FOLDER}/*.json"),
        library="mlx",
        relation="quantized",
        weights="packed",
        engines=("mlx",),
        outside=Outside.CODES,
    )

    def _begin(self) -> None:
        if problem := problem_of(str(self.config.get("model_type"))):
            raise CheckpointError(
                f"mlx export: {self.source.folder}: {problem}; choose native or dense"
            )
        self.writer = Writer(self.folder, metadata={"format": "mlx"})
        self._grids: dict[str, tuple[int, int]] = {}
        self._experts = ExpertStacks(n_experts(self.config, self.source.folder))
        self._adapter: MlxAdapterWriter | None = None

    @property
    def rounded(self) -> torch.dtype | None:
        """The dtype, in the adapter, of factors that were on grids; or that of layers that are stored dense."""
        adapter = None if self._adapter is None else self._adapter.rounded
        return adapter or (self.dtype if self._dense else None)

    @classmethod
    def problem_of_model(
        cls,
        source: SourceModel,
        config: PretrainedConfig,
        compressors: Mapping[str, Compressor],
        shapes: Mapping[str, tuple[int, int]],
    ) -> str:
        """It holds models that were seen to be right in mlx-lm."""
        del source, compressors, shapes
        return problem_of(config.model_type)

    @classmethod
    def warnings_of_model(cls, config: PretrainedConfig) -> tuple[str, ...]:
        """Attention that sees less than mlx-lm's."""
        return warnings_of(config)

    @classmethod
    def problem(cls, compressor: Compressor, shape: tuple[int, int]) -> str:
        """It holds codes in groups that MLX has, or whose scales can be repeated."""
        base = quantiser_of(compressor)
        if base is None:
            return f"{innermost(compressor).name} does not quantise; choose native or dense"
        if not base.in_order:
            return "MLX has no groups in another order than the inputs; take --act-order none, or native"
        size = base.group_of(shape[1])
        if size % LEAST and size < shape[1]:
            return f"groups of {size}; MLX has groups of 32, 64 and 128, and others can be multiples of these"
        return ""

    @classmethod
    def stores_dense(cls, compressor: Compressor, shape: tuple[int, int]) -> str:
        """Layers whose inputs MLX's groups do not divide."""
        base = quantiser_of(compressor)
        if base is None or stored_group(base.group_of(shape[1]), shape[1]) is not None:
            return ""
        return f"no group of {', '.join(map(str, sorted(GROUPS)))} divides its {shape[1]} inputs"

    @classmethod
    def warnings(
        cls, compressors: Mapping[str, Compressor], shapes: Mapping[str, tuple[int, int]]
    ) -> tuple[str, ...]:
        """Integer zero points, which cost speed in MLX."""
        del shapes
        bases = [base for it in compressors.values() if (base := quantiser_of(it)) is not None]
        if all(base.symmetry is not Symmetry.ASYMMETRIC for base in bases):
            return ()
        return (
            "scale times an integer zero point takes more digits than bf16 has, so that a bf16 model computes in "
            "fp32 there, right and slower; --symmetry affine stores offsets that bf16 holds",
        )

    @classmethod
    def planned_bytes(cls, plan: Planned) -> int:
        """Codes, scales and biases of each layer, and all corrections in one rank."""
        layers, ranks, corrected = 0, [0], 0
        paths = {_path(layer.name) for layer in plan.layers if _rank(layer)}
        for layer in plan.layers:
            base = quantiser_of(layer.compressor)
            if base is None:
                raise ValueError(f"{layer.name}: {layer.compressor.name} does not quantise")
            if cls.stores_dense(layer.compressor, layer.shape):
                layers += dense_bytes(plan, layer.shape)
                continue
            group = base.group_of(layer.shape[1])
            layers += bytes_of(layer.shape, base.bits, group, (_HALF, _bias_bytes(base)))
            ranks.append(_rank(layer))
            corrected += padded_bytes(layer.shape, 1) * (_path(layer.name) in paths)
        return layers + corrected * max(ranks) + plan.rest_bytes(cls.name)

    @classmethod
    def problem_of_table(cls, table: VocabularyMatrix, bits: int) -> str:
        """It holds embeddings and heads whose rows MLX's groups divide, without corrections of their own."""
        d = table.shape[1]
        if d % LEAST:
            return f"MLX has groups of 32, 64 and 128, and none divides rows of {d}"
        if table.is_corrected(bits):
            return "MLX's adapters hold no correction of embeddings or heads; take 8"
        return ""

    @classmethod
    def table_bytes(cls, table: VocabularyMatrix, bits: int) -> int:
        """Codes, scales and biases, in the model's dtype where rows are looked up."""
        width = _dtype_for(table.name, table.dtype).itemsize
        group = table.quantiser(bits).group_of(table.shape[1])
        return bytes_of(table.shape, bits, group, (width, width))

    @classmethod
    def problem_of_stacks(cls) -> str:
        """mlx-lm has stacks of its own, and the table has no architecture whose source has any."""
        return "experts are stacked here from those that the source stores one by one"

    @classmethod
    def experts_text(cls) -> str:
        """Packed, in mlx-lm's stacks."""
        return "packed, the experts of a block in stacks of gate, up and down, as mlx-lm runs them"

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of the source that no layer replaces; an expert's goes to its stack."""
        place = place_of(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if place is None:
            super().add_tensor(name, tensor)
            return
        self._copied[name] = tuple(tensor.shape)
        self._write_parts(name.removesuffix(".weight"), {"weight": tensor})

    def _write_layer(self, layer: LayerExport) -> None:
        name, form = layer.stored_name, layer.form
        if isinstance(form, Tied):
            return  # mlx-lm reads the embeddings
        if isinstance(form, Dense):
            self._write_parts(name, {"weight": form.weight.detach()})
        elif isinstance(form, Int8):
            self._write_codes(name, form)
        else:
            base, correction = quantised_part(layer, self.name)
            if stored_group(base.group_size, base.shape[1]) is None:
                dense = form.dense().to(self.dtype).contiguous()
                self._dense[name] = form.shape
                self._write_parts(name, {"weight": dense})
            else:
                self._write_codes(name, base)
                if correction is not None:
                    if self._adapter is None:
                        self._adapter = MlxAdapterWriter(self.folder / FOLDER)
                    self._adapter.add(name, correction)
        if layer.bias is not None:
            self.writer.add(f"{name}.bias", layer.bias)

    def _write_codes(self, name: str, form: Quantised | Int8) -> None:
        bits = 8 if isinstance(form, Int8) else form.bits
        wide = isinstance(form, Quantised) and form.qzeros is not None and bits > WIDE_ZEROS
        dtype = _dtype_for(name, self.dtype)
        parts = mlx_tensors(name, form, dtype, _FULL if wide else dtype.itemsize)
        self._grids[_path(name)] = (bits, form.shape[1] // parts["scales"].shape[1])
        self._write_parts(name, parts)

    def _write_parts(self, name: str, parts: Mapping[str, Tensor]) -> None:
        """Write a layer's tensors, or an expert's to its stack."""
        place = place_of(name)
        whole = parts if place is None else self._experts.put(place, parts)
        for part, tensor in whole.items():
            self.writer.add(f"{_path(name)}.{part}", tensor)

    def _write_config(self) -> None:
        if not self._grids:
            raise CheckpointError("mlx export: no layer was quantised")
        self._experts.refuse_incomplete()
        config = complete(self.base_config(), self.source.folder)
        quantisation = _quantisation(self._grids)
        write_json(
            self.folder / "config.json",
            config | {"quantization": quantisation, "quantization_config": quantisation},
        )
        if self._adapter is not None:
            experts = dict.fromkeys(self._experts.paths, self._experts.n_experts)
            self._adapter.close(int(config["num_hidden_layers"]), experts)

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        """Whether config.json has MLX's `quantization`."""
        return format_in(folder) == "mlx"

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype | None, device: torch.device) -> PreTrainedModel:
        """Read without MLX, into transformers' model; the corrections of the adapter are added."""
        model = load_bare(folder, dtype, device)
        if (folder / FOLDER).is_dir():
            found = read_mlx_adapter(folder / FOLDER)
            add_corrections(model, {_in_memory(name): it for name, it in found.items()}, folder)
        return model

    @classmethod
    def tensors(cls, folder: Path) -> Iterator[tuple[str, Tensor]]:
        """Those of the shards, then those of the adapter by its folder's name."""
        yield from Reader(folder).items()
        if (folder / FOLDER).is_dir():
            for name, tensor in Reader(folder / FOLDER, STEM).items():
                yield f"{FOLDER}/{name}", tensor

    @classmethod
    def stored(cls, folder: Path) -> Stored:
        """Bytes of the folder, the adapter included."""
        adapter = folder / FOLDER
        more = Reader(adapter, STEM).total_bytes if adapter.is_dir() else 0
        return Stored(bytes_on_disk(folder), Reader(folder).total_bytes + more)

    @classmethod
    def contents(cls, folder: Path, progress: Progress) -> Contents | None:
        """Grids of the layers, and the rank of their corrections."""
        found = contents_of_base(open_base(folder), progress)
        return replace(found, corrections=corrections_in(folder / FOLDER))

    @classmethod
    def introduction(cls, card: CardFacts) -> str:
        """Forms, bits and size, and what the adapter makes of few bits."""
        notes = []
        if card.adapter is not None and card.few_bits:
            notes = [
                "MLX has no format for factors of few bits: the adapter stores their values in 16 bits, and the native "
                "format stores the codes."
            ]
        return "\n\n".join([packed_introduction(card), *notes])

    @classmethod
    def how_to_load(cls, card: CardFacts) -> str:
        """With mlx-lm, the corrections as its adapter."""
        model = f'"{card.source}"'
        adapter = ""
        if card.adapter is not None:
            model = f'"{card.folder}", adapter_path="{card.adapter}"'
            adapter = (
                "\n\nThe low-rank corrections are the adapter beside it; without `adapter_path` the model is not "
                "corrected."
            )
        return f"""\
As an MLX checkpoint, with mlx-lm installed (`pip install mlx-lm`; where there is no Mac, `pip install "mlx[cpu]" \
mlx-lm`):

```python
from mlx_lm import generate, load

model, tokenizer = load({model})
print(generate(model, tokenizer, prompt="Once upon a time", max_tokens=50))
```{adapter}

With transformers it loads through the toolkit alone: `compress.load_export("{card.folder}")`."""

    @classmethod
    def how_to_serve(cls, card: CardFacts) -> str:
        """With mlx-lm's own server."""
        model = card.source
        if card.adapter is not None:
            model = f"{card.folder} --adapter-path {card.adapter}"
        return (
            f"With mlx-lm: `mlx_lm.server --model {model}`, or for one text `mlx_lm.generate --model {model} --prompt "
            '"Once upon a time"`.'
        )


def _dtype_for(name: str, model: torch.dtype) -> torch.dtype:
    """The dtype to store a layer's scales and biases in, where it holds them.

    It is the model's. In one of fp32, layers have fp16 all the same: their inputs are fp32, and so is what comes of
    them. Embeddings have no input; what is looked up has the dtype of their scales, and all that follows.
    """
    looked_up = name.rpartition(".")[2] == EMBEDDINGS
    return model if model.itemsize == _HALF or looked_up else torch.float16


def _bias_bytes(base: Quantiser) -> int:
    wide = base.symmetry is Symmetry.ASYMMETRIC and base.bits > WIDE_ZEROS
    return _FULL if wide else _HALF


def _rank(layer: PlannedLayer) -> int:
    """The rank of a layer's own correction, whatever PEFT adapters are padded to; 0 without one."""
    method = layer.compressor
    if not isinstance(method, Correction):
        return 0
    return method.adapter_bytes(layer.shape) // padded_bytes(layer.shape, 1)


def _path(name: str) -> str:
    """MLX's path of a layer: that of the stack, for an expert's, where one that has no correction has zeros."""
    place = place_of(name)
    return name if place is None else place.path


def _quantisation(grids: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """The grid of most layers, and that of each other by its path."""
    (bits, size), _ = Counter(grids.values()).most_common(1)[0]
    found: dict[str, Any] = _grid(bits, size)
    return found | {path: _grid(*one) for path, one in grids.items() if one != (bits, size)}


def _grid(bits: int, group_size: int) -> dict[str, Any]:
    return {"group_size": group_size, "bits": bits, "mode": "affine"}


def _in_memory(name: str) -> str:
    """The name that transformers' model has for a layer of the source: an expert's is that of an unstacked one."""
    place = place_of(name)
    if place is None:
        return name
    above, _, leaf = place.path.rpartition(".")
    return f"{above.rpartition('.')[0].replace('block_sparse_moe', 'mlp')}.experts.{place.number}.{leaf}"
