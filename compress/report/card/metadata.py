"""The model card's front matter: what the Hugging Face hub reads of it, made with its own library.

The library checks the shape of it without a network; `ModelCard.validate` asks the hub.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from calibration.heads import Head
from compress.report.card.facts import exporter_of
from compress.report.card.names import base_model, base_name, model_name
from compress.report.metrics import METRICS
from compress.report.report import ExportReport, Report
from compress.report.sides import evaluated, sides_of
from eval.scores import ACCURACY, TaskScore

PIPELINES: Mapping[str, str] = {
    Head.NEXT_TOKEN: "text-generation",
    Head.CLASSES: "text-classification",
    Head.FEATURES: "feature-extraction",
    Head.IMAGE_TEXT: "image-text-to-text",
}

_TAGS = ("compress", "compressed")

_METRICS = {
    "acc": "accuracy",
    "acc_norm": "accuracy",
    "exact_match": "exact_match",
    "f1": "f1",
    "mcc": "matthews_correlation",
    "bleu": "bleu",
    "chrf": "chrf",
    "perplexity": "perplexity",
    "word_perplexity": "perplexity",
}
"""Of lm-eval's metrics those that the hub has an id for (hf.co/metrics); the others are in the card's text."""

_DATA: Mapping[str, tuple[str, str, str | None]] = {
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "ARC-Challenge"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "ARC-Easy"),
    "boolq": ("google/boolq", "BoolQ", None),
    "gsm8k": ("openai/gsm8k", "GSM8K", "main"),
    "hellaswag": ("Rowan/hellaswag", "HellaSwag", None),
    "lambada_openai": ("EleutherAI/lambada_openai", "LAMBADA", "default"),
    "mmlu": ("cais/mmlu", "MMLU", "all"),
    "openbookqa": ("allenai/openbookqa", "OpenBookQA", "main"),
    "piqa": ("ybisk/piqa", "PIQA", None),
    "winogrande": ("allenai/winogrande", "WinoGrande", "winogrande_xl"),
}
"""The hub's id, name and configuration of a task's data; another task is called by its own name."""

_LICENCES = frozenset(
    (
        *("afl-3.0", "agpl-3.0", "apache-2.0", "apple-amlr", "apple-ascl", "artistic-2.0"),
        *("bigcode-openrail-m", "bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd"),
        *("bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc"),
        *("cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0"),
        *("cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0"),
        *("cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0"),
        *("cc0-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0"),
        *("creativeml-openrail-m", "deepfloyd-if-license", "ecl-2.0", "epl-1.0", "epl-2.0"),
        *("etalab-2.0", "eupl-1.1", "eupl-1.2", "gemma", "gfdl", "gpl", "gpl-2.0", "gpl-3.0"),
        *("h-research", "intel-research", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "lgpl-lr"),
        *("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "lppl-1.3c", "mit"),
        *("mpl-2.0", "ms-pl", "ncsa", "odbl", "odc-by", "ofl-1.1", "openrail", "openrail++"),
        *("osl-3.0", "pddl", "postgresql", "unknown", "unlicense", "wtfpl", "zlib"),
    )
)
"""Ids that the hub takes (hf.co/docs/hub/repositories-licenses); any other is "other" and has a name."""


def front_matter(report: Report, export: ExportReport | None) -> ModelCardData:
    """What a card says to machines; results only of the export that was evaluated."""
    matter = _common(report, () if export is None else _format_tags(export))
    if export is not None:
        traits = exporter_of(export).traits
        matter |= {"library_name": traits.library, **_owner(export)}
        base = _base_of(report, export)
        if base is not None:
            matter |= {"base_model": base, "base_model_relation": traits.relation}
    elif base_model(report) is not None:
        matter |= {"base_model": base_model(report), "base_model_relation": "quantized"}
    results = list(_results(report)) if evaluated(report, export) else []
    if results:
        matter |= {"model_name": model_name(report), "eval_results": results}
    return ModelCardData(**matter)


def adapter_matter(report: Report, export: ExportReport) -> ModelCardData:
    """The same for an adapter in a folder of its export, to whose repository it belongs."""
    library = exporter_of(export).traits.library
    # Formats of transformers have their corrections in PEFT's.
    library = "peft" if library == "transformers" else library
    matter = _common(report, ("lora",)) | {"library_name": library}
    if export.repository is not None:
        matter |= {"base_model": export.repository, "base_model_relation": "adapter"}
    return ModelCardData(**matter)


def _common(report: Report, tags: Iterable[str]) -> dict[str, Any]:
    return {
        "library_name": "transformers",
        "pipeline_tag": PIPELINES[report.head],
        "tags": list(dict.fromkeys([*_TAGS, *_methods(report.recipe["method"]), *tags])),
        **_licence(report),
    }


def _format_tags(export: ExportReport) -> Iterator[str]:
    """The format, and the bits of its codes: "4-bit"."""
    yield export.format
    if export.bits is not None:
        yield f"{export.bits}-bit"


def _owner(export: ExportReport) -> dict[str, str]:
    """Who publishes it, by the key that uploaders of quantised models use."""
    if export.repository is None:
        return {}
    return {"quantized_by": export.repository.partition("/")[0]}


def _base_of(report: Report, export: ExportReport) -> str | None:
    """The hub id of what an export is made from; None for a folder of somebody's, whose original would be wrong."""
    return base_id(report) if exporter_of(export).traits.needs_base else base_model(report)


