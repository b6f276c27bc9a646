"""Quantised layers as compressed-tensors' pack-quantized, with corrections as an adapter beside them.

Symmetric and asymmetric grids of 2 to 8 bits, in groups or whole rows, the scales of either sign as they are.
transformers matches modules by name and class, vLLM its own modules by the checkpoint's names: `ignore` has every
linear layer that is an ordinary weight by the names of both.

The layout knows no transposed weights, so GPT-2's Conv1D is written like Linear; transformers does not read that, for
the class `Linear` does not cover Conv1D.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn
from transformers import PretrainedConfig

from calibration.layers import is_linear
from calibration.skeleton import build_skeleton
from compress.bases import format_in
from compress.errors import CheckpointError
from compress.exports.base import LayerExport, MadeOf, Planned
from compress.exports.card import (
    CardFacts,
    load_adapter_beside,
    load_with_transformers,
    packed_introduction,
    vllm,
    widened_note,
)
from compress.exports.codes import CodesExporter, innermost, quantiser_of, traits_of_codes
from compress.exports.compressed_tensors.schemes import CONV1D, Stored, quantisation, settled
from compress.exports.compressed_tensors.tensors import packed_bytes, packed_tensors
from compress.exports.compressed_tensors.unread import (
    PLAIN,
    Told,
    fused_warnings,
    unread_by_transformers,
)
from compress.families.base import Compressor
from compress.families.correction import Correction
from compress.families.quantiser import Quantiser
from compress.forms.quantised import Quantised
from compress.models.checkpoint import write_json
from compress.models.model_config import read_config
from compress.solvers.grid import Symmetry

DRAFT = "mtp."
"""The prefix of draft heads' tensors, which vLLM builds by that name."""


