"""The best low-rank correction for a weight, or for what another method left of it, in a metric.

Shapes: o = out_features, i = in_features, r = rank.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

import torch
from torch import Tensor

from calibration.statistics.collection import Statistics
from calibration.statistics.gram import Gram
from calibration.statistics.mean import Mean
from compress.errors import RecipeError
from compress.families.quantiser import Quantiser
from compress.forms.base import Form
from compress.forms.low_rank import LowRank
from compress.forms.product import Product
from compress.solvers.linalg import (
    balanced,
    cholesky,
    refit_up,
    to_storage,
    whitened_spectrum,
    whitened_svd,
)

WORD_BYTES = 4

Factors = LowRank | Product
"""B A, in floats or with both factors on grids."""

FLOATS = ("float32", "bfloat16", "float16")
Dtype = TypeVar("Dtype", bound=enum.StrEnum)


class FactorDtype(enum.StrEnum):
    """The dtype of stored factors."""

    AUTO = "auto"
    """The dtype of the weight, so that a share of the bytes is a share of the parameters."""
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def settled_dtype(asked: Dtype, stored: torch.dtype, option: str) -> Dtype:
    """The dtype that `auto` stands for beside a weight of a dtype; any other as it was asked for.

    Raises RecipeError naming the option where a weight's dtype is no float.
    """
    if asked != "auto":
        return asked
    name = str(stored).removeprefix("torch.")
    if name not in FLOATS:
        raise RecipeError(
            f"auto would store factors in {name}, as the weights are, and it is no float; give bfloat16",
            option=option,
        )
    return type(asked)(name)


@dataclass(frozen=True)
class Metric:
    """The cost of an error E (o, i): trace(C E G E^T) = ||K^T E L||_F^2 with L L^T = G (i, i), K K^T = C (o, o), fp64.

    The right side is made once for all weights that read the same input; without a left side, C is I. Sides are kept as
    their factors alone: the Gram matrix of 11,008 inputs is another GB.
    """

    chol_ii: Tensor
    """The Cholesky factor L, lower triangular."""
    left_oo: Tensor | None = None
    """The Cholesky factor K, lower triangular; None for I."""

    @classmethod
    def of(cls, gram_ii: Tensor) -> Self:
        """The metric of a positive definite Gram matrix. Raises LayerError if it is not."""
        return cls(cholesky(gram_ii))

    @classmethod
    def diagonal(cls, root_i: Tensor) -> Self:
        """The metric ||E diag(s)||_F^2, for positive s (i,)."""
        return cls(root_i.double().diag())

    @classmethod
    def identity(cls, n_inputs: int, device: torch.device) -> Self:
        """The metric ||E||_F^2, which ignores the inputs."""
        return cls.diagonal(torch.ones(n_inputs, dtype=torch.float64, device=device))

    def from_left(self, matrix_oi: Tensor) -> Tensor:
        """The product K^T M."""
        matrix = matrix_oi.double()
        return matrix if self.left_oo is None else self.left_oo.T @ matrix

    def energy(self, matrix_oi: Tensor) -> float:
        """The cost of a matrix, ||K^T M L||_F^2."""
        return float((self.from_left(matrix_oi) @ self.chol_ii).square().sum())

    def spectrum(self, matrix_oi: Tensor) -> Tensor:
        """Singular values of K^T M L, descending: the square of what rank r loses is the sum of [r:]^2."""
        return whitened_spectrum(self.from_left(matrix_oi), self.chol_ii)

    def truncated(self, matrix_oi: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The best factors, exactly: (o, r) and (r, i), fp64."""
        up, down, _ = whitened_svd(self.from_left(matrix_oi), self.chol_ii, rank)
        if self.left_oo is not None:
            up = torch.linalg.solve_triangular(self.left_oo.T, up, upper=True)
        return up, down


