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
from compress.exports.base import needs_base
from compress.families.correction import Correction
from compress.forms.base import Form
from compress.forms.linear import CompressedLinear
from compress.models.layers import bias_of, is_transposed, refuse_not_finite, weight_oi
from compress.on_base.base import OnBase, base_of, correction_of
from compress.pipeline.layer_text import factor_bits, remarks, written
from compress.pipeline.spectra import cut_of
from compress.pipeline.stopwatch import Stopwatch
from compress.planning.groups import Group, Inputs, groups_of, inputs_in_turn, name_owners
from compress.planning.layer import PlannedLayer
from compress.planning.plan import Plan
from compress.report.report import LayerReport, Spectrum
from compress.solvers.linalg import output_energy, shifted_energy


@dataclass(frozen=True)
class Finished:
    """A layer on its way out."""

    planned: PlannedLayer
    form: Form | None
    """None: it was left as it was, the report says why."""
    bias: Tensor | None
    transposed: bool
    report: LayerReport
    energies: tuple[float, float]
    """Mean over tokens of ||(W - W') x||^2 and of ||W x||^2."""


@dataclass(frozen=True)
class Job:
    """What the loop works with."""

    plan: Plan
    loader: PartLoader
    stream: Stream
    probe: Stream
    needs: frozenset[type[Statistic]]
    saved: Store | None
    """Statistics of an equal run, to be used."""
    saving: Store | None
    """Where new statistics go."""
    propagate: Propagate
    forgiven: tuple[type[Exception], ...]
    """Errors after which a layer is left as it was, and recorded."""
    device: torch.device
    dtype: torch.dtype
    gradients: Callable[[int], Mapping[str, Statistics]]
    """Statistics of a block's gradients by layer, for methods that read some."""
    base: OnBase | None = None
    """The compressed checkpoint that corrections are added to; None: the methods make the forms."""


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
    )
    for block in watch.each("load and propagate", blocks):
        refuse_not_finite(block.module, block.name)
        waiting = {name: planned[name] for name in block.layers if name in planned}
        gradients = {k: v for index in block.indices for k, v in job.gradients(index).items()}
        found = watch.each("observe", _statistics(job, block, frozenset(waiting)))
        for inputs in inputs_in_turn(found, waiting, block.n_blocks):
            with watch("compress"):
                finished = _compress_inputs(job, block, inputs, waiting, gradients)
            del inputs  # or the last group's Gram would live through the next block's observation
            yield from finished
            trim()  # the next group's factors are larger than the pieces that this one left
        for layer in waiting.values():
            yield _left(
                job,
                block,
                layer,
                _forgive(job, LayerError("it never saw a calibration token"), [layer]),
            )
        if job.base is not None:
            done = [name for name in planned if name not in block.layers]
            job.base.install(block, done, job.device)
        for index in block.indices:
            job.probe.advance(index)


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
    """Each group observed again when those before it are compressed; saved together at the end."""
    used = [first[0]] if first else []
    yield from used
    for entry in first[1:]:
        for shared in block.observe(frozenset(entry.names), job.needs):
            used.append(shared)
            yield shared
    _save(job, block, used)


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
    inputs: Inputs,
    waiting: dict[str, PlannedLayer],
    gradients: Mapping[str, Statistics],
) -> list[Finished]:
    """Compress the layers that read these inputs, those together that can be; they wait no longer."""
    finished = [
        one
        for group in groups_of(inputs, waiting, gradients)
        for one in _compress_group(job, block, group)
    ]
    for shared in inputs:
        shared.stats.forget()
    for one in finished:
        del waiting[one.planned.name]
    return finished


def _compress_group(job: Job, block: Block, group: Group) -> list[Finished]:
    """Compress layers that have a compressor together, and put what stands for them into the block."""
    started = time.perf_counter()
    layers = group.layers
    weights = [weight_oi(block.layers[layer.name]).float() for layer in layers]
    try:
        forms = _solved(job, layers, weights, group.stats)
    except LayerError as error:
        if len(layers) > 1:
            return [one for alone in group.apart() for one in _compress_group(job, block, alone)]
        return [_left(job, block, layers[0], _forgive(job, error, layers))]
    name_owners([layer.name for layer in layers], forms)
    seconds = (time.perf_counter() - started) / len(layers)
    found = []
    for layer, weight, form, own in zip(layers, weights, forms, group.own, strict=True):
        measured = (weight, own, _lost(weight, _dense(job, layer, form), form, own), seconds)
        found.append(_finish(job, block, layer, form, measured))
    return found


