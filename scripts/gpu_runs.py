"""Whole runs on an accelerator beside the CPU's, for `scripts/gpu_check`: errors, and exports verified on both."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from gpu_parts import LOCAL_ERROR, LOCAL_OPTIMA, Job, Row

from compress.callbacks import no_progress
from compress.config.recipe import Recipe
from compress.exports.verification.verify import check
from compress.pipeline.export import export
from compress.pipeline.stopwatch import Stopwatch
from compress.prepare.prepare import prepare
from compress.survey.gradients import with_gradients
from compress.survey.survey import surveyed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from families import save_tiny

TEXT = "the quick brown fox jumps over the lazy dog and runs away from 42 hungry bears. " * 60
FAMILIES = ("qwen3", "gemma3_text", "gpt2", "gpt_neox", "opt", "qwen3_moe", "mixtral", "phi3")
SAME_ERROR = 0.05
"""Relative difference of a layer's error: what a block reads differs in its last digits, and a code may flip."""


@dataclass(frozen=True)
class Setting:
    """A run of a tiny random model."""

    family: str
    method: str
    options: Mapping[str, object]
    exports: tuple[str, ...] = ("native",)


def settings() -> Iterator[Setting]:
    """Methods on one family, then one method on the others."""
    yield Setting(
        "llama",
        "eora",
        {"rank": 4, "base": {"name": "gptq", "group_size": 32}},
        ("native", "gptq", "dense"),
    )
    yield Setting("llama", "fwsvd", {"keep": 0.5})
    yield Setting("llama", "cospadi", {"keep": 0.6})
    yield Setting("llama", "sparsegpt", {"pattern": "2:4"}, ("native", "dense"))
    served = ("compressed-tensors", "gguf", "mlx")
    yield Setting("llama", "gptq", {"group_size": 32}, served)
    yield Setting("llama", "gptq", {"group_size": 32, "symmetry": "affine"}, served[1:])
    for family in FAMILIES:
        yield Setting(family, "gptq", {"group_size": 16})  # experts are that narrow
    yield from mixtures()


def mixtures() -> Iterator[Setting]:
    """Methods of every kind on experts: by the tokens routed to them, by their gradients, with a shared dictionary."""
    corrected = {"rank": 4, "base": {"name": "gptq", "group_size": 16}}
    yield Setting("gpt_oss", "eora", corrected, ("native", "dense"))
    yield Setting("deepseek_v3", "wanda", {}, ("native", "dense"))
    yield Setting("mixtral", "fwsvd", {"keep": 0.6, "rank_multiple": 1})
    yield Setting("mixtral", "cospadi", {"keep": 0.6, "share": "experts"})


def runs(job: Job) -> Iterator[Row]:
    """A row for each setting."""
    for setting in settings():
        with tempfile.TemporaryDirectory() as scratch:
            yield _beside_cpu(job, setting, Path(scratch))


def _beside_cpu(job: Job, setting: Setting, root: Path) -> Row:
    # GPTQ's layout wants every side in multiples of 32.
    heads = {"num_key_value_heads": 4} if setting.family == "llama" else {}
    save_tiny(root / "model", setting.family, **heads)
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    expected, _ = _run(setting, root, "cpu", root / "reference")
    found, folders = _run(setting, root, str(job.device), root / "exports")
    apart = max(abs(a - b) / max(b, 1e-6) for a, b in zip(found, expected, strict=True))
    checks = [check(folder, device) for folder in folders for device in ("cpu", str(job.device))]
    worst = max(each.relative_difference for each in checks)
    told = f"errors {apart:.1e} from the CPU's; {len(checks)} verifications, logits apart by {worst:.1e}"
    is_right = all(each.relative_difference <= each.tolerance for each in checks)
    is_alternation = setting.method in LOCAL_OPTIMA
    is_near = sum(found) < LOCAL_ERROR * sum(expected) if is_alternation else apart < SAME_ERROR
    return Row("runs", f"{setting.family}, {setting.method}", told, is_near and is_right)


def _run(setting: Setting, root: Path, device: str, out: Path) -> tuple[list[float], list[Path]]:
    """Every layer's relative error, and the folders of the exports."""
    recipe = Recipe.from_mapping(
        {
            "model": str(root / "model"),
            "out": str(root / "out"),
            "calibration": [str(root / "text.txt")],
            "statistics": "off",
            "samples": 8,
            "seq_len": 32,
            "eval_windows": 0,
            "tasks": [],
            "device": device,
            "export": list(setting.exports),
            "method": {"name": setting.method, **setting.options},
        }
    )
    prepared = surveyed(prepare(recipe, no_progress), no_progress)
    folders = {name: out / name for name in setting.exports}
    for folder in folders.values():
        folder.mkdir(parents=True)
    outcome = export(with_gradients(prepared, no_progress), folders, Stopwatch(), no_progress)
    return [layer.relative_error or 0.0 for layer in outcome.layers], list(folders.values())
