"""From a weight and its inputs' Gram to lines that are coded, and from codes back to the best dictionary.

Shapes: o = out_features, i = in_features, n = lines, k = atoms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calibration.stats import Gram, Statistics
from compress.coding import Coded, CoupledLines, FreeLines, Lines, solved
from compress.linalg import add_ridge_, cholesky


def lines_of(
    weight_oi: Tensor, stats: Statistics, coded: Coded, damping: float
) -> tuple[Lines, Tensor]:
    """The problem, and what its lines were multiplied by: (n,).

    Lines of inputs are scaled to inputs of one size, so that the penalty of ADMM suits all.
    Raises LayerError for a Gram that is singular or zero.
    """
    if coded is Coded.OUTPUTS:
        chol_ii = stats.once(
            ("whitening", damping), lambda: cholesky(damped(stats, damping)).float()
        )
        return FreeLines(weight_oi @ chol_ii), weight_oi.new_ones(len(weight_oi))
    gram, root_i, eigen = stats.once(("scaled gram", damping), lambda: _scaled(stats, damping))
    return CoupledLines((weight_oi * root_i).T.contiguous(), gram, eigen), root_i


def best_dictionary(
    weight_oi: Tensor, codes: Tensor, stats: Statistics, coded: Coded, damping: float
) -> Tensor:
    """For codes (o, k) or (k, i) as they are stored: (k, i) or (o, k), fp64.

    For codes of outputs the inputs drop out: (Z^T Z)^-1 Z^T W.
    """
    weight, codes = weight_oi.double(), codes.double()
    if coded is Coded.OUTPUTS:
        return solved(codes.T @ codes, codes.T @ weight)
    gram_ii = stats.once(("damped gram", damping), lambda: damped(stats, damping))
    image_ki = codes @ gram_ii
    return solved(image_ki @ codes.T, image_ki @ weight.T).T


def damped(stats: Statistics, damping: float) -> Tensor:
    """The mean Gram with its ridge: (i, i), fp64."""
    return add_ridge_(stats[Gram].mean_ii(), damping)


def _scaled(stats: Statistics, damping: float) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The Gram with a diagonal of ones, the roots of the one it had, and its eigendecomposition."""
    gram_ii = damped(stats, damping)
    root_i = gram_ii.diagonal().sqrt()
    gram_ii /= root_i * root_i[:, None]
    return gram_ii.float(), root_i.float(), torch.linalg.eigh(gram_ii)
