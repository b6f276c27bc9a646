"""The choice of a run's subject, by the recipe alone, before a model is resolved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from compress.config.recipe import Recipe
from compress.errors import RecipeError
from compress.exports import Use
from compress.subjects.checks import checked, open_named
from compress.subjects.ordinary import OrdinaryModel
from compress.subjects.subject import Original, Subject


class Opening(ABC):
    """A subject that has still to be opened."""

    use: ClassVar[Use]
    """The kind of run, which decides what export formats it can write."""

    @abstractmethod
    def refuse_wordless(self) -> None:
        """Raises RecipeError if the subject cannot be a model that does not write text."""

    @property
    @abstractmethod
    def never_written(self) -> Path | None:
        """A folder that nothing is written to; None if there is none."""

    @abstractmethod
    def open(self) -> Callable[[Original], Subject]:
        """Open what the recipe names beside the model; what is returned takes the model. Raises CheckpointError."""


@dataclass(frozen=True)
class _Model(Opening):
    """The model that the recipe names."""

    use = Use.MODEL

    @property
    def never_written(self) -> Path | None:
        """None: an output may lie in the folder of a model."""
        return None

    def refuse_wordless(self) -> None:
        """Every kind of model can be compressed."""

    def open(self) -> Callable[[Original], Subject]:
        """Nothing but the model is needed."""
        return lambda original: OrdinaryModel(original=original)


@dataclass(frozen=True)
class _Checkpoint(Opening):
    """A compressed checkpoint of that model."""

    spec: str
    """The value of the option base_checkpoint."""
    use = Use.ON_BASE

    def refuse_wordless(self) -> None:
        """Raises RecipeError: adapters are for causal language models."""
        raise RecipeError(
            "only checkpoints of models that write text are corrected; compress this one with a "
            "correction of a method (--method eora --base rtn)",
            option="base_checkpoint",
        )

    @property
    def never_written(self) -> Path | None:
        """The checkpoint, if it is a folder."""
        folder = Path(self.spec).expanduser().resolve()
        return folder if folder.is_dir() else None

    def open(self) -> Callable[[Original], Subject]:
        """The checkpoint, which is checked against the model."""
        return partial(checked, open_named(self.spec))


def opening(recipe: Recipe) -> Opening:
    """The subject that a recipe names."""
    return _Model() if recipe.base_checkpoint is None else _Checkpoint(recipe.base_checkpoint)
