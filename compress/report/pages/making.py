"""How a run was made, as rows for its page: recipe, calibration text, machine, exports; warnings and fallbacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from compress.report.numbers import counted, megabytes
from compress.report.report import Report

MOST_NAMES = 4


@dataclass(frozen=True)
class Remark:
    """Something that was chosen or found on the way, and the layers that it is about."""

    text: str
    layers: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The layers in a few words."""
        if len(self.layers) <= MOST_NAMES:
            return ", ".join(self.layers)
        shown = ", ".join(self.layers[: MOST_NAMES - 1])
        return f"{shown} and {len(self.layers) - MOST_NAMES + 1} more"


def remarks(report: Report) -> list[Remark]:
    """Notes of the run, then those of layers, equal ones together."""
    layers: dict[str, list[str]] = {}
    for layer in report.layers:
        if layer.note:
            layers.setdefault(layer.note, []).append(layer.name)
    of_layers = [Remark(note, tuple(names)) for note, names in layers.items()]
    return [*map(Remark, report.notes), *of_layers]


def recipe_text(report: Report) -> str:
    """The recipe as YAML, without the folder that it was written to."""
    recipe = {key: value for key, value in report.recipe.items() if key != "out"}
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)


def calibration_rows(report: Report) -> list[tuple[str, str]]:
    """Rows about the calibration text, sources first; counts have thousands separators."""
    return list(_flattened(report.calibration, ""))


def machine_rows(report: Report) -> list[tuple[str, str]]:
    """Rows about versions and machine."""
    place = report.environment
    toolkit = place.toolkit + (f", commit {place.commit}" if place.commit else "")
    return [
        ("compress-llm", toolkit),
        ("Python", place.python),
        *place.versions.items(),
        ("platform", place.platform),
        ("processor", f"{place.processor}, {counted(place.n_threads, 'thread')}"),
        ("memory", megabytes(place.memory_bytes)),
        ("computed on", place.device),
    ]


def source_rows(report: Report) -> list[tuple[str, str]]:
    """Rows about the model, and the base checkpoint if there is one."""
    rows = [
        ("model", report.model),
        ("licence", report.licence or "not given"),
        ("sha256", report.fingerprint),
    ]
    if report.base is not None:
        base = report.base
        rows += [
            ("base checkpoint", f"{base.checkpoint}, {base.format}"),
            ("written by", base.producer or "not said"),
            ("its sha256", base.fingerprint),
        ]
    return rows


def _flattened(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Nested mappings and lists as rows: `sources 1, name`."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flattened(inner, f"{path}, {key}" if path else str(key))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        if all(not isinstance(inner, Mapping | list | tuple) for inner in value):
            yield path, ", ".join(map(_plain, value))
            return
        for number, inner in enumerate(value, 1):
            yield from _flattened(inner, f"{path} {number}" if len(value) > 1 else path)
    else:
        yield path, _plain(value)


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    whole = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:,}" if whole else str(value)
