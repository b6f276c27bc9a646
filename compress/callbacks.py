"""What callers are told while they wait."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with a stage, the units done and the units there are."""


def no_progress(stage: str, done: int, total: int) -> None:
    """Tells nobody."""


Warn = Callable[[str], None]
"""Called with a sentence on what a run will not do."""


def no_warning(warning: str) -> None:
    """Tells nobody."""
