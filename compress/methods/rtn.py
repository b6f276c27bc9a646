"""RTN: round every weight to the nearest point of its group's grid; the baseline of quantisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from compress.families.rounding import Rounding


@dataclass(frozen=True, kw_only=True)
class RTN(Rounding, name="rtn"):
    """Rounding to nearest, with scales searched for the least weighted error."""

    paper: ClassVar[str] = "(baseline)"
    data_free: ClassVar[bool] = True
