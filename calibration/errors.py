"""What can be wrong with the text and the model that a calibration reads."""

from __future__ import annotations


class OptionError(ValueError):
    """Something wrong with an option: `option` is its dotted path, `reason` the bad value and what would be right.

    Its text is made from the two when it is shown, so that nothing has to take a text apart.
    """

    def __init__(self, reason: str, *, option: str | None = None) -> None:
        """Without an option the reason says what is meant."""
        super().__init__(reason)
        self.reason, self.option = reason, option

    def __str__(self) -> str:
        """As in "method.bits: 7 is not supported; there are 2, 3, 4, 8"."""
        return self.reason if self.option is None else f"{self.option}: {self.reason}"


class PluginError(RuntimeError):
    """A member of another distribution or program that cannot be registered or loaded; the message names both."""


class InputError(OptionError):
    """A text source, a tokenizer or an activation that cannot be used; the message says what would do."""
