"""What a report's models are called in cards and pages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.report.recorded_recipe import method_text
from compress.report.report import BaseReport, Report

_DEMO = "HuggingFaceTB/SmolLM2-135M-Instruct"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def base_name(base: BaseReport) -> str:
    """The compressed checkpoint that a run built on: its hub id, or its folder's own name."""
    if base.revision is None:
        return Path(base.checkpoint).name
    return base.checkpoint.partition("@")[0]


def base_model(report: Report) -> str | None:
    """The hub id of what was compressed; None for a local path, which nobody else can follow."""
    return base_model_of(report.recipe, report.revision)


def base_model_of(recipe: Mapping[str, Any], revision: str | None) -> str | None:
    """The same by the recipe, in which it may be given, and by the commit of what came from the hub."""
    spec, given = str(recipe["model"]), recipe.get("base_model")
    if given is not None:
        return str(given)
    if spec == "demo":
        return _DEMO
    # Only what came from the hub has a revision; a relative path may look like a hub id.
    spec = spec.partition("@")[0]
    return spec if revision is not None and _HUB_ID.fullmatch(spec) else None


def source_name(report: Report) -> str:
    """What was compressed, as a reader knows it."""
    return base_model(report) or Path(str(report.recipe["model"])).name


def model_name(report: Report) -> str:
    """The compressed model in a few words, with no folder of this machine."""
    return f"{source_name(report).rpartition('/')[2]}, compressed with {method_text(report.recipe['method'])}"
