"""What `--keep` and `--budget` leave for the layers that are compressed."""

from __future__ import annotations

from collections.abc import Mapping

from compress.errors import RecipeError
from compress.families.base import LayerShape
from compress.families.quantities import parse_bytes


def refuse_share(keep: float) -> None:
    """Raises RecipeError for what is no share of bytes that is kept."""
    if not 0 < keep < 1:
        raise RecipeError(
            f"{keep} is no share of the bytes that is kept; above 0 and below 1, 0.8 say",
            option="keep",
        )


def layer_budget(
    keep: float, budget: str | None, layers: Mapping[str, LayerShape], rest_bytes: int
) -> int:
    """Bytes for these layers together: a share of theirs, or a checkpoint's without what else is in it.

    Raises RecipeError for a budget that is less than that rest, or needs no compression.
    """
    before = sum(layer.n_bytes for layer in layers.values())
    if budget is None:
        return int(keep * before)
    whole = parse_bytes(budget, "budget")
    if not rest_bytes < whole < before + rest_bytes:
        raise RecipeError(
            f"{whole} bytes for the whole checkpoint, which takes {before + rest_bytes} now, "
            f"{rest_bytes} of them outside the layers to be compressed; give something between",
            option="budget",
        )
    return whole - rest_bytes
