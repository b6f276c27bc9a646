"""Uniform grids and the search for their scales: half of the quality of 4-bit weights, most of it at 3 bits.

A grid of b bits has the codes 0 .. 2^b - 1 and stands for scale * (code - zero). On a symmetric grid zero is 2^(b-1),
so one side is longer by one step; a negative scale puts that longer side above zero (as auto-round does). The search
looks for the scale with the least error weighted by diag(G), the inputs' second moments: candidates first, from the
max-abs scale downwards and for both signs, then the least-squares scale of the codes found.

Shapes: n = weights that get a scale each (rows, or rows x groups), g = entries of a group.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import LayerError

CHUNK_ENTRIES = 1 << 18
"""Entries searched at a time: small enough to stay in a core's cache."""

LOWEST_SHARE = {2: 0.15, 3: 0.25, 4: 0.4, 5: 0.55, 6: 0.7, 8: 0.9}
"""The smallest share of the max-abs scale that is tried. The fewer the codes, the more clipping pays; where one input
channel outweighs the others, as massive activations do, it pays more still."""

N_SHARES = 14
N_REFINEMENTS = 2


class Symmetry(enum.StrEnum):
    """Where zero lies on the grid."""

    SYMMETRIC = "symmetric"
    """At code 2^(b-1); nothing but a scale is stored for a group."""
    ASYMMETRIC = "asymmetric"
    """Anywhere; each group stores its zero."""


class ScaleSearch(enum.StrEnum):
    """How a group's scale is found."""

    SEARCH = "search"
    """Least error weighted by diag(G)."""
    MAX_ABS = "max_abs"
    """The smallest scale that clips nothing, as most tools do."""


@dataclass(frozen=True)
class Grid:
    """A width, a symmetry, and a way to find scales."""

    bits: int
    symmetry: Symmetry
    search: ScaleSearch

    @property
    def middle(self) -> int:
        """The zero of a symmetric grid."""
        return 1 << (self.bits - 1)

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def scales(self, weight_ng: Tensor, importance_g: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zeros, (n,) fp32 each, of weights (n, g); the scales are exact fp16 values, never 0.

        `importance_g` (g,), or (n, g), weights the squared errors. Raises LayerError if a scale leaves fp16.
        """
        pieces = [
            self._scales(w, h.expand_as(w).float() + 1e-12)
            for w, h in zip(
                weight_ng.split(max(1, CHUNK_ENTRIES // weight_ng.shape[1])),
                importance_g.expand_as(weight_ng).split(
                    max(1, CHUNK_ENTRIES // weight_ng.shape[1])
                ),
                strict=True,
            )
        ]
        scale, zero = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        return to_fp16_values(scale), zero

    def codes(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Nearest codes, as fp32; the three broadcast."""
        return (weight / scale).add_(zero).round_().clamp_(0, self.top)

    def _scales(self, weight_ng: Tensor, importance_ng: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero = self._widest(weight_ng)
        if self.search is ScaleSearch.MAX_ABS:
            return scale, zero
        best = _Best(self, weight_ng, importance_ng, scale, zero)
        shares = [LOWEST_SHARE[self.bits] ** (k / (N_SHARES - 1)) for k in range(N_SHARES)]
        for share in shares[1:]:
            best.offer(*self._shrunk(weight_ng, scale, share))
        if self.symmetry is Symmetry.SYMMETRIC:
            # The other sign: the extreme falls on the short side, which reaches one step less far.
            mirrored = -scale * (self.middle / max(self.middle - 1, 1))
            for share in shares:
                best.offer(*self._shrunk(weight_ng, mirrored, share))
        for _ in range(N_REFINEMENTS):
            best.offer(best.least_squares(), best.zero)
        return best.scale, best.zero

    def _widest(self, weight_ng: Tensor) -> tuple[Tensor, Tensor]:
        """The scale that clips nothing, and its zero."""
        if self.symmetry is Symmetry.SYMMETRIC:
            extreme = weight_ng.gather(1, weight_ng.abs().argmax(1, keepdim=True)).squeeze(1)
            if self.search is ScaleSearch.MAX_ABS:
                scale = extreme.abs() / max(self.middle - 1, 1)
            else:
                scale = -extreme / self.middle
            return _never_zero(scale), torch.full_like(scale, self.middle)
        low, high = weight_ng.amin(1).clamp_max(0), weight_ng.amax(1).clamp_min(0)
        scale = _never_zero((high - low) / self.top)
        return scale, (-low / scale).round_().clamp_(0, self.top)

    def _shrunk(self, weight_ng: Tensor, scale: Tensor, share: float) -> tuple[Tensor, Tensor]:
        if self.symmetry is Symmetry.SYMMETRIC:
            return scale * share, torch.full_like(scale, self.middle)
        low = weight_ng.amin(1).clamp_max(0)
        smaller = scale * share
        return smaller, (-low * share / smaller).round_().clamp_(0, self.top)


class _Best:
    """The best scale so far of every row, and the codes it gives."""

    def __init__(
        self, grid: Grid, weight_ng: Tensor, importance_ng: Tensor, scale: Tensor, zero: Tensor
    ) -> None:
        self.grid, self.weight, self.importance = grid, weight_ng, importance_ng
        self.scale, self.zero = scale.clone(), zero.clone()
        self.error = self._error(scale, zero)

    def offer(self, scale: Tensor, zero: Tensor) -> None:
        """Take these where they are better."""
        scale = _never_zero(scale)
        error = self._error(scale, zero)
        better = error < self.error
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)
        self.error = torch.where(better, error, self.error)

    def least_squares(self) -> Tensor:
        """The scale that fits the best codes so far with the least weighted error."""
        steps = (
            self.grid.codes(self.weight, self.scale[:, None], self.zero[:, None])
            - self.zero[:, None]
        )
        weighted = steps * self.importance
        norm = (weighted * steps).sum(1)
        return torch.where(
            norm > 0, (weighted * self.weight).sum(1) / norm.clamp_min(1e-30), self.scale
        )

    def _error(self, scale: Tensor, zero: Tensor) -> Tensor:
        steps = self.grid.codes(self.weight, scale[:, None], zero[:, None]).sub_(zero[:, None])
        error = steps.mul_(scale[:, None]).sub_(self.weight)
        return error.square_().mul_(self.importance).sum(1)


def _never_zero(scale: Tensor) -> Tensor:
    """A group of zeros gets the scale 1: its codes are all the zero point."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


TINY = 2.0**-24
"""The smallest fp16 above zero."""


def to_fp16_values(scale: Tensor) -> Tensor:
    """Scales rounded to what fp16 can store, as fp32, never 0. Raises LayerError beyond fp16."""
    rounded = scale.to(torch.float16).float()
    if not bool(torch.isfinite(rounded).all()):
        raise LayerError(
            f"a quantisation scale of {float(scale.abs().max()):.3g} does not fit fp16 (65504): "
            "the weight has an extreme or a NaN; --exclude the layer"
        )
    return torch.where(rounded == 0, torch.full_like(rounded, TINY).copysign(scale), rounded)
