"""Values that options of a recipe choose from, where nothing below the recipe asks for them."""

from enum import StrEnum


class StatisticsMode(StrEnum):
    """Whether statistics that a run on equal model, text and settings saved are used again."""

    REUSE = "reuse"
    OFF = "off"


class OnFailure(StrEnum):
    """What happens to a layer whose compression fails."""

    RAISE = "raise"
    KEEP = "keep"
