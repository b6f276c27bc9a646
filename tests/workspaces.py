"""A folder as a user has it: a tiny model, a text, and a quick recipe for them."""

from functools import partial
from pathlib import Path

import pytest
from families import save_tiny
from lm_eval.tasks import TaskManager

from compress.config.recipe import Recipe
from compress.evaluation import compare as evaluating
from compress.exports.native import NativeExporter
from compress.exports.verification.verify import Verification, check
from compress.methods.eora import EoRA
from compress.methods.gptq import GPTQ
from compress.pipeline import main as pipeline
from eval import catalog, samples
from eval.footprint import PeakMemory, Timing, measure

TEXT = "the quick brown fox jumps over the lazy dog and runs away from 42 hungry bears. " * 60


def fill(folder: Path) -> Path:
    """Put a tiny model and a text into the folder."""
    save_tiny(folder / "model", num_key_value_heads=4)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


def recipe(workspace: Path, **changes: object) -> Recipe:
    """A recipe for what `fill` put there; changes are options of `Recipe`."""
    options = {
        "model": str(workspace / "model"),
        "out": workspace / "out",
        "calibration": (str(workspace / "text.txt"),),
        "eval_text": str(workspace / "text.txt"),
        "samples": 8,
        "seq_len": 32,
        "eval_windows": 0,
        "tasks": (),
        "engines": (),
        "embeddings": "as-is",
        "head": "as-is",
        "method": EoRA(rank=4, base=GPTQ(group_size=32)),
    }
    return Recipe(**{**options, **changes})


def quicken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify in this process, draw nothing, time and write few tokens, and know no tasks but our own.

    lm-eval reads its own in ten seconds.
    """

    def own_tasks(include_path: list[Path], **_: object) -> TaskManager:
        return TaskManager(include_path=include_path, include_defaults=False)

    def in_this_process(folder: Path, device: str = "cpu") -> Verification:
        result = check(folder, device)
        assert result.passed
        return result

    def no_pictures(_: object, folder: Path) -> list[Path]:
        (folder / "pictures").mkdir()
        return []

    monkeypatch.setattr(catalog, "TaskManager", own_tasks)
    monkeypatch.setattr(pipeline, "verify", in_this_process)
    monkeypatch.setattr(pipeline, "with_engines", lambda export, *_: export)
    monkeypatch.setattr(NativeExporter, "verify_alone", lambda _: None)
    monkeypatch.setattr(pipeline, "run_page", lambda _: "<html></html>")
    monkeypatch.setattr(pipeline, "write_pictures", no_pictures)
    monkeypatch.setattr(samples, "NEW_TOKENS", 4)
    brief = Timing(prompt_tokens=16, new_tokens=2, repeats=1)
    monkeypatch.setattr(evaluating, "measure", partial(measure, timing=brief))
    memory = PeakMemory(baseline_bytes=1, peak_bytes=2, device_bytes=None)
    monkeypatch.setattr(evaluating, "peak_memory", lambda *_, **__: memory)
