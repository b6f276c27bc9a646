"""How methods are told apart on plots: by colour and by shape, so that either is enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compress.report.pages.theme import Palette

SHAPES = (
    "M-1,0a1,1,0,1,1,2,0a1,1,0,1,1,-2,0Z",  # disc
    "M-.87,-.87H.87V.87H-.87Z",  # square
    "M0,-1.1L1.1,.8H-1.1Z",  # triangle
    "M0,-1.2L1.2,0L0,1.2L-1.2,0Z",  # diamond
    "M-.38,-1.1H.38V-.38H1.1V.38H.38V1.1H-.38V.38H-1.1V-.38H-.38Z",  # plus
    "M0,1.1L1.1,-.8H-1.1Z",  # triangle on its tip
    "M-1.05,-.55L-.55,-1.05L0,-.5L.55,-1.05L1.05,-.55L.5,0L1.05,.55L.55,1.05L0,.5L-.55,1.05L-1.05,.55L-.5,0Z",  # x
    "M0,-1.15L1.09,-.36L.68,.93H-.68L-1.09,-.36Z",  # pentagon
)
"""SVG paths around the origin, about as large as each other. One more than there are colours, so that pairs of the two
repeat late.
"""


@dataclass(frozen=True)
class Mark:
    """Colour and shape of the runs of one method."""

    method: str
    color: str
    shape: str


def marks_of(methods: Sequence[str], palette: Palette) -> dict[str, Mark]:
    """Marks by method, in the order in which methods first appear."""
    return {
        method: Mark(method, palette.series[k % len(palette.series)], SHAPES[k % len(SHAPES)])
        for k, method in enumerate(dict.fromkeys(methods))
    }
