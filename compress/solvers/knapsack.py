"""One choice for each layer so that the losses are least and the bytes fit: the multiple-choice knapsack, exactly.

Dynamic programming over bytes (Dudzinski and Walukiewicz 1987, doi:10.1016/0377-2217(87)90165-2). Bytes are counted in
their greatest common divisor where that leaves at most `MAX_UNITS` of them, which is exact; else in coarser units,
rounded up, so that a plan still fits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_UNITS = 1 << 16


class BudgetError(ValueError):
    """A budget that does not pay for the smallest choices."""

    def __init__(self, least: int, budget: int) -> None:
        """Bytes that they take, and bytes that there are."""
        super().__init__(f"the smallest choices take {least} bytes, the budget is {budget}")
        self.least, self.budget = least, budget


@dataclass(frozen=True)
class Choice:
    """What a layer may become: what it takes and what it loses."""

    n_bytes: int
    loss: float


def knapsack(choices: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    """For each layer the index of its choice; together within `budget` bytes, with the least sum of losses.

    Ties go to fewer bytes. Raises BudgetError if even the smallest choices do not fit.
    """
    least = [min(choice.n_bytes for choice in options) for options in choices]
    room = budget - sum(least)
    if room < 0:
        raise BudgetError(sum(least), budget)
    extras = [
        [c.n_bytes - low for c in options] for options, low in zip(choices, least, strict=True)
    ]
    unit = _unit(extras, room)
    n_units = room // unit
    best = np.zeros(n_units + 1)  # least loss within so many units; index 0 is no room at all
    picks = []
    for options, extra in zip(choices, extras, strict=True):
        best, pick = _with_layer(best, options, [-(-e // unit) for e in extra])
        picks.append(pick)
    return _trace(picks, extras, unit, n_units)


def _unit(extras: Sequence[Sequence[int]], room: int) -> int:
    divisor = math.gcd(*(extra for options in extras for extra in options)) or 1
    return max(divisor, -(-room // MAX_UNITS))


def _with_layer(
    best: np.ndarray, options: Sequence[Choice], costs: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """The least loss within every number of units once this layer has chosen, and what it chose."""
    total = np.full_like(best, np.inf)
    pick = np.zeros(len(best), dtype=np.int32)
    for index in sorted(range(len(options)), key=lambda k: costs[k]):
        cost = costs[index]
        if cost >= len(best):
            continue
        candidate = best[: len(best) - cost] + options[index].loss
        better = candidate < total[cost:]
        total[cost:][better] = candidate[better]
        pick[cost:][better] = index
    return total, pick


def _trace(
    picks: Sequence[np.ndarray], extras: Sequence[Sequence[int]], unit: int, left: int
) -> list[int]:
    chosen = []
    for pick, extra in zip(reversed(picks), reversed(extras), strict=True):
        index = int(pick[left])
        chosen.append(index)
        left -= -(-extra[index] // unit)
    return chosen[::-1]
