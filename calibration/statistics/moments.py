"""Second moments of many rows: products in fp32, sums in fp64.

Shapes: t = rows (tokens), n = features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calibration.precision import cuda_products

PRODUCT_ROWS = 4096
SMALLEST_PANEL = 128
N_PANELS = 8


def second_moments(x_tn: Tensor) -> Tensor:
    """x^T x: (t, n) -> (n, n), fp64."""
    n = x_tn.shape[1]
    total = torch.zeros(n, n, dtype=torch.float64, device=x_tn.device)
    add_second_moments_(total, x_tn)
    return total


def add_second_moments_(total_nn: Tensor, x_tn: Tensor) -> None:
    """total += x^T x, in place: products in fp32 (TF32 off), a few thousand tokens each, summed in fp64.

    Only the panels on and below the diagonal are multiplied, about half of the work; the rest is their mirror, so that
    the sum is symmetric to the bit.
    """
    n = x_tn.shape[1]
    panel = max(SMALLEST_PANEL, -(-n // N_PANELS))
    with cuda_products("ieee"):  # a Gram squares the errors of TF32
        for rows in x_tn.split(PRODUCT_ROWS):
            rows_fp32 = rows.float()
            for start in range(0, n, panel):
                stop = min(start + panel, n)
                product = rows_fp32[:, start:stop].T @ rows_fp32[:, :stop]
                corner = product[:, start:].tril()
                corner += corner.tril(-1).T
                total_nn[start:stop, start:stop] += corner
                total_nn[start:stop, :start] += product[:, :start]
                total_nn[:start, start:stop] += product[:, :start].T


def cross_moments(a_tn: Tensor, b_tn: Tensor) -> Tensor:
    """a^T b: (t, n), (t, n) -> (n, n), fp64; products in fp32 (TF32 off)."""
    total = torch.zeros(a_tn.shape[1], b_tn.shape[1], dtype=torch.float64, device=b_tn.device)
    with cuda_products("ieee"):
        for a, b in zip(a_tn.split(PRODUCT_ROWS), b_tn.split(PRODUCT_ROWS), strict=True):
            total += a.float().T @ b.float()
    return total
