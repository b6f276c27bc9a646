"""The model card: README.md of an output folder, made from its report alone.

A folder with one export is described as that export, so that it can be published alone; a folder
that holds several has a card that tells them apart.
"""

from collections.abc import Iterator
from typing import Any

import yaml

from compress.models.kinds import expert_of
from compress.report.card.facts import (
    bits_text,
    exporter_of,
    facts_of,
    forms_text,
    in_which_format,
    stored_text,
)
from compress.report.card.loading import loading
from compress.report.card.metadata import front_matter
from compress.report.card.names import base_name, model_name, source_name
from compress.report.card.pictures import pictures
from compress.report.changes import INTERVAL_NAME, correction_text
from compress.report.experts import bytes_by_kind, experts_of, experts_text
from compress.report.formats import changes_table, samples_text
from compress.report.numbers import counted, megabytes
from compress.report.recorded_recipe import method_text
from compress.report.report import BaseReport, ExportReport, LayerReport, Report
from compress.report.sides import evaluated
from compress.report.summary import rows
from eval.paired import NO_CHANGE
from eval.samples import NEW_TOKENS

_WORST = 5


def model_card(report: Report, export: ExportReport | None = None) -> str:
    """The card as Markdown with the front matter that the Hugging Face hub reads.

    `export` is the one whose folder the card goes into, to be published on its own; None is the
    output folder itself, which is an export too if there is only one.
    """
    if export is None and [each.folder for each in report.exports] == ["."]:
        export = report.exports[0]
    parts = [
        f"---\n{front_matter(report, export).to_yaml()}\n---",
        *_introduction(report, export),
        *loading(report, export),
        *_scores(report, export),
        *_samples(report),
        *pictures(report),
        *_layers(report),
        *_experts(report),
        *_calibration(report),
        *_embeddings(report),
        *_kept(report),
        *_remarks(report),
        *_origin(report),
    ]
    return "\n\n".join(parts) + "\n"


def _introduction(report: Report, export: ExportReport | None) -> Iterator[str]:
    if report.base is not None:
        yield f"# {base_name(report.base)}, corrected with {method_text(report.recipe['method'])}"
        yield _corrected(report, report.base, export)
    else:
        yield f"# {model_name(report)}"
    if export is not None:
        yield exporter_of(export).introduction(facts_of(report, export, export.folder))
        return
    if report.base is None:
        yield f"{stored_text(report, export)}. Nothing was trained."
    yield "\n".join(["One folder for each format:", "", *_sizes(report)])


def _corrected(report: Report, base: BaseReport, export: ExportReport | None) -> str:
    totals, writer = report.totals, f", written by {base.producer}" if base.producer else ""
    return (
        f"`{base_name(base)}` is a compressed checkpoint of `{source_name(report)}`: {base.format}{writer}, "
        f"{megabytes(base.tensor_bytes)}, sha256 `{base.fingerprint}`. A low-rank correction was added to "
        f"{counted(totals.n_layers, 'linear layer')} of it, {forms_text(report)}, which takes {bits_text(report)}, "
        f"base and correction together{in_which_format(report, export)}. The base itself was not changed, and nothing "
        "was trained."
    )


def _sizes(report: Report) -> Iterator[str]:
    yield "| format | folder | whole checkpoint | weights |"
    yield "| --- | --- | ---: | --- |"
    for export in report.exports:
        kind = exporter_of(export).traits.weights
        size = megabytes(export.tensor_bytes)
        yield f"| {export.format} | `{export.folder}` | {size} | {kind} |"
    yield f"| original | | {megabytes(report.totals.tensor_bytes_before)} | |"


def _scores(report: Report, export: ExportReport | None) -> Iterator[str]:
    yield "## What it costs and what it saves"
    table = ["| | before | after |", "| --- | ---: | ---: |"]
    table += [f"| {row.label} | {row.before} | {row.after} |" for row in rows(report, export)]
    yield "\n".join(table)
    if report.scores is None:
        yield "The model was not evaluated."
        return
    yield (
        f"Measured on the {report.exports[0].format} export as it was read back from disk. "
        "± is one standard error. KL divergence and top-1 agreement compare with the original on "
        f"held-out text (`{report.recipe['eval_text']}`, {report.recipe['eval_windows']} windows). "
        "Task scores are lm-eval's, on the same items for both models."
    )
    yield from _changes(report)
    if evaluated(report, export):
        yield (
            "Bits per weight are those of the whole checkpoint, embeddings included, per parameter "
            "of the original. Speed and memory are those of the machine named below, computing on "
            f"{report.environment.device}."
        )


def _changes(report: Report) -> Iterator[str]:
    table = changes_table(report)
    if not table or report.scores is None:
        return
    correction = correction_text(report.scores)
    yield "What changed, item by item and window by window:"
    yield table
    yield (
        f"The {INTERVAL_NAME} is a paired bootstrap's, over the items of a task and the windows of the text; p is "
        f"McNemar's, exact and two-sided, and the bootstrap's where items are not just right or wrong. "
        f'"{NO_CHANGE.capitalize()}" means that so many items do not tell the change '
        "from chance, not that there is none." + (f" {correction}" if correction else "")
    )