def _solved(
    job: Job, layers: Sequence[PlannedLayer], weights: Sequence[Tensor], stats: Statistics
) -> list[Form]:
    """Forms of layers that are compressed, or corrected, together. Raises LayerError."""
    method, names = layers[0].compressor, [layer.name for layer in layers]
    if job.base is None:
        return method.compress(weights, stats)
    if not isinstance(method, Correction):  # the plan gives these no correction
        return job.base.bare(names, job.device)
    return job.base.corrected(names, weights, method, stats)


def _dense(job: Job, layer: PlannedLayer, form: Form) -> Tensor:
    """The weight that a form stands for, in the original's scale."""
    return form.dense() if job.base is None else job.base.dense(layer.name, form)


def _lost(weight: Tensor, dense: Tensor, form: Form, stats: Statistics) -> float:
    """The mean over tokens of ||W x - W' x - c||^2, c what the form adds to its outputs."""
    error, offset, gram = weight.double() - dense, form.offset(), stats[Gram].mean_ii()
    if offset is None:
        return output_energy(error, gram)
    return shifted_energy(error, offset, gram, stats[Mean].mean_i())


def _cut(
    job: Job, layer: PlannedLayer, form: Form, weight: Tensor, stats: Statistics
) -> tuple[int | None, Spectrum | None]:
    """Rank and spectrum of a form's low-rank part."""
    if job.base is None:
        return cut_of(form, weight, stats)
    correction, bare = correction_of(form), _dense(job, layer, base_of(form))
    return (None, None) if correction is None else cut_of(correction, weight.double() - bare, stats)


def _finish(
    job: Job,
    block: Block,
    layer: PlannedLayer,
    form: Form,
    measured: tuple[Tensor, Statistics, float, float],
) -> Finished:
    weight, stats, lost, seconds = measured
    module, gram = block.layers[layer.name], stats[Gram].mean_ii()
    rank, spectrum = _cut(job, layer, form, weight, stats)
    energy = output_energy(weight, gram)
    terms, n_bytes = written(form, job.plan.exports)
    bias, base_error = bias_of(module), None
    if job.base is not None:
        bare = output_energy(weight.double() - _dense(job, layer, base_of(form)), gram)
        if needs_base(job.plan.exports):  # the base's own tensors stay what they are
            terms = [job.base.described(layer.name, base_of(form)) or terms[0], *terms[1:]]
            n_bytes += job.base.stored_bytes(layer.name) - base_of(form).n_bytes()
        bias, base_error = job.base.bias(layer.name), _relative(bare, energy)
        bias = None if bias is None else bias.to(job.device, job.dtype)
    report = LayerReport(
        name=layer.name,
        shape=layer.shape,
        method=layer.compressor.name,
        form=" + ".join(terms),
        bytes_before=layer.bytes_before,
        bytes_after=n_bytes,
        bits_per_weight=8 * n_bytes / weight.numel(),
        relative_error=_relative(lost, energy),
        base_error=base_error,
        rank=rank,
        spectrum=spectrum,
        seconds=seconds,
        note=remarks(layer, form, int((gram.diagonal() == 0).sum())),
        correction_bits=factor_bits(form) if isinstance(layer.compressor, Correction) else None,
        stored_with=layer.owner or None,
    )
    stand_in = form.unpacked(job.dtype).to(job.device)
    block.replace(layer.name, CompressedLinear(stand_in, bias))
    return Finished(layer, form, bias, is_transposed(module), report, (lost, energy))


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
    left = layer.bytes_before if job.base is None else job.base.stored_bytes(layer.name)
    report = LayerReport(
        name=layer.name,
        shape=layer.shape,
        method=layer.compressor.name,
        form="left as it was" if job.base is None else "left as the base has it",
        bytes_before=layer.bytes_before,
        bytes_after=left,
        bits_per_weight=8 * left / n_weights,
        relative_error=None,
        seconds=0.0,
        note=f"not compressed: {error}",
        failure=str(error),
    )
    module = block.layers[layer.name]
    return Finished(layer, None, bias_of(module), is_transposed(module), report, (0.0, 0.0))
