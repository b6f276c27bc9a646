"""Which entries of a line stay: the largest."""

from __future__ import annotations

import enum

import torch
from torch import Tensor


class Pattern(enum.StrEnum):
    """Which entries of a line may be nonzero."""

    FREE = "free"
    """Any, of a given number."""
    TWO_OF_FOUR = "2:4"
    """Two of every four in a row, which sparse tensor cores read."""


def largest(values_nk: Tensor, s: int, pattern: Pattern) -> Tensor:
    """Where the s largest magnitudes of each line are, or the two of every four: (n, k), bool; exactly as many."""
    n, k = values_nk.shape
    if pattern is Pattern.TWO_OF_FOUR:
        values_nk, s = values_nk.reshape(-1, 4), 2
    places = values_nk.abs().topk(s, dim=1, sorted=False).indices
    mask = torch.zeros(values_nk.shape, dtype=torch.bool, device=values_nk.device)
    return mask.scatter_(1, places, value=True).view(n, k)


def largest_entries(values_nk: Tensor, s: int, pattern: Pattern, out: Tensor) -> Tensor:
    """Into `out` (n, k), whose lines are contiguous: the entries that `largest` chooses, zeros elsewhere."""
    fours = pattern is Pattern.TWO_OF_FOUR
    values, kept, s = (values_nk.view(-1, 4), out.view(-1, 4), 2) if fours else (values_nk, out, s)
    places = values.abs().topk(s, dim=1, sorted=False).indices
    kept.zero_().scatter_(1, places, values.gather(1, places))
    return out