def best_low_rank(matrix_oi: Tensor, metric: Metric, rank: int, storage: torch.dtype) -> LowRank:
    """The rank-r correction that loses least of a matrix (o, i) in a metric, as it is stored.

    The factors are balanced before they are rounded to `storage`; what rounding A to 16 bits costs, B takes back in
    closed form (the left side of the metric makes no difference to that). Rounding to 32 costs nothing.
    Raises LayerError if a factor overflows.
    """
    up, down = balanced(*metric.truncated(matrix_oi, rank))
    stored_down = to_storage(down, storage)
    if storage.itemsize < WORD_BYTES:
        up = refit_up(matrix_oi, stored_down, metric.chol_ii)
    return LowRank.from_factors(to_storage(up, storage), stored_down)


def quantised_low_rank(
    matrix_oi: Tensor, metric: Metric, rank: int, quantiser: Quantiser, stats: Statistics
) -> Product:
    """The same correction with both factors on a grid: A first, then B fitted to A as stored, then B rounded.

    It is made once more with the best A for B as stored, B^+ M, and kept if that loses less.

    The columns of B have one length, so that each group of a row of B holds numbers of one size; a row of A has its own
    scales anyway. That length is the mean one of A's rows, so that the scales of neither, fp16, get small. B's inputs
    are A x: their Gram matrix is A G A^T.
    """
    up, down = metric.truncated(matrix_oi, rank)
    down = down * up.norm(dim=0)[:, None]
    length = down.norm(dim=1).mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    first = _rounded(matrix_oi, down / length, metric, quantiser, stats)
    again = torch.linalg.pinv(first.up.dense().double()) @ matrix_oi.double()
    second = _rounded(matrix_oi, again, metric, quantiser, stats)
    return min(
        first, second, key=lambda correction: metric.energy(matrix_oi - correction.dense().double())
    )


def _rounded(
    matrix_oi: Tensor, down_ri: Tensor, metric: Metric, quantiser: Quantiser, stats: Statistics
) -> Product:
    """A as it is on the grid, and B fitted to it, on the grid."""
    stored_down = _on_grid(down_ri, quantiser, stats)
    inner = stored_down.dense().double()
    gram = stats[Gram]
    inner_gram = Gram(
        n_tokens=gram.n_tokens,
        n_sequences=gram.n_sequences,
        sum_ii=inner @ gram.sum_ii @ inner.T,
    )
    refitted = refit_up(matrix_oi, inner, metric.chol_ii)
    stored_up = _on_grid(refitted, quantiser, Statistics({Gram: inner_gram}))
    return Product(stored_up, stored_down)


def as_low_rank(correction: Factors) -> LowRank:
    """The correction with factors in floats: those on grids become fp16, which holds their values to its own precision.

    Raises LayerError where that overflows.
    """
    if isinstance(correction, LowRank):
        return correction
    up, down = (
        to_storage(factor.dense(), torch.float16) for factor in (correction.up, correction.down)
    )
    return LowRank.from_factors(up, down, correction.offset())


def covariance(stats: Statistics) -> Tensor:
    """E[x x^T] - E[x] E[x]^T: (i, i), fp64."""
    mean_i = stats[Mean].mean_i()
    covariance_ii: Tensor = stats[Gram].mean_ii().addr_(mean_i, mean_i, alpha=-1)
    # Of a channel that hardly varies, the difference of two moments may round below zero.
    covariance_ii.diagonal().clamp_min_(0)
    return covariance_ii


def shifted(form: Form, offset_o: Tensor) -> Form:
    """A factorised form with this added to its outputs (o,), in the dtype in which it stores such.

    Raises LayerError where that overflows, TypeError for a form that cannot hold it.
    """
    if not isinstance(form, LowRank | Product):
        raise TypeError(f"{type(form).__name__} holds no offset")
    held = form.up.bias if isinstance(form, LowRank) else form.shift
    dtype = torch.float32 if held is None else held.dtype
    return form.shifted(to_storage(offset_o, dtype))


def _on_grid(factor: Tensor, quantiser: Quantiser, stats: Statistics) -> Form:
    weights: Sequence[Tensor] = [factor.float()]
    return quantiser.for_factors().compress(weights, stats)[0]
