"""The block loop: observe, compress, hand over, replace; then the walk moves on.

Every finished layer is handed over before the next block is loaded, so memory holds one block, its statistics and the
activations, whatever the size of the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.experts.pooling import Routed
from calibration.experts.routing import Routing
from calibration.memory import trim
from calibration.propagation import Propagate
from calibration.skeleton import PartLoader
from calibration.statistics.base import Statistic
from calibration.statistics.collection import Statistics
from calibration.statistics.gram import Gram
from calibration.statistics.mean import Mean
from calibration.store import Store
from calibration.stream import Stream
from calibration.walk import Block, SharedInput, walk
from compress.errors import LayerError
from compress.families.correction import Correction
from compress.forms.base import Form
from compress.forms.linear import CompressedLinear
from compress.models.layers import is_transposed, refuse_not_finite, weight_oi
from compress.pipeline.layer_text import factor_bits, remarks, written
from compress.pipeline.spectra import cut_of
from compress.pipeline.stopwatch import Stopwatch
from compress.pipeline.tables import Placed
from compress.planning.groups import (
    Group,
    Inputs,
    alike,
    groups_of,
    inputs_in_turn,
    name_owners,
)
from compress.planning.layer import PlannedLayer
from compress.planning.plan import Plan
from compress.report.report import LayerReport, Spectrum
from compress.solvers.linalg import output_energy, shifted_energy
from compress.subjects.subject import Subject


@dataclass(frozen=True)
class Finished:
    """A layer on its way out."""

    planned: PlannedLayer
    form: Form | None
    """None if the layer was left as it was; the report says why."""
    transposed: bool
    report: LayerReport
    energies: tuple[float, float]
    """Mean over tokens of ||(W - W') x||^2 and of ||W x||^2."""


@dataclass(frozen=True)
class Job:
    """Everything that the block loop works with."""

    plan: Plan
    loader: PartLoader
    stream: Stream
    probes: Mapping[Placed, Stream]
    """A few tokens for each way in which formats store the embeddings."""
    needs: frozenset[type[Statistic]]
    saved: Store | None
    """Statistics of an equal run, to be used."""
    saving: Store | None
    """The store of new statistics; None if they are not kept."""
    propagate: Propagate
    routing: Routing
    """The tokens from which statistics of experts are collected."""
    forgiven: tuple[type[Exception], ...]
    """Errors after which a layer is left as it was, and recorded."""
    device: torch.device
    dtype: torch.dtype
    gradients: Callable[[int], Mapping[str, Statistics]]
    """Statistics of a block's gradients by layer, for methods that read some."""
    subject: Subject
    """The thing that is compressed or corrected."""


def compress_blocks(job: Job, watch: Stopwatch) -> Iterator[Finished]:
    """Walk the model once and yield every planned layer, finished; the probe follows through the compressed blocks.

    Raises LayerError or InputError with the layer's name for what can't be compressed and is not forgiven.
    """
    planned = {layer.name: layer for layer in job.plan.layers}
    blocks = walk(
        job.stream,
        job.loader,
        propagate=job.propagate,
        device=job.device,
        at_once=job.plan.blocks_at_once,
        routing=job.routing,
    )
    for block in watch.each("load and propagate", blocks):
        refuse_not_finite(block.module, block.name)
        waiting = {name: planned[name] for name in block.layers if name in planned}
        gradients = {k: v for index in block.indices for k, v in job.gradients(index).items()}
        found = watch.each("observe", _statistics(job, block, frozenset(waiting)))
        for turns in alike(inputs_in_turn(found, waiting), waiting, job.device):
            with watch("compress"):
                finished = _compress_inputs(job, block, turns, waiting, gradients)
            del turns  # or the last group's Gram would live through the next block's observation
            yield from finished
            trim()  # the next group's factors are larger than the pieces that this one left
        for layer in waiting.values():
            yield _left(
                job,
                block,
                layer,
                _forgive(job, LayerError("it never saw a calibration token"), [layer]),
            )
        done = [name for name in planned if name not in block.layers]
        job.subject.install(block, done, job.device)
        for index in block.indices:
            for probe in job.probes.values():
                probe.advance(index)


def _statistics(job: Job, block: Block, names: frozenset[str]) -> Iterator[SharedInput]:
    """Statistics of the inputs of these layers, group by group: from the store if it has them, else observed.

    A Gram can be large: each is let go when its layers are done.
    """
    if job.saved is not None:
        found = [one for index in block.indices for one in job.saved.load(index, job.device)]
    else:
        found = block.observe(names, job.needs)
        if job.propagate is Propagate.SUBLAYER:
            yield from _observed_in_turn(job, block, found)
            return
        _save(job, block, found)
    while found:
        yield found.pop(0)


def _observed_in_turn(
    job: Job, block: Block, first: Sequence[SharedInput]
) -> Iterator[SharedInput]:
    """Each group observed again when those before it are compressed; saved together at the end.

    What the experts of a layer read is observed at once, and so is what their last layers read.
    """
    turns: dict[str, list[SharedInput]] = {}
    for entry in first:
        turns.setdefault(_turn(block, entry), []).append(entry)
    used: list[SharedInput] = []
    for number, entries in enumerate(turns.values()):
        names = frozenset(name for entry in entries for name in entry.names)
        for shared in block.observe(names, job.needs) if number else entries:
            used.append(shared)
            yield shared
    _save(job, block, used)


def _turn(block: Block, entry: SharedInput) -> str:
    """The layers that are observed at once: those of one input, or of all experts in the same place."""
    name = entry.names[0]
    for path in block.experts:
        if name.startswith(f"{path}."):
            return f"{path} {name.rpartition('.')[2]}"
    return name


def _save(job: Job, block: Block, found: Sequence[SharedInput]) -> None:
    """Statistics of each of the blocks in a file of its own, if they are wanted."""
    if job.saving is None:
        return
    for index in block.indices:
        inside = f"{block.name}.{index}." if block.n_blocks > 1 else block.name
        job.saving.save(index, [one for one in found if one.names[0].startswith(inside)])


def _compress_inputs(
    job: Job,
    block: Block,
    turns: Sequence[Inputs],
    waiting: dict[str, PlannedLayer],
    gradients: Mapping[str, Statistics],
) -> list[Finished]:
    """Compress the layers that read these inputs, those together that can be; they wait no longer.

    Where there are several inputs in turn, their layers have equal plans, and are solved as stacks.
    """
    groups = [groups_of(inputs, waiting, gradients) for inputs in turns]
    finished = [
        one for stack in zip(*groups, strict=True) for one in _compress_stack(job, block, stack)
    ]
    for inputs in turns:
        for shared in inputs:
            shared.stats.forget()
    for one in finished:
        del waiting[one.planned.name]
    return finished


def _compress_stack(job: Job, block: Block, groups: Sequence[Group]) -> list[Finished]:
    """Compress groups of equal plans at once; one by one if they cannot be, for the error tells of which it is."""
    if len(groups) == 1:
        return compress_group(job, block, groups[0])
    started = time.perf_counter()
    problems = [
        ([layer.name for layer in group.layers], _weights(block, group), group.stats)
        for group in groups
    ]
    try:
        forms = job.subject.forms_of_alike(problems, groups[0].layers[0].compressor.together)
    except LayerError:
        return [one for group in groups for one in compress_group(job, block, group)]
    seconds = time.perf_counter() - started
    share = seconds / sum(len(group.layers) for group in groups)
    return [
        one
        for group, (_, weights, _), own in zip(groups, problems, forms, strict=True)
        for one in _finish_group(job, block, group, (weights, own, share))
    ]


def _weights(block: Block, group: Group) -> list[Tensor]:
    return [weight_oi(block.layers[layer.name]).float() for layer in group.layers]


def compress_group(job: Job, block: Block, group: Group) -> list[Finished]:
    """Compress layers that have a compressor together, and put what stands for them into the block."""
    started = time.perf_counter()
    layers = group.layers
    weights = _weights(block, group)
    try:
        names, method = [layer.name for layer in layers], layers[0].compressor.together
        forms = job.subject.forms(names, weights, method, group.stats)
    except LayerError as error:
        if group.shares:
            return _without_failing(job, block, group, error)
        if len(layers) > 1:
            return [one for alone in group.apart() for one in compress_group(job, block, alone)]
        return [_left(job, block, layers[0], _forgive(job, error, layers))]
    seconds = (time.perf_counter() - started) / len(layers)
    return _finish_group(job, block, group, (weights, forms, seconds))


def _finish_group(
    job: Job,
    block: Block,
    group: Group,
    made: tuple[Sequence[Tensor], Sequence[Form], float],
) -> list[Finished]:
    """Put what stands for each layer into the block; made: weights, their forms, and seconds for each."""
    weights, forms, seconds = made
    name_owners([layer.name for layer in group.layers], forms)
    found = []
    for layer, weight, form, own in zip(group.layers, weights, forms, group.own, strict=True):
        measured = (
            weight,
            own,
            _lost(weight, job.subject.dense(layer.name, form), form, own),
            seconds,
        )
        routed = group.routed.get(layer.name)
        found.append(_finish(job, block, layer, form, measured, routed))
    return found


def _without_failing(job: Job, block: Block, group: Group, error: LayerError) -> list[Finished]:
    """Compress what shares something without the layers that cannot be, even alone; all are left if that is none."""
    failing: dict[str, LayerError] = {}
    for alone in group.apart():
        [layer] = alone.layers
        weight = weight_oi(block.layers[layer.name]).float()
        try:
            job.subject.forms([layer.name], [weight], layer.compressor.together, alone.stats)
        except LayerError as own:
            failing[layer.name] = _forgive(job, own, [layer])
    if not failing:
        failing = dict.fromkeys(
            [one.name for one in group.layers], _forgive(job, error, group.layers)
        )
    left = [
        _left(job, block, layer, failing[layer.name])
        for layer in group.layers
        if layer.name in failing
    ]
    if len(left) == len(group.layers):
        return left
    return [*left, *compress_group(job, block, group.without(failing))]


def _lost(weight: Tensor, dense: Tensor, form: Form, stats: Statistics) -> float:
    """The mean over tokens of ||W x - W' x - c||^2, c what the form adds to its outputs."""
    error, offset, gram = weight.double() - dense, form.offset(), stats[Gram].mean_ii()
    if offset is None:
        return output_energy(error, gram)
    return shifted_energy(error, offset, gram, stats[Mean].mean_i())


def _cut(
    job: Job, layer: PlannedLayer, form: Form, weight: Tensor, stats: Statistics
) -> tuple[int | None, Spectrum | None]:
    """Rank and spectrum of the low-rank part that the run has made."""
    made = job.subject.approximated(layer.name, form, weight)
    return (None, None) if made is None else cut_of(*made, stats)


def _base_error(
    job: Job, layer: PlannedLayer, form: Form, weight: Tensor, gram: Tensor
) -> float | None:
    """The relative error of the outputs without the correction of a base; None if there is no base."""
    bare = job.subject.uncorrected(layer.name, form)
    if bare is None:
        return None
    return _relative(output_energy(weight.double() - bare, gram), output_energy(weight, gram))


def _finish(
    job: Job,
    block: Block,
    layer: PlannedLayer,
    form: Form,
    measured: tuple[Tensor, Statistics, float, float],
    routed: Routed | None,
) -> Finished:
    weight, stats, lost, seconds = measured
    module, gram = block.layers[layer.name], stats[Gram].mean_ii()
    rank, spectrum = _cut(job, layer, form, weight, stats)
    energy = output_energy(weight, gram)
    told = written(form, job.plan.exports)
    told = job.subject.described(layer.name, form, told, job.plan.exports)
    report = LayerReport(
        name=layer.name,
        shape=layer.shape,
        method=layer.compressor.name,
        form=" + ".join(told.terms),
        bytes_before=layer.bytes_before,
        bytes_after=told.n_bytes,
        bits_per_weight=8 * told.n_bytes / weight.numel(),
        relative_error=_relative(lost, energy),
        base_error=_base_error(job, layer, form, weight, gram),
        rank=rank,
        spectrum=spectrum,
        seconds=seconds,
        note=remarks(layer, form, int((gram.diagonal() == 0).sum())),
        tokens=None if routed is None else routed.n_tokens,
        pooled=None if routed is None else routed.pooled,
        correction_bits=factor_bits(form) if isinstance(layer.compressor, Correction) else None,
        stored_with=layer.owner or None,
    )
    block.replace(layer.name, _stand_in(job, layer, form))
    return Finished(layer, form, is_transposed(module), report, (lost, energy))


def _stand_in(job: Job, layer: PlannedLayer, form: Form) -> CompressedLinear:
    """The module that computes with a form in its layer's place."""
    bias = job.subject.bias(layer.name)
    bias = None if bias is None else bias.to(job.device, job.dtype)
    return CompressedLinear(form.unpacked(job.dtype).to(job.device), bias, job.dtype)


def _relative(lost: float, energy: float) -> float:
    return (max(lost, 0.0) / energy) ** 0.5 if energy > 0 else 0.0


def _forgive(job: Job, error: LayerError, group: Sequence[PlannedLayer]) -> LayerError:
    names = ", ".join(f"{layer.name} {layer.shape}" for layer in group)
    if not isinstance(error, job.forgiven):
        raise LayerError(f"layer {names} with {group[0].compressor.name}: {error}") from error
    return error


def _left(job: Job, block: Block, layer: PlannedLayer, error: LayerError) -> Finished:
    """A layer that stays as it was, or as the base checkpoint has it, and why."""
    n_weights = layer.shape[0] * layer.shape[1]
    told = job.subject.untouched(layer)
    report = LayerReport(
        name=layer.name,
        shape=layer.shape,
        method=layer.compressor.name,
        form=" + ".join(told.terms),
        bytes_before=layer.bytes_before,
        bytes_after=told.n_bytes,
        bits_per_weight=8 * told.n_bytes / n_weights,
        relative_error=None,
        seconds=0.0,
        note=f"not compressed: {error}",
        failure=str(error),
    )
    module = block.layers[layer.name]
    return Finished(layer, None, is_transposed(module), report, (0.0, 0.0))
