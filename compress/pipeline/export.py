"""Drives the block loop into the exporters: compressed layers as they come, then everything that is copied."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from calibration.heads import Head
from calibration.outputs import head_of
from calibration.skeleton import decoder_blocks
from calibration.statistics.base import PairStatistic
from calibration.store import Store
from calibration.stream import Stream
from compress.callbacks import Progress
from compress.config.choices import OnFailure
from compress.embeddings.placing import placed
from compress.errors import LayerError
from compress.exports import Exporter, LayerExport
from compress.exports.verification.probe import make_probe, write_probe
from compress.forms.dense import Dense
from compress.models.layers import refuse_not_finite
from compress.pipeline.beside import compress_beside
from compress.pipeline.blocks import Job, compress_blocks
from compress.pipeline.repositories import references
from compress.pipeline.source_names import (
    is_beside_experts,
    is_of_experts,
    opened_experts,
    with_source,
)
from compress.pipeline.stopwatch import Stopwatch
from compress.pipeline.tables import Placed, Tables, as_written, make_tables, write_tables
from compress.prepare.prepare import Prepared
from compress.prepare.texts import few_tokens
from compress.report.report import LayerReport
from compress.survey.gradients import gradients_of_block


@dataclass
class Outcome:
    """Results of the block loop, for the report."""

    layers: list[LayerReport] = field(default_factory=list)
    energies: list[tuple[float, float]] = field(default_factory=list)
    """For each layer the mean over tokens of ||(W - W') x||^2 and of ||W x||^2."""
    compressed: set[str] = field(default_factory=set)
    reused: Path | None = None
    """Folder of the statistics that were used again."""
    embeddings: tuple[LayerReport, ...] = ()
    """Embeddings and heads that the first format stores otherwise than the source, or was to."""
    notes: tuple[str, ...] = ()
    """Embeddings and heads that were left as they were after an error."""


def export(
    prepared: Prepared, folders: Mapping[str, Path], watch: Stopwatch, progress: Progress
) -> Outcome:
    """Compress the model into every export folder, and write the probe that verification reproduces.

    Raises LayerError, InputError, CheckpointError or OSError. Statistics of an unfinished run are removed.
    """
    exporters = prepared.subject.exporters(folders, references(prepared.recipe, prepared.plan))
    store = prepared.store()
    saved = store if store is not None and store.complete else None
    saving = None if saved is not None else store
    with watch("embeddings"):
        tables = make_tables(prepared, list(folders), progress)
    job = _job(prepared, (saved, saving), tables, watch)
    reused = saved.folder if saved is not None else None
    outcome = Outcome(reused=reused, embeddings=tables.reports, notes=tables.notes)
    try:
        _export_layers(prepared, job, (exporters, outcome), watch, progress)
        if saving is not None:
            saving.finish()
    finally:
        if saving is not None:
            saving.discard()
    if not outcome.compressed:
        raise LayerError(f"no layer could be compressed; the first: {outcome.layers[0].failure}")
    with watch("write"):
        _copy_rest(prepared, exporters, outcome.compressed, progress)
        write_tables(prepared, tables, exporters, progress)
        for exporter in exporters:
            exporter.close()
        _write_probes(prepared, tables, job.probes, exporters)
    return outcome


def _job(
    prepared: Prepared,
    stores: tuple[Store | None, Store | None],
    tables: Tables,
    watch: Stopwatch,
) -> Job:
    """Load what lies outside the blocks and bring the tokens to the first of them; stores: to read, to write."""
    saved, saving = stores
    prefix, blocks = decoder_blocks(prepared.model)
    prepared.loader.load_outside(f"{prefix}.", prepared.device)
    refuse_not_finite(prepared.model, "")
    with watch("embed"):
        wanted = saved is None
        batches = list(prepared.tokens.batches(prepared.recipe.batch_size)) if wanted else []
        stream = Stream(prepared.model, blocks, batches)
        if PairStatistic.among(prepared.needs):
            stream.keep_original()
        prepared.subject.replace_outside(prepared.device)
        probes = _probes(prepared, tables)
        # The walk does without: a vocabulary of 256,000 takes more memory than many blocks.
        prepared.loader.unload_outside(f"{prefix}.")
    return Job(
        plan=prepared.plan,
        loader=prepared.loader,
        stream=stream,
        probes=probes,
        needs=prepared.needs,
        saved=saved,
        saving=saving,
        propagate=prepared.recipe.propagate,
        routing=prepared.recipe.moe,
        forgiven=(LayerError,) if prepared.recipe.on_failure is OnFailure.KEEP else (),
        device=prepared.device,
        dtype=prepared.dtype,
        gradients=partial(gradients_of_block, prepared),
        subject=prepared.subject,
    )


def _probes(prepared: Prepared, tables: Tables) -> dict[Placed, Stream]:
    """A few tokens before the first block, embedded as each format stores the embeddings."""
    _, blocks = decoder_blocks(prepared.model)
    probes = {}
    for name in prepared.plan.exports:
        found = tables.placed_in(prepared.plan, name)
        if found not in probes:
            with placed(prepared.model, tables.of(found)):
                probes[found] = Stream(prepared.model, blocks, [few_tokens(prepared.tokens)])
    return probes


def _export_layers(
    prepared: Prepared,
    job: Job,
    sinks: tuple[Sequence[Exporter], Outcome],
    watch: Stopwatch,
    progress: Progress,
) -> None:
    """Run the block loop; its layers go to the exporters, what it found to the outcome."""
    exporters, outcome = sinks
    n_layers = len(prepared.plan.layers)
    progress("compress", 0, n_layers)
    finishing = chain(compress_blocks(job, watch), compress_beside(job))
    for done, finished in enumerate(finishing, start=1):
        progress("compress", done, n_layers)
        outcome.layers.append(finished.report)
        outcome.energies.append(finished.energies)
        if finished.form is None:
            continue
        outcome.compressed.add(finished.planned.name)
        name = finished.planned.name
        form, correction = prepared.subject.exported(finished.form.cpu())
        bias = prepared.subject.bias(name)
        layer = LayerExport(
            name,
            form,
            bias,
            finished.transposed,
            correction=correction,
            padded_rank=finished.planned.padded_rank,
        )
        layer = with_source(layer, prepared.subject.loader)
        with watch("write"):
            for exporter in exporters:
                exporter.add_layer(layer)


def _copy_rest(
    prepared: Prepared, exporters: Sequence[Exporter], compressed: set[str], progress: Progress
) -> None:
    """Every tensor of the source, or of the base, that no compressed layer replaces, as the model calls it."""
    loader, packed = prepared.subject.loader, dict(prepared.subject.packed_layers())
    opened = opened_experts(loader, compressed)
    tables = {key for table in prepared.plan.outside.tables for key in table.tensors}
    biases = {f"{table.head or table.name}.bias" for table in prepared.plan.outside.tables}
    for done, (key, name) in enumerate(loader.memory_names.items()):
        progress("copy the rest", done, len(loader.memory_names))
        module, _, leaf = name.rpartition(".")
        if key in tables or name in biases:
            continue
        if module in compressed and leaf in ("weight", "bias"):
            continue
        if is_of_experts(name, loader):
            _copy_expert(prepared, exporters, (key, name), opened)
            continue
        if module in packed and leaf in ("weight", "bias"):
            if leaf == "weight":
                for layer in packed[module]():
                    for exporter in exporters:
                        exporter.add_layer(layer)
            continue
        # Tensors that are merged or split on loading, and those beside them, keep the names that this expects.
        kept = key in loader.converted or is_beside_experts(name, loader)
        target = key if kept else name
        for exporter in exporters:
            tensor = as_written(prepared.plan, exporter.name, key, loader.tensors[key])
            exporter.add_tensor(target, tensor)
    progress("copy the rest", len(loader.memory_names), len(loader.memory_names))


def _copy_expert(
    prepared: Prepared,
    exporters: Sequence[Exporter],
    names: tuple[str, str],
    opened: Collection[str],
) -> None:
    """A tensor of an expert that no method compressed: as the source stores it, unless others of its layer are."""
    (key, name), loader = names, prepared.subject.loader
    module, _, leaf = name.rpartition(".")
    if not name.startswith(tuple(opened)):
        one = loader.slices.get(key)
        if one is None:
            _copy(prepared, exporters, key, key)
        elif one.is_first:
            _copy(prepared, exporters, key, one.key)
    elif leaf == "weight":
        for exporter in exporters:
            weight = as_written(prepared.plan, exporter.name, key, loader.tensors[key])
            layer = LayerExport(
                module, Dense(weight), prepared.subject.bias(module), transposed=False
            )
            exporter.add_layer(with_source(layer, loader))


def _copy(prepared: Prepared, exporters: Sequence[Exporter], key: str, target: str) -> None:
    """Copy a tensor of the source, or the stack that the plan knows by a slice, `key`."""
    whole = prepared.subject.loader.whole
    for exporter in exporters:
        exporter.add_tensor(target, as_written(prepared.plan, exporter.name, key, whole[target]))


def _write_probes(
    prepared: Prepared,
    tables: Tables,
    probes: Mapping[Placed, Stream],
    exporters: Sequence[Exporter],
) -> None:
    """Write the logits that each format's embeddings, the compressed blocks and each format's head make."""
    prepared.subject.load_outside(prepared.device)
    for found, probe in probes.items():
        with placed(prepared.model, tables.of(found)):
            logits = probe.predictions(0)[0].float().cpu()
        for exporter in exporters:
            if tables.placed_in(prepared.plan, exporter.name) == found:
                _write_logits(probe.batches[0].input_ids, logits, exporter, prepared)


def _write_logits(ids: Tensor, logits: Tensor, exporter: Exporter, prepared: Prepared) -> None:
    if not bool(torch.isfinite(logits).all()):
        raise LayerError("the compressed model's logits hold NaN or infinity; try --dtype float32")
    probe = make_probe(ids, logits, head_of(prepared.config) or Head.NEXT_TOKEN)
    write_probe(exporter.folder, probe, prepared.dtype, rounded=exporter.rounded)
