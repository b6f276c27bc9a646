"""The page of one run: report.html."""

from __future__ import annotations

from compress.report.card.names import source_name
from compress.report.changes import correction_text
from compress.report.engines import engine_lines
from compress.report.experts import experts_of, experts_text
from compress.report.numbers import megabytes
from compress.report.pages.charts import (
    bits_figure,
    bytes_figure,
    error_figure,
    memory_figure,
    ranks_figure,
    time_figure,
)
from compress.report.pages.experts import (
    KIND_HEAD,
    expert_errors_figure,
    kind_rows,
    tokens_figure,
)
from compress.report.pages.figures import Figure
from compress.report.pages.headline import headline, lead
from compress.report.pages.layers import layer_rows
from compress.report.pages.making import (
    calibration_rows,
    machine_rows,
    recipe_text,
    remarks,
    source_rows,
)
from compress.report.pages.rendering import render
from compress.report.pages.spectra import spectra_figures
from compress.report.pages.tasks import task_rows, tasks_figure
from compress.report.pages.theme import PAGE
from compress.report.recorded_recipe import method_text
from compress.report.report import Report

MOST_LAYERS = 500


def run_page(report: Report) -> str:
    """The report as one HTML file that fetches nothing and prints; everything in it comes from the report."""
    source = source_name(report)
    method = method_text(report.recipe["method"])
    spectra_told, spectra = spectra_figures(report, PAGE)
    return render(
        "run.html",
        title=f"{source}, {method}",
        source=source,
        method=method,
        report=report,
        lead=lead(report),
        stats=headline(report),
        tasks=task_rows(report),
        correction="" if report.scores is None else correction_text(report.scores),
        figures=_figures(report),
        spectra=spectra,
        spectra_told=spectra_told,
        remarks=remarks(report),
        recipe=recipe_text(report),
        tables={
            "What was compressed": source_rows(report),
            "Calibration text": calibration_rows(report),
            "Versions and machine": machine_rows(report),
        },
        experts_told=experts_text(report) if experts_of(report) else "",
        kinds=(KIND_HEAD, kind_rows(report)),
        engines=engine_lines(report),
        rows=layer_rows(report),
        most=MOST_LAYERS,
        megabytes=megabytes,
    )


def _figures(report: Report) -> dict[str, Figure]:
    return {
        "tasks": tasks_figure(report, PAGE),
        "errors": error_figure(report, PAGE),
        "bits": bits_figure(report.bits_by_layer(), PAGE),
        "ranks": ranks_figure(report, PAGE),
        "expert_tokens": tokens_figure(report, PAGE),
        "expert_errors": expert_errors_figure(report, PAGE),
        "bytes": bytes_figure(report, PAGE),
        "time": time_figure(report, PAGE),
        "memory": memory_figure(report, PAGE),
    }
