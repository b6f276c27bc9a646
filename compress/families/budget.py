"""Bytes as people write them (120MB, 5%), and what `--keep` and `--budget` leave for the layers to be compressed."""

from __future__ import annotations

import re
from collections.abc import Mapping

from compress.errors import RecipeError
from compress.families.base import LayerShape

KEEP = 0.8
"""Default of --keep."""
UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}
_KNOWN = "B, kB, MB, GB, TB, KiB, MiB, GiB, TiB"


def parse_bytes(text: str, option: str) -> int:
    """The number of bytes that `120MB`, `1.5 GiB` or `4096` says. Raises RecipeError naming the option."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].lower() not in UNITS:
        raise RecipeError(
            f"{text!r} is not an amount of bytes; write 120MB, 1.5GiB or 4096 (units: {_KNOWN})",
            option=option,
        )
    return int(float(match[1]) * UNITS[match[2].lower()])


def parse_share_or_bytes(text: str, whole: int, option: str, of: str) -> int:
    """The number of bytes that `20MB` says, or `5%` of `whole`, which `of` names.

    Raises RecipeError naming the option, also for more than 100%.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if match and float(match[1]) > 100:
        raise RecipeError(
            f"{text} is more than 100% of {of} bytes; give at most 100%, or bytes (20MB)",
            option=option,
        )
    if match:
        return int(float(match[1]) / 100 * whole)
    try:
        return parse_bytes(text, option)
    except RecipeError as error:
        raise RecipeError(f"{error.reason}, or 5% of {of}", option=option) from error


def refuse_keep(keep: float | None) -> None:
    """Raises RecipeError for a share of bytes to keep that is not between 0 and 1; None is none given."""
    if keep is not None and not 0 < keep < 1:
        raise RecipeError(f"must be between 0 and 1 (e.g. {KEEP}), got {keep}", option="keep")


def layer_budget(
    keep: float, budget: str | None, layers: Mapping[str, LayerShape], rest_bytes: int
) -> int:
    """The bytes that these layers may take together: the share `keep` of what they take, or what `budget` leaves.

    `budget` is for the whole checkpoint, which holds `rest_bytes` besides these layers. Raises RecipeError for a budget
    below the rest, or one that needs no compression.
    """
    before = sum(layer.n_bytes for layer in layers.values())
    if budget is None:
        return int(keep * before)
    whole = parse_bytes(budget, "budget")
    if not rest_bytes < whole < before + rest_bytes:
        raise RecipeError(
            f"{whole} bytes for the whole checkpoint, which takes {before + rest_bytes} now, "
            f"{rest_bytes} of them outside the layers to be compressed; give a number between these two",
            option="budget",
        )
    return whole - rest_bytes
