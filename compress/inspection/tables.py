"""An inspection as rows of text: layers of a kind together, or each."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from compress.families.base import LayerShape
from compress.inspection.checkpoint import InspectedTensor, Inspection
from compress.inspection.possibilities import Possibility, dividing_groups, saving_rank
from compress.inspection.spectra import EffectiveRanks
from compress.models.kinds import Kind, expert_of, kind_of
from compress.models.names import block_and_place
from compress.report.numbers import NOTHING, counted, megabytes

Cells = tuple[str, ...]
LAYER_HEAD = ("layer", "n", "out x in", "stored as", "bytes", "share", "break-even rank")
OTHER_HEAD = ("tensor", "n", "shape", "stored as", "bytes", "share")
SPECTRA_HEAD = ("spectrum", "full", "numerical", "stable", "90 %", "99 %")
KIND_HEAD = ("bytes by kind", "tensors", "bytes", "share")
METHODS_HEAD = ("setting", "layers", "bits", "whole", "vs now")


def n_layer_columns(found: Inspection) -> int:
    """How many columns of `LAYER_HEAD` there is something to say in: only ordinary weights have a break-even rank."""
    return len(LAYER_HEAD) - (found.ordinary is None)


def layer_cells(found: Inspection, layers: Sequence[InspectedTensor]) -> list[Cells]:
    """Rows for `LAYER_HEAD`: layers of one place, shape and form together."""
    shapes = {} if found.ordinary is None else found.ordinary.linears.shapes
    groups: dict[tuple[str, tuple[int, ...], str], list[InspectedTensor]] = defaultdict(list)
    for layer in layers:
        groups[_place(layer.name), layer.shape, layer.stored].append(layer)
    return [
        (
            place,
            str(len(members)),
            *_told(members, found.n_bytes),
            _rank(shapes.get(members[0].name)),
        )
        for (place, _, _), members in groups.items()
    ]


def each_layer(found: Inspection) -> list[Cells]:
    """Rows for `LAYER_HEAD`, one for each layer by its full name."""
    shapes = {} if found.ordinary is None else found.ordinary.linears.shapes
    return [
        (layer.name, "1", *_told([layer], found.n_bytes), _rank(shapes.get(layer.name)))
        for layer in found.layers
    ]


def other_cells(found: Inspection) -> list[tuple[str, list[Cells]]]:
    """Rows for `OTHER_HEAD` by the reason why no method compresses these tensors."""
    reasons: dict[str, dict[tuple[str, tuple[int, ...], str], list[InspectedTensor]]] = {}
    for tensor in found.others:
        key = (_place(tensor.name), tensor.shape, tensor.stored)
        reasons.setdefault(tensor.reason, {}).setdefault(key, []).append(tensor)
    return [
        (
            reason,
            [
                (place, str(len(members)), *_told(members, found.n_bytes))
                for (place, _, _), members in groups.items()
            ],
        )
        for reason, groups in reasons.items()
    ]


def spectra_cells(spectra: Mapping[str, EffectiveRanks]) -> list[Cells]:
    """Rows for `SPECTRA_HEAD`: medians over the layers of a place."""
    groups: dict[tuple[str, int], list[EffectiveRanks]] = defaultdict(list)
    for name, ranks in spectra.items():
        groups[_place(name), ranks.full].append(ranks)
    return [(place, *_ranks(members)) for (place, _), members in groups.items()]


def each_spectrum(spectra: Mapping[str, EffectiveRanks]) -> list[Cells]:
    """Rows for `SPECTRA_HEAD`, one for each layer."""
    return [(name, *_ranks([ranks])) for name, ranks in spectra.items()]


def method_cells(found: Sequence[Possibility], before: int, n_weights: int) -> list[Cells]:
    """Rows for `METHODS_HEAD` of the possible settings; the whole checkpoint is the native one."""
    return [
        (
            f"{', '.join(one.methods)}: {one.setting}",
            megabytes(one.layer_bytes),
            f"{8 * one.layer_bytes / n_weights:.2f}",
            megabytes(one.n_bytes),
            f"{100 * one.n_bytes / before:.1f} %",
        )
        for one in found
        if one.layer_bytes is not None and one.n_bytes is not None
    ]


def refused_lines(found: Sequence[Possibility]) -> list[str]:
    """Refused settings with their reasons."""
    return [
        f"{', '.join(one.methods)}: {one.setting}: {one.refusal}" for one in found if one.refusal
    ]


def group_line(found: Inspection) -> str:
    """Which group sizes a quantiser takes."""
    if found.ordinary is None:
        return ""
    n_layers = len(found.ordinary.linears.shapes)
    counts = dividing_groups(found.ordinary)
    whole = [str(size) for size, n in counts.items() if n == n_layers]
    partly = [f"{size} in {n} of {n_layers}" for size, n in counts.items() if 0 < n < n_layers]
    text = f"groups that divide every layer's inputs: {', '.join(whole) or 'none'}"
    return text + (f"; some layers': {', '.join(partly)}" if partly else "")


def mixture_line(found: Inspection) -> str:
    """How many experts there are, in how many layers; for a table of kinds."""
    experts = [one for tensor in found.tensors if (one := expert_of(tensor.name)) is not None]
    n_experts = len({(one.module, one.number) for one in experts})
    n_layers = len({one.module for one in experts})
    return (
        f"{n_experts:,} experts in {counted(n_layers, 'layer')}" if experts else "stacked experts"
    )


def kind_cells(found: Inspection) -> list[Cells]:
    """Rows for `KIND_HEAD`: what each kind of weights takes; none for a model without experts."""
    kinds: dict[Kind, list[int]] = {}
    for tensor in found.tensors:
        kinds.setdefault(kind_of(tensor.name), []).append(tensor.n_bytes)
    if Kind.EXPERTS not in kinds:
        return []
    return [
        (
            str(kind),
            f"{len(kinds[kind]):,}",
            megabytes(sum(kinds[kind])),
            f"{100 * sum(kinds[kind]) / found.n_bytes:.1f} %",
        )
        for kind in Kind
        if kind in kinds
    ]


def headline(found: Inspection) -> str:
    """Format, number of layers and blocks, and bytes, in one line."""
    by = "" if found.producer is None else f", written by {found.producer}"
    what = "layers" if found.ordinary is None else "layers that methods compress"
    n = len(found.layers)
    return (
        f"{found.format}{by}: {n} {what} in {counted(found.n_blocks, 'block')}, "
        f"{megabytes(found.n_bytes)} of tensors"
    )


def _place(name: str) -> str:
    """What layers of all blocks, and of all experts, are together."""
    expert = expert_of(name)
    place = block_and_place(name if expert is None else expert.of_all)[1]
    return place.removesuffix(".weight")


def _told(members: Sequence[InspectedTensor], whole: int) -> Cells:
    n_bytes = sum(member.n_bytes for member in members)
    shape = " x ".join(map(str, members[0].shape))
    return shape, members[0].stored, megabytes(n_bytes), f"{100 * n_bytes / whole:.1f} %"


def _rank(layer: LayerShape | None) -> str:
    """The break-even rank: two factors of a lower rank take fewer bytes than the weight."""
    return NOTHING if layer is None else str(saving_rank(layer) + 1)


def _ranks(members: Sequence[EffectiveRanks]) -> Cells:
    numerical, at_90, at_99 = (
        f"{statistics.median(values):.0f}"
        for values in (
            [one.numerical for one in members],
            [one.holds_90 for one in members],
            [one.holds_99 for one in members],
        )
    )
    stable = statistics.median(one.stable for one in members)
    return str(members[0].full), numerical, f"{stable:.1f}", at_90, at_99