def _samples(report: Report) -> Iterator[str]:
    if report.scores is None or not report.scores.samples:
        return
    yield "## What both write"
    yield (
        f"The likeliest continuations, at most {NEW_TOKENS} tokens, of fixed prompts; they were not chosen and measure "
        "nothing:"
    )
    yield from samples_text(report.scores.samples)


def _layers(report: Report) -> Iterator[str]:
    yield "## Error of the layers"
    measured = [layer for layer in report.layers if layer.relative_error is not None]
    if not measured:
        yield "No layer's error was measured."
        return
    worst = sorted(measured, key=lambda layer: -(layer.relative_error or 0.0))[:_WORST]
    yield (
        "The relative error of a layer's outputs on the calibration tokens; the worst "
        f"{len(worst)} of {len(measured)} (all are in `report.json`):"
    )
    alone = ("", "") if report.base is None else (" base alone |", " ---: |")
    head = [
        f"| layer | shape | form | bits per weight in it |{alone[0]} error |",
        f"| --- | --- | --- | ---: |{alone[1]} ---: |",
    ]
    bits = report.bits_by_layer()
    yield "\n".join([*head, *(_layer_row(layer, bits[layer.name]) for layer in worst)])
    if any(layer.stored_with for layer in report.layers):
        yield (
            "Layers that share what one of them stores have the bits per weight of all together; `stored_with` in "
            "`report.json` names that one."
        )


def _layer_row(layer: LayerReport, bits: float) -> str:
    shape = " x ".join(map(str, layer.shape))
    error = f"{layer.relative_error:.4f}"
    if layer.base_error is not None:
        error = f"{layer.base_error:.4f} | {error}"
    return f"| {layer.name} | {shape} | {layer.form} | {bits:.2f} | {error} |"


def _experts(report: Report) -> Iterator[str]:
    if not experts_of(report):
        return
    yield "## Experts"
    yield experts_text(report)
    table = ["| kind of weights | before | after |", "| --- | ---: | ---: |"]
    table += [
        f"| {kind} | {megabytes(before)} | {megabytes(after)} |"
        for kind, (before, after) in bytes_by_kind(report).items()
    ]
    yield "\n".join(table)


def _calibration(report: Report) -> Iterator[str]:
    yield "## What it was calibrated on"
    options: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "width": 100}
    text = yaml.safe_dump(report.calibration, default_flow_style=None, **options)
    yield f"```yaml\n{text}```"


def _embeddings(report: Report) -> Iterator[str]:
    if not report.embeddings:
        return
    yield "## Embeddings and head"
    head = [
        "| | shape | form | size before | size | error |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    rows = [
        f"| {table.note} | {' x '.join(map(str, table.shape))} | {table.form} | {megabytes(table.bytes_before)} | "
        f"{megabytes(table.bytes_after)} | {_error(table)} |"
        for table in report.embeddings
    ]
    yield "\n".join([*head, *rows])
    yield (
        "Errors are relative. Of a head in few bits that shares no weight: of its outputs on the calibration text, "
        "with its correction. All others: of the rows, each weighted by how often its token occurs there, without the "
        "correction that a shared weight has as a head."
    )


def _error(table: LayerReport) -> str:
    return "" if table.relative_error is None else f"{table.relative_error:.4f}"


def _kept(report: Report) -> Iterator[str]:
    yield "## What was left as it was"
    if not report.kept:
        yield "Nothing."
        return
    reasons: dict[str, list[int]] = {}
    for tensor in report.kept:
        reasons.setdefault(tensor.reason, []).append(tensor.n_bytes)
    table = ["| why | tensors | size |", "| --- | ---: | ---: |"]
    table += [f"| {why} | {len(part)} | {megabytes(sum(part))} |" for why, part in reasons.items()]
    yield "\n".join(table)


def _remarks(report: Report) -> Iterator[str]:
    noted: dict[tuple[str, str], list[str]] = {}
    for layer in report.layers:
        if layer.note:
            expert = expert_of(layer.name)
            key = layer.name if expert is None else expert.pattern, layer.note
            noted.setdefault(key, []).append(layer.name)
    layers = [
        f"`{names[0]}`: {note}" if len(names) == 1 else f"`{key}`, {len(names)} experts: {note}"
        for (key, note), names in noted.items()
    ]
    remarks = [*report.notes, *layers]
    yield "## Remarks and limits"
    yield "\n".join(f"- {remark}" for remark in [*remarks, *_LIMITS])


def _origin(report: Report) -> Iterator[str]:
    yield "## How to make it again"
    recipe = {key: value for key, value in report.recipe.items() if key != "out"}
    yield f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)}```"
    place = report.environment
    versions = ", ".join(f"{name} {version}" for name, version in place.versions.items())
    yield (
        f"compress-llm {place.toolkit}"
        + (f" (commit {place.commit})" if place.commit else "")
        + f", Python {place.python}, {versions}; {place.platform}, {place.processor}, "
        f"{place.n_threads} threads. Sha256 of the source: `{report.fingerprint}`."
    )


_LIMITS = (
    "Compression changes what a model says, also where the scores above do not look; test it on "
    "your own use.",
    "Licence, intended use and known faults of the original apply.",
)
