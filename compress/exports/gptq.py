"""GPTQ checkpoints, as transformers, gptqmodel and vLLM read them, with corrections as an adapter.

Tensors of a layer: qweight (i * bits / 32, o) int32, scales (G, o) fp16, qzeros (G, o * bits / 32)
int32, g_idx (i,) int32. Format "gptq" (v1) stores every zero less one. Readers add the one to whole
words, so a zero of 0, stored as the largest code, would carry into its neighbour: asymmetric grids
are written as "gptq_v2", which stores zeros as they are (and gptqmodel reads no other asymmetric
checkpoint but its own). A symmetric grid has zero 2**(bits - 1) everywhere, and is v1.

The layout knows no transposed weights, so GPT-2's Conv1D is written like Linear. gptqmodel reads
that; transformers 5.23 loads no GPTQ checkpoint of GPT-2 at all (it initialises `c_proj.weight`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.bases import format_in
from compress.bases.gptq import SERVED_BITS, SERVED_GROUPS
from compress.errors import CheckpointError
from compress.exports.base import LayerExport, MadeOf, Planned
from compress.exports.card import (
    UNKNOWN_GRID,
    CardFacts,
    load_adapter_beside,
    load_with_gptqmodel,
    load_with_transformers,
    packed_introduction,
    vllm,
    widened_note,
)
from compress.exports.codes import CodesExporter, innermost, quantiser_of, traits_of_codes
from compress.families.base import Compressor
from compress.families.correction import Correction
from compress.families.quantiser import Quantiser
from compress.forms.packing import CODES_A_ROW, pack
from compress.forms.quantised import Quantised
from compress.models.checkpoint import write_json
from compress.solvers.grid import Symmetry

BITS = (2, 3, 4, 8)
_BLOCK = re.compile(r"(?P<blocks>.+?)\.\d+\.(?P<part>.+)")


class GptqExporter(CodesExporter, name="gptq"):
    """Quantised layers in one checkpoint, their low-rank corrections in `adapter/` beside it."""

    traits = traits_of_codes(engines=("vllm", "gptqmodel"))

    def _begin(self) -> None:
        super()._begin()
        self._forms: dict[str, _Facts] = {}

    @classmethod
    def problem(cls, compressor: Compressor, shape: tuple[int, int]) -> str:
        """It holds codes on a grid that its readers know, in shapes that fill whole words."""
        del shape
        base = quantiser_of(compressor)
        if base is None:
            return f"{innermost(compressor).name} does not quantise; choose native or dense"
        if base.symmetry is Symmetry.AFFINE:
            return f"its zero points are integers, and --symmetry {base.symmetry} has none; choose native, mlx or gguf"
        problem = _problem(base.bits)
        return f"{problem}; choose native or dense" if problem else ""

    @classmethod
    def warnings(
        cls, compressors: Mapping[str, Compressor], shapes: Mapping[str, tuple[int, int]]
    ) -> tuple[str, ...]:
        """Widths, zero points, orders and groups that no server reads in this format."""
        found = [
            _unserved(base, shapes[name])
            for name, compressor in compressors.items()
            if (base := quantiser_of(compressor)) is not None
            and not cls.stores_dense(compressor, shapes[name])
        ]
        return tuple(dict.fromkeys(text for texts in found for text in texts))

    @classmethod
    def refusals(
        cls, compressors: Mapping[str, Compressor], shapes: Mapping[str, tuple[int, int]]
    ) -> tuple[str, ...]:
        """All of its warnings."""
        return cls.warnings(compressors, shapes)

    @classmethod
    def planned_bytes(cls, plan: Planned) -> int:
        """Codes, scales, zero points and group indices of each layer, and its correction in the adapter."""
        layers = 0
        for layer in plan.layers:
            base = quantiser_of(layer.compressor)
            if base is None:
                raise ValueError(f"{layer.name}: {layer.compressor.name} does not quantise")
            if cls.stores_dense(layer.compressor, layer.shape):
                layers += cls.dense_layer_bytes(plan, layer)
                continue
            widened = layer.adapter_bytes - layer.correction_bytes
            layers += layer.native_bytes + widened + base.gptq_extra_bytes(layer.shape)
        return layers + plan.rest_bytes(cls.name)

    @classmethod
    def problem_of_expert(cls, compressor: Compressor) -> str:
        """PEFT 0.19 leaves the factors of experts out without a word: it looks for stacked ones, gptqmodel has none."""
        return (
            "PEFT adds no correction to an expert of a GPTQ checkpoint"
            if isinstance(compressor, Correction)
            else ""
        )

    @classmethod
    def experts_text(cls) -> str:
        """Packed, by the source's names."""
        return (
            "packed, each matrix under its name in the source: gptqmodel loads them; from_pretrained of transformers "
            "does not, for it keeps experts stacked and fills them with random numbers"
        )

    @classmethod
    def _unheld(cls, form: Quantised) -> str:
        if form.affine:
            return "its grid is affine, and the format has integer zero points alone"
        return _problem(form.bits)

    @classmethod
    def _obstacle(cls, group_size: int, shape: tuple[int, int]) -> str:
        o, i = shape
        if o % CODES_A_ROW or i % CODES_A_ROW:
            return f"its shape {shape} is not in multiples of {CODES_A_ROW}"
        return super()._obstacle(group_size, shape)

    def _write_codes(self, layer: LayerExport, form: Quantised) -> None:
        facts = _Facts(form)
        self._forms[layer.stored_name] = facts
        self._refuse_mixture(layer.name, facts)
        for key, tensor in gptq_tensors(form).items():
            self.writer.add(f"{layer.stored_name}.{key}", tensor)

    def _refuse_mixture(self, name: str, facts: _Facts) -> None:
        first, reference = next(iter(self._forms.items()))
        same = facts.bits == reference.bits and facts.symmetric == reference.symmetric
        if not same or (facts.group_size != reference.group_size and not facts.is_whole_row):
            raise CheckpointError(
                f"gptq export: one checkpoint has one grid, and {name} ({facts}) differs from "
                f"{first} ({reference}); choose native"
            )

    def _write_config(self) -> None:
        if not self._forms:
            raise CheckpointError("gptq export: no layer was quantised")
        kept = [*self._kept_in_blocks(), *self._dense]
        quantisation = self._quantisation(kept)
        write_json(
            self.folder / "config.json",
            self.base_config() | {"quantization_config": quantisation},
        )
        write_json(self.folder / "quantize_config.json", quantisation)
        if self._adapter is not None:
            bare = set(self._forms) - set(self._adapter.ranks)
            self._adapter.close(bare | set(kept) | set(self._dense), self.base_reference)

    def _quantisation(self, kept: Collection[str]) -> dict[str, Any]:
        facts = list(self._forms.values())
        sizes = {fact.group_size for fact in facts}
        symmetric = facts[0].symmetric
        name = "gptq" if symmetric else "gptq_v2"
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": facts[0].bits,
            "group_size": sizes.pop() if len(sizes) == 1 else -1,
            "desc_act": any(not fact.in_order for fact in facts),
            "sym": symmetric,
            "lm_head": False,
            "checkpoint_format": name,
            "format": name,
            "pack_dtype": "int32",
            "true_sequential": True,
            "static_groups": False,
            "damp_percent": 0.01,
            "meta": {"quantizer": ["compress-llm:1"]},
        }
        # gptqmodel and vLLM skip what "-:" rules match; transformers converts what it is told.
        rules = [f"-:^{re.escape(layer)}$" for layer in sorted(kept)]
        beside = [part.removeprefix("model.") for part in self._kept_beside()]
        rules += [f"-:^(?:model\\.)?{re.escape(part)}\\." for part in beside]
        if rules:
            config["dynamic"] = {rule: {} for rule in rules}
        if kept:
            config["modules_in_block_to_quantize"] = [_targets(self._forms, kept)]
        return config

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        """Whether the quantisation in config.json, or a file beside it, is GPTQ."""
        return format_in(folder) == "gptq"

    @classmethod
    def repository_suffix(cls, made: MadeOf) -> str:
        """As others name them: "-GPTQ-Int4"."""
        return "-GPTQ" if made.bits is None else f"-GPTQ-Int{made.bits}"

    @classmethod
    def introduction(cls, card: CardFacts) -> str:
        """Forms, bits and size, and what the adapter makes of few bits."""
        notes = [] if card.adapter is None else widened_note(card)
        return "\n\n".join([packed_introduction(card), *notes])

    @classmethod
    def how_to_load(cls, card: CardFacts) -> str:
        """With transformers and gptqmodel, a mixture with gptqmodel alone; the corrections with PEFT."""
        if card.has_experts:
            return load_with_gptqmodel(card)
        code = load_with_transformers(card, ', device_map="auto"')
        text = f"As a GPTQ checkpoint, with transformers and gptqmodel installed:\n\n{code}"
        return text if card.adapter is None else f"{text}\n\n{load_adapter_beside(card)}"

    @classmethod
    def how_to_serve(cls, card: CardFacts) -> str:
        """With vLLM, which takes the adapter as a LoRA, where servers take the grid."""
        if card.refusals is None:
            return UNKNOWN_GRID
        return vllm(card)

    def _kept_in_blocks(self) -> list[str]:
        """Matrices of the blocks that stay as they are, and that readers would take for ours."""
        return [
            name
            for name in self._matrices()
            if (match := _BLOCK.fullmatch(name)) and match["blocks"] in self._blocks()
        ]

    def _kept_beside(self) -> list[str]:
        """Towers and draft heads, which stay as they are: names of what holds matrices beside the blocks."""
        found = {
            _part_beside(name, blocks)
            for name in self._matrices()
            for blocks in self._blocks()
            if not any(name.startswith(f"{other}.") for other in self._blocks())
        }
        # An embedding or a head is itself what stands beside the blocks, and is never taken for ours.
        return sorted(found - set(self._matrices()) - {""})

    def _matrices(self) -> list[str]:
        """Names of the modules whose weight is copied, and a matrix."""
        return [
            name.removesuffix(".weight")
            for name, shape in self._copied.items()
            if name.endswith(".weight") and len(shape) == 2
        ]

    def _blocks(self) -> set[str]:
        return {match["blocks"] for name in self._forms if (match := _BLOCK.fullmatch(name))}


