"""Calibration sequences that are kept aside: what was fitted without them is judged by them.

Shapes: b = sequences of a batch, t = tokens, i = input features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from calibration.stats import Gram, Statistic, Statistics, second_moments

if TYPE_CHECKING:
    from calibration.text.data import Tokens

EVERY = 8
"""One of so many sequences is kept aside."""


@dataclass(frozen=True)
class HeldOut(Statistic):
    """The part of the Gram that comes from the sequences kept aside: sum over their tokens of x x^T."""

    name: ClassVar[str] = "held_out"
    sum_ii: Tensor

    @classmethod
    def of(cls, x_ti: Tensor, n_sequences: int) -> Self:
        """Of tokens that are kept aside: (t, i) -> (i, i), fp64."""
        return cls(n_tokens=x_ti.shape[0], n_sequences=n_sequences, sum_ii=second_moments(x_ti))

    def mean_ii(self) -> Tensor:
        """E[x x^T] per token: (i, i), fp64."""
        return self.sum_ii / max(self.n_tokens, 1)


def kept_aside(tokens: Tokens, n_before: int) -> Tensor:
    """Which tokens of a batch are of sequences that are kept aside, the last of every eight: (b, t) bool.

    `n_before`: sequences in the batches before it.
    """
    b, t = tokens.input_ids.shape
    chosen = torch.arange(n_before + 1, n_before + b + 1) % EVERY == 0
    aside = chosen[:, None].expand(b, t)
    return aside if tokens.attention_mask is None else aside & tokens.attention_mask.bool().cpu()


def without_held_out(stats: Statistics) -> Statistics:
    """These with the Gram of the rest, for sums can be taken apart again; themselves if nothing is kept aside."""
    if HeldOut not in stats:
        return stats
    whole, aside = stats[Gram], stats[HeldOut]
    rest = Gram(
        n_tokens=whole.n_tokens - aside.n_tokens,
        n_sequences=whole.n_sequences - aside.n_sequences,
        sum_ii=whole.sum_ii - aside.sum_ii,
    )
    parted = Statistics(stats)
    parted[Gram] = rest
    del parted[HeldOut]
    return parted