def base_id(report: Report) -> str | None:
    """The hub id of the base checkpoint; None if there is none, or it was a folder."""
    return None if report.base is None or report.base.revision is None else base_name(report.base)


def _methods(method: Mapping[str, Any]) -> Iterator[str]:
    """The names of a method and of its bases."""
    yield str(method["name"])
    if isinstance(method.get("base"), Mapping):
        yield from _methods(method["base"])


def _licence(report: Report) -> dict[str, Any]:
    if report.licence is None:
        return {"license": "unknown"}
    several = report.licence.split(", ")
    if _LICENCES.issuperset(several):
        return {"license": several[0] if len(several) == 1 else several}
    found = {"license": "other"}
    if report.licence != "other":
        found["license_name"] = report.licence
    if report.licence_link is not None:
        found["license_link"] = _followed(report.licence_link, base_model(report))
    return found


def _followed(link: str, base: str | None) -> str:
    """A file's name is one beside the original's card: it is found there."""
    is_file = "://" not in link
    return f"https://huggingface.co/{base}/blob/main/{link}" if is_file and base else link


def _results(report: Report) -> Iterator[EvalResult]:
    if report.scores is None:
        return
    fidelity, sides = report.scores.after.fidelity, sides_of(report)
    arguments = {"windows": report.recipe["eval_windows"]}
    if fidelity is not None:
        arguments["tokens"] = fidelity.n_tokens
    for metric in METRICS.values():
        measured = metric.after(sides)
        if metric.hub is not None and measured is not None:
            yield EvalResult(
                task_type=PIPELINES[report.head],
                # The name of the loader of plain text: it has no id of the hub.
                dataset_type="text",
                dataset_name=Path(str(report.recipe["eval_text"])).name,
                dataset_args=arguments,
                metric_type=metric.hub,
                metric_value=measured.value,
                metric_name=metric.label,
            )
    for score in report.scores.after.tasks:
        yield from _of_task(report, score)


def _of_task(report: Report, score: TaskScore) -> Iterator[EvalResult]:
    if not Head(report.head).writes_text:
        if score.task == ACCURACY:
            name = Path(str(report.recipe["eval_text"])).name
            yield _result(report, score, ("text", name, None), "accuracy")
        return
    metric = _METRICS.get(score.metric.partition(",")[0])
    if metric is not None:
        data = _DATA.get(
            score.task.removeprefix("offline_"), (score.task.replace(" ", "_"), score.task, None)
        )
        yield _result(report, score, data, metric)


def _result(
    report: Report, score: TaskScore, data: tuple[str, str, str | None], metric: str
) -> EvalResult:
    arguments = {"items": score.n_items}
    if score.n_shot is not None:
        arguments["num_few_shot"] = score.n_shot
    return EvalResult(
        task_type=PIPELINES[report.head],
        dataset_type=data[0],
        dataset_name=data[1],
        dataset_config=data[2],
        dataset_args=arguments,
        metric_type=metric,
        metric_value=score.value,
        metric_name=f"{score.task}, {score.metric}",
    )
