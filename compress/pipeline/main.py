"""The pipeline: plan, calibrate, compress, export, verify, evaluate, report.

An output folder appears whole or not at all: work happens in a hidden sibling, which is renamed at the end. What fails
before the export is verified is removed; what fails later is kept, verified, as `<out>.unfinished`.
"""

from __future__ import annotations

import glob
import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import yaml

from calibration.propagation import Propagate
from compress.callbacks import Progress, Warn, no_progress, no_warning
from compress.config.choices import StatisticsMode
from compress.config.recipe import Recipe
from compress.errors import RecipeError
from compress.evaluation.compare import (
    asks_for_evaluation,
    compare_with,
    original_of,
    resolve_original,
)
from compress.evaluation.original_scores import Originals
from compress.exports import EXPORTS
from compress.exports.load import stored_in
from compress.exports.verification.verify import verify
from compress.pipeline.engines import with_engines
from compress.pipeline.export import export
from compress.pipeline.imatrix import refuse_imatrix, save_imatrix
from compress.pipeline.report import make_report
from compress.pipeline.repositories import missing_text, with_publishing
from compress.pipeline.stopwatch import Stopwatch
from compress.planning.make import seconds_of_forward
from compress.planning.memory import peak_memory
from compress.planning.mixtures import mixture_lines
from compress.planning.plan import Forecast
from compress.prepare.output_folder import refuse_bad_output
from compress.prepare.prepare import (
    Prepared,
    prepare,
    refuse_small_disks,
    refuse_small_statistics_disk,
)
from compress.prepare.texts import text_lines
from compress.report.card.beside import adapter_card
from compress.report.card.card import model_card
from compress.report.card.facts import adapter_place
from compress.report.card.pictures import PICTURES
from compress.report.pages import run_page, write_pictures
from compress.report.report import Comparison, ExportReport, Report
from compress.survey.gradients import with_gradients
from compress.survey.original_walk import original_blocks
from compress.survey.survey import surveyed

RECIPE, REPORT, CARD, PAGE = "recipe.yaml", "report.json", "README.md", "report.html"
VERIFIED, PARTIAL, UNFINISHED = ".verified", ".partial", ".unfinished"


def plan(recipe: Recipe, *, progress: Progress = no_progress) -> Forecast:
    """A dry run: everything that a run checks before work is checked, and its sizes and time are told."""
    refuse_bad_output(recipe)
    prepared = prepare(recipe, progress)
    refuse_small_disks(prepared)
    prepared = surveyed(prepared, progress)
    n_parameters = sum(parameter.numel() for parameter in prepared.model.parameters())
    seconds = seconds_of_forward(n_parameters, prepared.tokens.n_tokens, prepared.device)
    names = [layer.name for layer in prepared.plan.layers]
    experts = mixture_lines(names, recipe.moe, prepared.plan.exports)
    text = text_lines(prepared.tokens, prepared.windows, prepared.tokenizer)
    missing = missing_text(prepared)
    notes = (f"note: {note}" for note in (*prepared.reader.notes, *([missing] if missing else [])))
    memory = peak_memory(
        prepared.plan, prepared.loader, prepared.tokens, recipe.batch_size, prepared.needs
    )
    return Forecast(prepared.plan, seconds, (*experts, *text, *notes, *memory.lines()))