class CompressedTensorsExporter(CodesExporter, name="compressed-tensors"):
    """Quantised layers in one checkpoint, their low-rank corrections in `adapter/` beside it."""

    traits = traits_of_codes(engines=("vllm", "openvino", "transformers"))

    def _begin(self) -> None:
        super()._begin()
        self._stored: dict[str, Stored] = {}
        self._names: set[str] = set()

    @classmethod
    def problem(cls, compressor: Compressor, shape: tuple[int, int]) -> str:
        """It holds codes on a grid whose zero points are whole numbers, in groups of adjacent inputs."""
        del shape
        base = quantiser_of(compressor)
        if base is None:
            return f"{innermost(compressor).name} does not quantise; choose native or dense"
        if not base.in_order:
            return (
                "vLLM refuses groups in activation order; choose --act-order none, native or dense"
            )
        if base.symmetry is Symmetry.AFFINE:
            return (
                f"its zero points are integers, and --symmetry {base.symmetry} has none; choose --symmetry asymmetric, "
                "native, mlx or gguf"
            )
        return ""

    @classmethod
    def warnings(
        cls, compressors: Mapping[str, Compressor], shapes: Mapping[str, tuple[int, int]]
    ) -> tuple[str, ...]:
        """Layers that servers compute as one, and that are not stored alike."""
        stored = cls._told_of(compressors, shapes)
        return (*fused_warnings(stored), *unread_by_transformers(stored))

    @classmethod
    def refusals(
        cls, compressors: Mapping[str, Compressor], shapes: Mapping[str, tuple[int, int]]
    ) -> tuple[str, ...]:
        """Those of what vLLM computes as one."""
        return tuple(fused_warnings(cls._told_of(compressors, shapes)))

    @classmethod
    def _told_of(
        cls, compressors: Mapping[str, Compressor], shapes: Mapping[str, tuple[int, int]]
    ) -> dict[str, Told]:
        return {
            name: _told(compressors[name])
            if name in compressors and not cls.stores_dense(compressors[name], shape)
            else PLAIN
            for name, shape in shapes.items()
        }

    @classmethod
    def warnings_of_model(cls, config: PretrainedConfig) -> tuple[str, ...]:
        """GPT-2's layers, which transformers does not take for linear ones."""
        if config.model_type not in CONV1D:
            return ()
        return (
            f"transformers loads no {config.model_type} in this format, for its Conv1D is not of the class Linear; "
            "--export native or dense is loaded",
        )

    @classmethod
    def planned_bytes(cls, plan: Planned) -> int:
        """Codes, scales, shape and zero points of each layer, and its correction in the adapter."""
        layers = 0
        for layer in plan.layers:
            base = quantiser_of(layer.compressor)
            if base is None:
                raise ValueError(f"{layer.name}: {layer.compressor.name} does not quantise")
            if cls.stores_dense(layer.compressor, layer.shape):
                layers += cls.dense_layer_bytes(plan, layer)
            else:
                layers += _layer_bytes(base, layer.shape) + layer.adapter_bytes
        return layers + plan.rest_bytes(cls.name)

    @classmethod
    def problem_of_expert(cls, compressor: Compressor) -> str:
        """transformers stacks the experts that it reads, and PEFT finds no layers to correct."""
        return (
            "PEFT adds no correction to an expert of a compressed-tensors checkpoint"
            if isinstance(compressor, Correction)
            else ""
        )

    @classmethod
    def experts_text(cls) -> str:
        """Packed, by the source's names."""
        return (
            "packed, each matrix under its name in the source, as vLLM and transformers read them"
        )

    @classmethod
    def _unheld(cls, form: Quantised) -> str:
        if form.affine:
            return "its grid is affine, and the format has integer zero points alone"
        return (
            "" if form.g_idx is None else "its groups are in activation order, which vLLM refuses"
        )

    def _write_codes(self, layer: LayerExport, form: Quantised) -> None:
        self._stored[layer.stored_name] = Stored.of(form)
        self._names.add(layer.name)
        for key, tensor in packed_tensors(form).items():
            self.writer.add(f"{layer.stored_name}.{key}", tensor)

    def _write_config(self) -> None:
        if not self._stored:
            raise CheckpointError(f"{self.name} export: no layer was quantised")
        plain = self._plain()
        settings = quantisation(settled(self._stored), (), plain)
        write_json(
            self.folder / "config.json", self.base_config() | {"quantization_config": settings}
        )
        if self._adapter is not None:
            bare = set(self._stored) - set(self._adapter.ranks)
            self._adapter.close(bare | set(plain), self.base_reference)

    def _plain(self) -> list[str]:
        """Every linear layer that is an ordinary weight, by the names of the model and of its source."""
        modules = dict(build_skeleton(read_config(self.source.folder), self.dtype).named_modules())
        found = {name for name, module in modules.items() if is_linear(module)} - self._names
        found |= {
            name.removesuffix(".weight")
            for name, shape in self._copied.items()
            if name.endswith(".weight") and len(shape) == 2
        }
        found = {name for name in found if not isinstance(modules.get(name), nn.Embedding)}
        draft = ["re:^mtp.*"] if any(name.startswith(DRAFT) for name in found) else []
        return [*draft, *sorted(found | set(self._dense))]

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        """Whether the quantisation in config.json is compressed-tensors'."""
        return format_in(folder) == cls.name

    @classmethod
    def repository_suffix(cls, made: MadeOf) -> str:
        """As others name them: "-w4a16"."""
        return "-compressed-tensors" if made.bits is None else f"-w{made.bits}a16"

    @classmethod
    def introduction(cls, card: CardFacts) -> str:
        """Forms, bits and size, and what the adapter makes of few bits."""
        notes = [] if card.adapter is None else widened_note(card)
        return "\n\n".join([packed_introduction(card), *notes])

    @classmethod
    def how_to_load(cls, card: CardFacts) -> str:
        """With transformers and compressed-tensors; the corrections with PEFT."""
        expanded = "CompressedTensorsConfig(dequantize=True)"
        code = load_with_transformers(
            card, f", quantization_config={expanded}", ("CompressedTensorsConfig",)
        )
        text = (
            "As a compressed-tensors checkpoint, with transformers and compressed-tensors 0.18 or later installed "
            f"(transformers expands the weights, and by `{expanded}` before the first forward, as zero points and PEFT "
            f"need it):\n\n{code}"
        )
        return text if card.adapter is None else f"{text}\n\n{load_adapter_beside(card)}"

    @classmethod
    def how_to_serve(cls, card: CardFacts) -> str:
        """With vLLM, which takes the adapter as a LoRA."""
        return vllm(card)


def _told(compressor: Compressor) -> Told:
    """How a planned layer is stored."""
    base = quantiser_of(compressor)
    if base is None:
        return PLAIN
    return Told(base.bits, base.group_size, asymmetric=base.symmetry is Symmetry.ASYMMETRIC)


def _layer_bytes(base: Quantiser, shape: tuple[int, int]) -> int:
    n_groups = -(-shape[1] // base.group_of(shape[1]))
    zero_points = 0 if base.symmetry is Symmetry.SYMMETRIC else n_groups
    return packed_bytes(shape, base.bits, n_groups, zero_points=zero_points)
