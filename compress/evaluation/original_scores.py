"""Scores of originals, kept on disk: a sweep evaluates each original once, not once a point.

One JSON file for each fingerprint of the model and of all that decides the figures. Perplexity is not among them: the
original has to read the text beside every export in any case, for their divergence.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass as record

from compress.callbacks import Progress
from compress.config.recipe import Recipe
from compress.errors import CheckpointError
from compress.evaluation.compare import Original, OriginalScores, score_original
from compress.report.environment import describe_environment
from compress.report.strict import STRICT, read_strictly

_VERSIONS = ("torch", "transformers", "lm_eval", "datasets", "tokenizers")
_READ = ("*.yaml", "*.yml", "*.py")
"""Files of a folder of tasks that decide their items."""


@dataclass(frozen=True)
class Found:
    """Scores of an original, measured now or by an earlier run."""

    scores: OriginalScores
    notes: tuple[str, ...]
    """Remarks for the report."""


@record(frozen=True, config=STRICT)
class _Kept:
    """The content of a file of scores."""

    settings: dict[str, Any]
    measured_by: str
    scores: OriginalScores


@dataclass(frozen=True)
class Originals:
    """Scores of originals in a folder."""

    folder: Path
    run: str
    """Who asks, for the reports of those that find what this one has measured."""

    def check(self) -> None:
        """Raises CheckpointError naming a file that cannot be read."""
        for path in sorted(self.folder.glob("*.json")):
            _read(path)

    def of(self, original: Original, fingerprint: str, recipe: Recipe, progress: Progress) -> Found:
        """Scores of the model with this fingerprint under the recipe's evaluation: found, or measured now and kept.

        Raises what `score_original` raises, and CheckpointError for a file that cannot be read.
        """
        settings = _settings(original, fingerprint, recipe)
        text = json.dumps(settings, sort_keys=True)
        path = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
        if not path.is_file():
            kept = _Kept(settings, self.run, score_original(original, recipe, progress))
            _write(path, kept)
        kept = _read(path)  # what a later run finds, to the last digit
        if kept.measured_by == self.run:
            return Found(kept.scores, ())
        note = (
            f"the original was not measured again: its speed, memory and task scores are those that the run "
            f"{kept.measured_by} measured, on equal settings"
        )
        return Found(kept.scores, (note,))


def _settings(original: Original, fingerprint: str, recipe: Recipe) -> dict[str, Any]:
    environment = describe_environment(str(original.device))
    return {
        "model": fingerprint,
        "dtype": str(original.dtype),
        "device": str(original.device),
        "processor": environment.processor,
        "n_threads": environment.n_threads,
        "toolkit": environment.toolkit,
        "versions": {name: environment.versions[name] for name in _VERSIONS},
        "tasks": list(recipe.tasks),
        "limit": recipe.limit,
        "batch_size": recipe.batch_size,
        "seed": recipe.seed,
        "include_path": _digests(recipe.include_path),
    }


def _digests(folder: Path | None) -> dict[str, str]:
    """Sha256 of the files of a folder of tasks."""
    if folder is None:
        return {}
    found = sorted(path for pattern in _READ for path in folder.rglob(pattern))
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def _write(path: Path, kept: _Kept) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(kept), indent=2, allow_nan=False), encoding="utf-8")
    partial.replace(path)


def _read(path: Path) -> _Kept:
    try:
        return read_strictly(_Kept, path.read_text(encoding="utf-8"), "scores")
    except ValueError as error:
        raise CheckpointError(
            f"{path}: not the scores of an original ({error}); remove it, and they are measured again"
        ) from error
