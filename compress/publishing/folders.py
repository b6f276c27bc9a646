"""Exports as they are published: each the files of its folder, with a card that names its repository.

The folder of an export is left as it is. Files that tell of the repository are made anew beside it: the cards, the
report, the base that an adapter names, and with that the digest in the probe. The others are links to the export's.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from compress.errors import CheckpointError, RecipeError
from compress.exports.base import EXPORTS, MadeOf
from compress.exports.peft import CONFIG
from compress.exports.verification.places import EARLIER_PROBE, PROBE
from compress.exports.verification.probe import copy_probe, kind_of, read_probe
from compress.exports.verification.verify import refuse_changed
from compress.families.base import METHODS
from compress.models.checkpoint import json_text, read_json
from compress.pipeline.main import CARD, REPORT
from compress.report.card.beside import adapter_card
from compress.report.card.card import model_card
from compress.report.card.facts import adapter_place, adapter_rank
from compress.report.card.metadata import base_id
from compress.report.card.names import base_model
from compress.report.report import ExportReport, Report


@dataclass(frozen=True, kw_only=True)
class Names:
    """What is said for publishing; None: what the report of the run has."""

    repository: str | None = None
    base_model: str | None = None
    licence: str | None = None
    base: tuple[str, str] | None = None
    """The repository of the checkpoint that an adapter belongs to, and its commit."""


@dataclass(frozen=True, kw_only=True)
class Publication:
    """An export with the repository that it will be."""

    folder: Path
    report: Report
    """The report with what was said for publishing."""
    export: ExportReport

    @property
    def repository(self) -> str:
        """Its id."""
        assert self.export.repository is not None  # as `publication` has made sure
        return self.export.repository

    @property
    def card(self) -> str:
        """The card of its repository."""
        return model_card(self.report, self.export)

    @property
    def files(self) -> dict[str, int]:
        """The bytes of each file by name, cards and what else is made anew included."""
        made = {name: len(text.encode()) for name, text in self._made().items()}
        sizes = {name: path.stat().st_size for name, path in self._linked().items()}
        return dict(sorted((sizes | made).items()))

    @property
    def lacks(self) -> tuple[str, ...]:
        """What the card does not say, with the options that give it."""
        found = {
            "--base-model (the original's id)": base_model(self.report) is None,
            "--license": self.report.licence is None,
        }
        return tuple(option for option, is_lacking in found.items() if is_lacking)

    def stage(self, folder: Path) -> None:
        """Lay out in an empty folder what is uploaded. Raises CheckpointError if a file is not as it was exported."""
        refuse_changed(self.folder, read_probe(self.folder)[1])
        made = self._made()
        for name, path in self._linked().items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if name not in made:
                (folder / name).symlink_to(path.resolve())
        for name, text in made.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        changed = {
            name: hashlib.sha256(made[name].encode()).hexdigest() for name in self._configs()
        }
        (folder / PROBE).unlink(missing_ok=True)
        copy_probe(self.folder, folder, changed)

    def _linked(self) -> dict[str, Path]:
        """Files of the folder by name, hidden ones apart; the probe by the name that no loader looks for."""
        found = {
            path.relative_to(self.folder): path
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
        }
        return {
            (PROBE if name == EARLIER_PROBE else name).as_posix(): path
            for name, path in found.items()
            if not any(part.startswith(".") for part in name.parts)
        }

    def _made(self) -> dict[str, str]:
        """The text of each file that tells of the repository."""
        texts = {CARD: self.card, REPORT: self.report.to_json(), **self._configs()}
        place = adapter_place(self.export)
        if place is not None:
            texts[f"{place}/{CARD}"] = adapter_card(self.report, self.export)
        return texts

    def _configs(self) -> dict[str, str]:
        """The configuration of a PEFT adapter, with the repository of what it belongs to."""
        if self.export.adapter is None:
            return {}
        name = (Path(adapter_place(self.export) or ".") / CONFIG).as_posix()
        config = read_json(self.folder / name)
        if "peft_type" not in config:
            return {}
        if EXPORTS[self.export.format].traits.needs_base:
            assert self.report.base is not None
            base: dict[str, str | None] = {
                "base_model_name_or_path": base_id(self.report),
                "revision": self.report.base.revision,
            }
        else:
            base = {"base_model_name_or_path": self.repository, "revision": None}
        if all(config.get(key) == value for key, value in base.items()):
            return {}
        return {name: json_text(config | base)}


def publications(folders: list[Path], names: Names) -> list[Publication]:
    """The exports in these folders, each with its repository; several get names that end in the format.

    Raises CheckpointError for a folder without a report, RecipeError for a repository or a base that is not named.
    """
    return [_publication(folder, names, is_one=len(folders) == 1) for folder in folders]


def _publication(folder: Path, names: Names, *, is_one: bool) -> Publication:
    report, kind = Report.load(folder), kind_of(folder)
    found = [export for export in report.exports if export.format == kind.name]
    if not found:
        raise CheckpointError(
            f"{folder}: it holds {kind.name}, and its report.json tells of "
            f"{', '.join(export.format for export in report.exports)}; name a folder that `run` wrote"
        )
    (export,) = found
    report = _with_names(report, names)
    repository = export.repository
    if names.repository is not None:
        repository = names.repository
        if not is_one:
            repository += kind.repository_suffix(_made_of(report, export))
    if repository is None:
        raise RecipeError(
            f"{folder}: no repository was given; write compress publish {folder} owner/name"
        )
    if kind.traits.needs_base and base_id(report) is None:
        assert report.base is not None
        raise RecipeError(
            f"{folder}: it belongs to the checkpoint {report.base.checkpoint}, a folder that nobody else has; publish "
            "that, then give its repository: --base owner/name"
        )
    named = replace(export, repository=repository)
    exports = tuple(named if each is export else each for each in report.exports)
    return Publication(folder=folder, report=replace(report, exports=exports), export=named)


def _with_names(report: Report, names: Names) -> Report:
    """The report with what was said for publishing in the place of what the run found."""
    if names.base_model is not None:
        report = replace(report, recipe=report.recipe | {"base_model": names.base_model})
    if names.licence is not None:
        report = replace(report, licence=names.licence, licence_link=None)
    if names.base is not None and report.base is not None:
        checkpoint, revision = names.base
        base = replace(report.base, checkpoint=checkpoint, revision=revision)
        report = replace(report, base=base)
    return report


def _made_of(report: Report, export: ExportReport) -> MadeOf:
    method = str(report.recipe["method"]["name"])
    return MadeOf(
        bits=export.bits,
        method=METHODS[method].__name__ if method in METHODS else method,
        rank=adapter_rank(report),
    )
