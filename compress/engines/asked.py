"""The engines that a run is asked to try: refused before work where they can't be."""

from __future__ import annotations

from collections.abc import Sequence

from compress.engines.base import ENGINES
from compress.engines.running import environment, interpreter
from compress.errors import RecipeError
from compress.exports.base import EXPORTS

AUTO = ("auto",)
"""All that a format is for, where they are installed."""


def engines_among(asked: Sequence[str], export: str) -> tuple[str, ...]:
    """The engines to try for an export format of a run that was asked for some, or for `auto`."""
    known = EXPORTS[export].traits.engines
    return known if tuple(asked) == AUTO else tuple(name for name in asked if name in known)


def refuse_engines(asked: Sequence[str], exports: Sequence[str]) -> None:
    """Raises RecipeError for an engine that there is not, that no export is for, or that is not installed."""
    if tuple(asked) == AUTO:
        return
    for name in asked:
        if name not in ENGINES:
            raise RecipeError(
                f"unknown engine {name!r}; there are {', '.join(ENGINES)}, auto and none",
                option="engines",
            )
        fitting = [it for it in exports if name in EXPORTS[it].traits.engines]
        if not fitting:
            others = [it for it, kind in EXPORTS.items() if name in kind.traits.engines]
            raise RecipeError(
                f"{name} loads none of the exports {', '.join(exports)}; it loads {', '.join(others) or 'none'}",
                option="engines",
            )
        engine = ENGINES[name]
        modules = (engine.module, *engine.stand_ins)
        if all(interpreter(name, (module,)) is None for module in modules):
            raise RecipeError(
                f"{name} is not installed; install {' '.join(engine.requirements)} here or in a virtual environment "
                f"{environment(name)}, or leave it out",
                option="engines",
            )
