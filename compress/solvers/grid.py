"""Uniform grids and the search for their scales: half of the quality of 4-bit weights, most of it at 3 bits.

A grid of b bits has the codes 0 .. 2^b - 1 and stands for scale * (code - zero). On a symmetric grid zero is 2^(b-1),
so one side is longer by one step; a negative scale puts that longer side above zero (as auto-round does). On an affine
grid zero is a real number, -offset / scale. The search looks for the scale with the least error weighted by diag(G),
the inputs' second moments: candidates first, from the max-abs scale downwards and for both signs, then the
least-squares scale, and offset, of the codes found.

Every candidate is rounded before its error is measured, so that codes fit the scale as it is stored. Scales and
offsets have at most 8 significant bits and lie between 2^-14 and 65280: fp16, bf16 and fp32 hold each of them exactly,
whichever a file stores and a server casts to. Where zero is an integer, scales have so few bits that fp16 holds
scale * zero exactly too, up to 5 bits a code: formats with a float offset in the place of a zero store that product.

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

DIGITS = 8
"""Significant bits that fp16, bf16 and fp32 all hold."""
FP16_DIGITS, FP32_DIGITS = 11, 24
MOST_BITS_OF_PRODUCTS = 5
"""The widest codes for which scale * zero is exact in fp16; wider ones would leave a scale too few bits."""
LEAST = 2.0**-14
"""The smallest scale: below, fp16 has fewer digits, and some kernels take them for 0."""
MOST = 65280.0
"""The largest number of 8 significant bits in fp16."""


class Symmetry(enum.StrEnum):
    """Where zero lies on the grid."""

    SYMMETRIC = "symmetric"
    """At code 2^(b-1); nothing but a scale is stored for a group."""
    ASYMMETRIC = "asymmetric"
    """At any code; each group stores its zero."""
    AFFINE = "affine"
    """Anywhere between codes; each group stores the weight at code 0 as a float, its offset. Weights of exactly zero
    are not on such a grid."""


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

    @property
    def digits(self) -> int:
        """How many significant bits a scale has at most."""
        product_bits = FP16_DIGITS - self.bits
        return min(DIGITS, product_bits) if self.stores_products else DIGITS

    @property
    def stores_products(self) -> bool:
        """Whether fp16 is to hold scale * zero exactly."""
        return self.symmetry is Symmetry.ASYMMETRIC and self.bits <= MOST_BITS_OF_PRODUCTS

    def scales(self, weight_ng: Tensor, importance_g: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zeros, (n,) fp32 each, of weights (n, g); scales as they are stored, never 0.

        The zeros are integers, or on an affine grid -offset / scale, with the offset as it is stored. `importance_g`
        (g,), or (n, g), weights the squared errors. Raises LayerError if a scale or an offset is beyond 65280.
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
        refuse_beyond(scale)
        if self.symmetry is Symmetry.AFFINE:
            refuse_beyond(self.offsets(scale, zero))
        return scale, zero

    def offsets(self, scale: Tensor, zero: Tensor) -> Tensor:
        """The stored offsets of an affine grid, fp32: the weight at code 0."""
        return stored_offsets(-zero * scale)

    def codes(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Nearest codes, as fp32; the three broadcast."""
        return (weight / scale).add_(zero).round_().clamp_(0, self.top)

    def _scales(self, weight_ng: Tensor, importance_ng: Tensor) -> tuple[Tensor, Tensor]:
        scale, low = self._widest(weight_ng)
        best = _Best(self, weight_ng, importance_ng, *self.stored(scale, low))
        if self.search is ScaleSearch.MAX_ABS:
            return best.scale, best.zero
        shares = [LOWEST_SHARE[self.bits] ** (k / (N_SHARES - 1)) for k in range(N_SHARES)]
        for share in shares[1:]:
            best.offer(*self.stored(scale * share, low * share))
        if self.symmetry is Symmetry.SYMMETRIC:
            # The other sign: the extreme falls on the short side, which reaches one step less far.
            mirrored = -scale * (self.middle / max(self.middle - 1, 1))
            for share in shares:
                best.offer(*self.stored(mirrored * share, low))
        for _ in range(N_REFINEMENTS):
            best.offer(*best.least_squares())
        return best.scale, best.zero

    def stored(self, scale: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        """Scales as they are stored, and zeros, where code 0 is to be the weight `low`; a symmetric grid settles that.

        A group of zeros gets the scale 1: its codes are all the zero point.
        """
        scale = stored_scales(torch.where(scale == 0, torch.ones_like(scale), scale), self.digits)
        if self.symmetry is Symmetry.SYMMETRIC:
            return scale, torch.full_like(scale, self.middle)
        if self.symmetry is Symmetry.AFFINE:
            return scale, -stored_offsets(low) / scale
        return scale, (-low / scale).round_().clamp_(0, self.top)

    def _widest(self, weight_ng: Tensor) -> tuple[Tensor, Tensor]:
        """The scale that clips nothing, and the weight at code 0."""
        if self.symmetry is Symmetry.SYMMETRIC:
            extreme = weight_ng.gather(1, weight_ng.abs().argmax(1, keepdim=True)).squeeze(1)
            if self.search is ScaleSearch.MAX_ABS:
                scale = extreme.abs() / max(self.middle - 1, 1)
            else:
                scale = -extreme / self.middle
            return scale, extreme
        low, high = weight_ng.amin(1).clamp_max(0), weight_ng.amax(1).clamp_min(0)
        return (high - low) / self.top, low


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
        error = self._error(scale, zero)
        better = error < self.error
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)
        self.error = torch.where(better, error, self.error)

    def least_squares(self) -> tuple[Tensor, Tensor]:
        """Scale and zero that fit the best codes so far with the least weighted error, as they are stored."""
        codes = self.grid.codes(self.weight, self.scale[:, None], self.zero[:, None])
        if self.grid.symmetry is Symmetry.AFFINE:
            return self._line(codes)
        steps = codes - self.zero[:, None]
        fitted = self._slope(steps, self.weight)
        return stored_scales(fitted, self.grid.digits), self.zero

    def _line(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """The line through weights over codes: slope and offset, the latter for the former as it is stored."""
        total = self.importance.sum(1)
        mean_code = (self.importance * codes).sum(1) / total
        mean_weight = (self.importance * self.weight).sum(1) / total
        slope = self._slope(codes - mean_code[:, None], self.weight - mean_weight[:, None])
        scale = stored_scales(slope, self.grid.digits)
        return self.grid.stored(scale, mean_weight - scale * mean_code)

    def _slope(self, steps: Tensor, weight: Tensor) -> Tensor:
        """The scale for which scale * steps is closest to the weight; the best so far where no step is taken."""
        weighted = steps * self.importance
        norm = (weighted * steps).sum(1)
        fitted = (weighted * weight).sum(1) / norm.clamp_min(1e-30)
        return torch.where((norm > 0) & (fitted != 0), fitted, self.scale)

    def _error(self, scale: Tensor, zero: Tensor) -> Tensor:
        steps = self.grid.codes(self.weight, scale[:, None], zero[:, None]).sub_(zero[:, None])
        error = steps.mul_(scale[:, None]).sub_(self.weight)
        return error.square_().mul_(self.importance).sum(1)


def stored_scales(scale: Tensor, digits: int) -> Tensor:
    """Scales rounded to so many significant bits, and to 2^-14 with their sign where they are smaller; fp32."""
    rounded = _rounded(scale, digits)
    return torch.where(
        rounded.abs() < LEAST, torch.full_like(rounded, LEAST).copysign(scale), rounded
    )


def stored_offsets(offset: Tensor) -> Tensor:
    """Offsets rounded to 8 significant bits, and where they are smaller than 2^-14 to that or to 0; fp32."""
    rounded = _rounded(offset, DIGITS)
    small = (offset / LEAST).round() * LEAST
    return torch.where(rounded.abs() < LEAST, small, rounded)


def _rounded(values: Tensor, digits: int) -> Tensor:
    """Values (fp32) to so many significant bits: Veltkamp's splitting, whose high part is the nearest such number."""
    product = values * float((1 << (FP32_DIGITS - digits)) + 1)
    return product + (values - product)


def refuse_beyond(values: Tensor) -> None:
    """Raises LayerError for a scale or an offset that fp16 and bf16 do not both hold."""
    if not bool((values.abs() <= MOST).all()):
        raise LayerError(
            f"a quantisation scale or offset of {float(values.abs().max()):.3g} is beyond 65280, the largest that "
            "fp16 and bf16 both hold: the weight has an extreme or a NaN; --exclude the layer"
        )
