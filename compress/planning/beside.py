"""Linear layers of towers that stand beside the language model: chosen by name only, and compressed without inputs."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from calibration.layers import is_linear
from calibration.skeleton import PartLoader, decoder_blocks
from compress.errors import RecipeError
from compress.families.base import METHODS, Compressor
from compress.models.names import matches

NOTE = "compressed without inputs: the error is of the weight itself"

Patterns = tuple[tuple[str, ...], tuple[str, ...]]
"""Those to include and those to exclude."""


def linears_beside(loader: PartLoader) -> dict[str, nn.Module]:
    """The linear layers outside the decoder blocks by name, the head apart; of a model of several parts."""
    model, (prefix, _) = loader.model, decoder_blocks(loader.model)
    if model.config.get_text_config(decoder=True) is model.config:
        return {}
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if not name.startswith(f"{prefix}.") and module is not head and is_linear(module)
    }


def chosen_beside(
    loader: PartLoader, linears: Collection[str], patterns: Patterns
) -> tuple[dict[str, nn.Module], Patterns]:
    """Layers of towers that patterns choose, and the patterns that are about the decoder blocks.

    Only a pattern of `include` that matches no layer of the blocks, `linears`, is about towers.
    """
    include, exclude = patterns
    others = [pattern for pattern in include if not _any(linears, pattern)]
    beside = linears_beside(loader) if others else {}
    others = [pattern for pattern in others if _any(beside, pattern)]
    chosen = {
        name: module
        for name, module in beside.items()
        if any(matches(name, pattern) for pattern in others)
        and not any(matches(name, pattern) for pattern in exclude)
    }
    about_blocks = tuple(
        tuple(p for p in given if p not in others and (_any(linears, p) or not _any(chosen, p)))
        for given in patterns
    )
    return chosen, (about_blocks[0], about_blocks[1])


def refuse_tables(loader: PartLoader, linears: Collection[str], patterns: Patterns) -> None:
    """Raises RecipeError for a pattern that is about the embeddings or the head alone: options of their own say it."""
    model = loader.model
    names = {id(module): name for name, module in model.named_modules()}
    tables = (
        ("head", model.get_output_embeddings()),
        ("embeddings", model.get_input_embeddings()),
    )
    for option, given in zip(("include", "exclude"), patterns, strict=True):
        for pattern in given:
            for table, module in tables:
                name = names.get(id(module), "")
                if name and matches(name, pattern) and not _any(linears, pattern):
                    raise RecipeError(
                        f"{pattern!r} matches {name}, which is not chosen by name: --{table} says how it is stored, in "
                        "bits (8, 4, ...), a dtype, or as-is",
                        option=option,
                    )


def _any(names: Collection[str], pattern: str) -> bool:
    return any(matches(name, pattern) for name in names)


def refuse_inputs(beside: Sequence[str], method: Compressor) -> None:
    """Raises RecipeError if layers of towers are to be compressed by a method that reads inputs or surveys."""
    if not beside or (method.data_free and method.surveys is None):
        return
    fit = ", ".join(name for name, kind in sorted(METHODS.items()) if kind.data_free)
    raise RecipeError(
        f"{len(beside)} layers such as {beside[0]} are not of the language model, and calibration text does not reach "
        f"them; {method.name} needs their inputs: choose a method that reads the weights alone ({fit}, without a "
        "survey), or leave them out",
        option="include",
    )
