"""Files that a command writes where it is told: refused before any work, then written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from compress.errors import RecipeError


@dataclass(frozen=True)
class Written:
    """What a command writes, and how it is known again."""

    what: str
    """In words: "html file"."""
    command: str
    """"compress report"."""
    is_ours: Callable[[str], bool]
    """Whether a text was written by the command."""


def refuse_place(option: str, out: Path, written: Written) -> None:
    """Only what the same command wrote is replaced, for that can be made again.

    Raises RecipeError naming the option: there is no such folder, it takes no files, or another's file is in the way.
    """
    folder = out.absolute().parent
    if not folder.is_dir():
        raise RecipeError(f"{option}: {out.parent} is no folder; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RecipeError(f"{option}: {out.parent} is not writable; choose another folder")
    if not out.exists():
        return
    try:
        ours = out.is_file() and written.is_ours(out.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        ours = False
    if not ours:
        raise RecipeError(
            f"{option}: {out} is there and is no {written.what} that `{written.command}` wrote; name another, or move "
            "it away"
        )


def write_whole(out: Path, text: str) -> None:
    """The whole file or none: what was there is replaced at the end. Raises OSError if it cannot be written."""
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
