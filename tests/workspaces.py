"""A folder as a user has it: a tiny model, a text, and a quick recipe for them."""

from pathlib import Path

from families import save_tiny

from compress.config.recipe import Recipe
from compress.methods.eora import EoRA
from compress.methods.gptq import GPTQ

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
        "method": EoRA(rank=4, base=GPTQ(group_size=32)),
    }
    return Recipe(**{**options, **changes})