def _part_beside(name: str, blocks: str) -> str:
    """The largest part of the model that holds a module and no blocks."""
    parts, others = name.split("."), blocks.split(".")
    depth = next((k for k, part in enumerate(parts) if part not in others[k : k + 1]), 0)
    return ".".join(parts[: depth + 1])


class _Facts:
    """The part of a layer that the configuration tells, kept instead of the layer."""

    def __init__(self, form: Quantised) -> None:
        groups = form.groups()
        self.bits, self.group_size = form.bits, form.group_size
        self.symmetric = bool((form.zeros() == 1 << (form.bits - 1)).all())
        self.is_whole_row = form.group_size >= form.shape[1]
        self.in_order = bool((groups[1:] >= groups[:-1]).all())

    def __str__(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"{self.bits} bits, groups of {self.group_size}, {kind}"


def gptq_tensors(form: Quantised) -> dict[str, Tensor]:
    """The four tensors of a layer whose sizes are multiples of 32, in v1 or v2 as its grid asks."""
    zeros_go = form.zeros()
    symmetric = bool((zeros_go == 1 << (form.bits - 1)).all())
    stored_go = zeros_less_one(zeros_go, form.bits) if symmetric else zeros_go
    return {
        "qweight": form.qweight,
        "qzeros": pack(stored_go.T, form.bits).T.contiguous(),
        "scales": form.scales,
        "g_idx": form.groups().to(torch.int32),
    }


def zeros_less_one(zeros: Tensor, bits: int) -> Tensor:
    """Zeros as v1 stores them: less one, within their bits (0 becomes the largest code)."""
    return (zeros.to(torch.int32) - 1) & ((1 << bits) - 1)


def _targets(compressed: Collection[str], kept: Collection[str]) -> list[str]:
    """Names within a block where they tell the two apart, else full names."""
    parts = {match["part"] for name in compressed if (match := _BLOCK.fullmatch(name))}
    if any(name.endswith(f".{part}") for name in kept for part in parts):
        return sorted(compressed)
    return sorted(parts)


def _unserved(base: Quantiser, shape: tuple[int, int]) -> Iterator[str]:
    """Why vLLM and SGLang refuse a layer's codes, and what they take instead."""
    others = "transformers with gptqmodel does; --export compressed-tensors is served with them"
    if base.bits not in SERVED_BITS:
        yield f"no server reads GPTQ of {base.bits} bits (vLLM and SGLang take 4 and 8); {others}"
    if base.symmetry is not Symmetry.SYMMETRIC:
        yield f"no server reads GPTQ with zero points (vLLM and SGLang take symmetric grids); {others}"
    if not base.in_order:
        yield (
            "no server reads GPTQ in activation order (desc_act; vLLM refuses it); transformers with gptqmodel does; "
            "--act-order none is served"
        )
    size = base.group_of(shape[1])
    if size not in SERVED_GROUPS and size != shape[1]:
        yield (
            f"vLLM and SGLang have no kernel for groups of {size}; take --group-size 128, 64, 32, or -1 for whole rows"
        )


def _problem(bits: int) -> str:
    return "" if bits in BITS else f"{bits} bits; readers know {', '.join(map(str, BITS))}"