def run(
    recipe: Recipe,
    *,
    progress: Progress = no_progress,
    originals: Originals | None = None,
    warn: Warn = no_warning,
) -> Report:
    """Compress, export, verify, evaluate, report; `recipe.folder` then holds the checkpoint, its card and the report.

    `originals`: a store of the original model's scores, which several runs on it share. `warn` is called before work
    with each sentence on what no server of a format reads.

    Raises RecipeError, CheckpointError, InputError or EvalError before work for what can be known by then, and
    LayerError, CheckpointError, InputError or OSError during it. Nothing half-written is left behind.
    """
    watch = Stopwatch()
    refuse_bad_output(recipe)
    with watch("prepare"):
        prepared = prepare(recipe, progress)
        recipe = prepared.recipe
        refuse_small_disks(prepared)
    with watch("survey"):
        prepared = with_gradients(surveyed(prepared, progress), progress)
    for warning in prepared.plan.warnings:
        warn(warning)
    with _workshop(recipe.folder) as folder:
        folders = _export_folders(recipe, folder)
        outcome = export(prepared, folders, watch, progress)
        with watch("verify"):
            device = str(prepared.device)
            exports = [_verified(name, folder, device, progress) for name in folders]
            exports = with_publishing(prepared, exports)
        (folder / VERIFIED).touch()
        # Should an engine or the evaluation fail, `compress eval` finds there what to do.
        (folder / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
        with watch("engines"):
            exports = [with_engines(it, folder, recipe.engines, progress) for it in exports]
        first = next(iter(folders.values()))
        scores: Comparison | None = None
        notes: tuple[str, ...] = ()
        if asks_for_evaluation(recipe):
            with watch("evaluate"):
                scores, notes = _scores(prepared, first, originals, progress)
        report = make_report(prepared, outcome, exports, scores, watch)
        report = replace(report, notes=(*report.notes, *notes))
        _describe(report, folder, progress)
    return report


def _scores(
    prepared: Prepared, export: Path, originals: Originals | None, progress: Progress
) -> tuple[Comparison, tuple[str, ...]]:
    """The original and the export side by side, and what is to be said of that."""
    original, recipe = original_of(prepared), prepared.recipe
    if originals is None:
        return compare_with(original, export, recipe, progress), ()
    found = originals.of(original, prepared.reader.fingerprint, recipe, progress)
    return compare_with(original, export, recipe, progress, found.scores), found.notes


def calibrate(
    recipe: Recipe, *, progress: Progress = no_progress, imatrix: Path | None = None
) -> Path:
    """Collect and save the original model's statistics, which every later run with `--propagate none` finds.

    `imatrix`: a file for llama-quantize that is made of them. Returns the folder they are in. Raises what `prepare`
    raises, and RecipeError if statistics are not to be saved, or make no such file.
    """
    if recipe.statistics is StatisticsMode.OFF:
        raise RecipeError(
            "off, but saving them is all that calibrate does; use reuse", option="statistics"
        )
    # Statistics through compressed blocks exist only together with the compression.
    prepared = prepare(replace(recipe, propagate=Propagate.NONE), progress)
    store = prepared.store()
    if store is None:
        raise RecipeError("there is no store to save them in", option="statistics")
    if imatrix is not None:
        refuse_imatrix(prepared)
    if not store.complete:
        refuse_small_statistics_disk(prepared)
        n_blocks = prepared.plan.n_blocks
        for block, _ in original_blocks(prepared, store):
            progress("calibrate", block.index, n_blocks)
        progress("calibrate", n_blocks, n_blocks)
    if imatrix is not None:
        save_imatrix(prepared, store, imatrix)
    return store.folder


def evaluate(folder: Path, recipe: Recipe, *, progress: Progress = no_progress) -> Comparison:
    """The model of the recipe and an export of it, side by side. Raises RecipeError if it asks for nothing."""
    original, settled = resolve_original(recipe, progress)
    if not asks_for_evaluation(settled):
        raise RecipeError(
            "0 windows and no task leave nothing to evaluate", option="eval_windows, tasks"
        )
    return compare_with(original, folder, settled, progress)


@contextmanager
def _workshop(out: Path) -> Iterator[Path]:
    """A hidden sibling to work in, of this process alone, which becomes `out` at the end."""
    out = out.absolute()
    _clear_away(out)
    folder = out.parent / f".{out.name}.{os.getpid()}{PARTIAL}"
    folder.mkdir(parents=True)
    try:
        yield folder
        if os.path.lexists(out):
            raise RecipeError(f"{out} appeared while the run was at work", option="out")
        folder.rename(out)
        (out / VERIFIED).unlink()
    except BaseException as error:
        if (folder / VERIFIED).exists():
            kept = _keep(folder, out)
            error.add_note(
                f"the verified checkpoint is kept in {kept}; `compress eval {kept}` evaluates it"
            )
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _keep(folder: Path, out: Path) -> Path:
    """Verified work is hours of somebody's time: give it a free name, one that does not look finished."""
    names = (f"{out.name}{UNFINISHED}" + (f"-{k}" if k else "") for k in itertools.count())
    kept = next(path for path in (out.parent / name for name in names) if not path.exists())
    return folder.rename(kept)


def _clear_away(out: Path) -> None:
    """Clear away what killed runs left beside `out`: verified work is kept, the rest removed."""
    for folder in out.parent.glob(f".{glob.escape(out.name)}.*{PARTIAL}"):
        owner = folder.name.removesuffix(PARTIAL).rpartition(".")[2]
        if not owner.isdigit() or psutil.pid_exists(int(owner)):
            continue
        if (folder / VERIFIED).exists():
            _keep(folder, out)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _export_folders(recipe: Recipe, folder: Path) -> dict[str, Path]:
    """One export is the output folder itself, unless its format wants one of its own; several have a folder each."""
    if len(recipe.export) == 1 and not EXPORTS[recipe.export[0]].traits.own_folder:
        return {recipe.export[0]: folder}
    folders = {name: folder / name for name in recipe.export}
    for path in folders.values():
        path.mkdir()
    return folders


def _verified(name: str, root: Path, device: str, progress: Progress) -> ExportReport:
    progress(f"verify {name}", 0, 1)
    path = root / name if (root / name).is_dir() else root
    found = verify(path, device=device)
    EXPORTS[name].verify_alone(path)
    progress(f"verify {name}", 1, 1)
    place = EXPORTS[name].traits.adapter
    adapter = None if place is None else path / place
    return ExportReport(
        format=name,
        folder=str(path.relative_to(root)),
        adapter=str(adapter.relative_to(root)) if adapter and adapter.is_dir() else None,
        file=EXPORTS[name].file_in(path),
        tensor_bytes=stored_in(path).tensor_bytes,
        loader=found.loader,
        relative_difference=found.relative_difference,
        max_abs_difference=found.max_abs_difference,
        top1_agreement=found.top1_agreement,
        tolerance=found.tolerance,
    )


def _describe(report: Report, folder: Path, progress: Progress) -> None:
    """Report, recipe and a card of its own go with every export, so that each folder can be published as it is.

    The page and the pictures are the same in all of them.
    """
    progress("describe", 0, 1)
    cards = {folder: model_card(report)}
    if any(export.folder != "." for export in report.exports):
        cards |= {folder / export.folder: model_card(report, export) for export in report.exports}
    page, drawn = run_page(report), write_pictures(report, folder)
    for path, card in cards.items():
        (path / PAGE).write_text(page, encoding="utf-8")
        if path != folder:
            (path / PICTURES).mkdir()
            for picture in drawn:
                shutil.copy(picture, path / PICTURES)
        (path / CARD).write_text(card, encoding="utf-8")
        (path / REPORT).write_text(report.to_json(), encoding="utf-8")
        (path / RECIPE).write_text(yaml.safe_dump(report.recipe, sort_keys=False), encoding="utf-8")
    for each in report.exports:
        if adapter_place(each) is not None:
            card = adapter_card(report, each)
            (folder / str(each.adapter) / CARD).write_text(card, encoding="utf-8")
    progress("describe", 1, 1)
