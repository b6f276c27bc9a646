"""The report of a run, from everything that the stages found."""

from __future__ import annotations

import math
from collections.abc import Sequence

from calibration.heads import Head
from calibration.outputs import head_of
from compress.pipeline.export import Outcome
from compress.pipeline.stopwatch import Stopwatch
from compress.prepare.prepare import Prepared
from compress.prepare.texts import text_notes
from compress.report.environment import describe_environment
from compress.report.report import Comparison, ExportReport, KeptTensor, LayerReport, Report, Totals


def make_report(
    prepared: Prepared,
    outcome: Outcome,
    exports: Sequence[ExportReport],
    scores: Comparison | None,
    watch: Stopwatch,
) -> Report:
    """Everything a reader needs to judge the result and to make it again."""
    return Report(
        recipe=prepared.recipe.to_mapping(),
        model=_model_text(prepared),
        revision=prepared.source.revision,
        licence=prepared.recipe.license or prepared.source.licence,
        licence_link=None if prepared.recipe.license else prepared.source.licence_link,
        fingerprint=prepared.reader.fingerprint,
        environment=describe_environment(str(prepared.device)),
        calibration=dict(prepared.tokens.provenance),
        layers=tuple(outcome.layers),
        embeddings=outcome.embeddings,
        kept=_kept(prepared, outcome),
        exports=tuple(exports),
        totals=_totals(prepared, outcome, exports),
        scores=scores,
        timings={stage: round(seconds, 3) for stage, seconds in watch.seconds.items()},
        peak_memory=dict(watch.peak_bytes),
        base=prepared.subject.report(),
        head=str(head_of(prepared.config) or Head.NEXT_TOKEN),
        notes=_notes(prepared, outcome),
    )


def _kept(prepared: Prepared, outcome: Outcome) -> tuple[KeptTensor, ...]:
    """The tensors that the first format stores as the source does."""
    told = {layer.name for layer in outcome.embeddings}
    tables = [table for table in prepared.plan.outside.tables if table.name in told]
    others = {key for table in tables for key in table.tensors}
    kept = prepared.plan.kept_in(prepared.plan.exports[0])
    return tuple(tensor for tensor in kept if tensor.name not in others)


def _model_text(prepared: Prepared) -> str:
    source = prepared.source
    return source.spec if source.revision is None else f"{source.spec} at {source.revision}"


def _totals(prepared: Prepared, outcome: Outcome, exports: Sequence[ExportReport]) -> Totals:
    layers: list[LayerReport] = outcome.layers
    n_weights = sum(math.prod(layer.shape) for layer in layers)
    after = sum(layer.bytes_after for layer in layers)
    lost, energy = (sum(part) for part in zip(*outcome.energies, strict=True))
    return Totals(
        n_layers=len(layers),
        layer_bytes_before=sum(layer.bytes_before for layer in layers),
        layer_bytes_after=after,
        tensor_bytes_before=prepared.plan.bytes_before,
        tensor_bytes_after=exports[0].tensor_bytes,
        layer_bits_per_weight=8 * after / n_weights,
        relative_error=math.sqrt(max(lost, 0.0) / energy) if energy > 0 else None,
    )


def _notes(prepared: Prepared, outcome: Outcome) -> tuple[str, ...]:
    notes = [
        *prepared.plan.warnings,
        *prepared.source.notes,
        *prepared.plan.notes,
        *prepared.subject.notes,
        *outcome.notes,
    ]
    if outcome.reused is not None:
        notes.append(
            "statistics of an equal earlier run (same model, text and settings) were used again"
        )
    for text in (prepared.tokens, prepared.windows):
        notes += () if text is None else text_notes(text)
    left = [layer.name for layer in outcome.layers if layer.failure is not None]
    if left:
        notes.append(f"{len(left)} layers were left as they were after an error: {', '.join(left)}")
    return tuple(notes)
