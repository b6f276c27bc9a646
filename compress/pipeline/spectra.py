"""Spectra from which low-rank parts were cut, thinned out for the report.

Shapes: o = out_features, i = in_features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calibration.statistics.collection import Statistics
from calibration.statistics.gram import Gram
from compress.families.low_rank import covariance
from compress.forms.base import Form
from compress.forms.low_rank import LowRank
from compress.forms.product import Product
from compress.forms.sparse import Sparse
from compress.forms.sum import Sum
from compress.report.report import Spectrum
from compress.solvers.linalg import output_spectrum

POINTS = 48
DIGITS = 4


def cut_of(form: Form, weight_oi: Tensor, stats: Statistics) -> tuple[int | None, Spectrum | None]:
    """Rank of the low-rank part of a weight's form, and the spectrum that it was cut out of; None where it has none.

    The spectrum is that of (W - the other terms) L with L L^T = E[x x^T], or the covariance where the form puts the
    mean output back. Cost: one symmetric eigenproblem of min(o, i) without vectors.
    """
    part = low_rank_part(form)
    if part is None:
        return None, None
    moments = stats[Gram].mean_ii() if form.offset() is None else covariance(stats)
    return part.rank, spectrum_of(_remainder(form, part, weight_oi), moments)


def low_rank_part(form: Form) -> LowRank | Product | None:
    """The last term that is a product of dense or quantised factors; None if there is none.

    A dictionary with sparse codes is no such product: its atoms are no rank.
    """
    terms = list(form.terms) if isinstance(form, Sum) else [form]
    for term in reversed(terms):
        if isinstance(term, LowRank) or (isinstance(term, Product) and not _has_codes(term)):
            return term
    return None


def spectrum_of(target_oi: Tensor, moments_ii: Tensor) -> Spectrum | None:
    """The spectrum of a matrix (o, i) that a low-rank part approximates, in the metric (i, i); None for a zero one.

    At ranks spaced evenly on a logarithmic scale.
    """
    values = output_spectrum(target_oi, moments_ii)
    if not float(values[0]) > 0:
        return None
    ranks = _log_spaced(len(values))
    shares = [float(values[rank - 1] / values[0]) for rank in ranks]
    return Spectrum(ranks=ranks, shares=tuple(float(f"{share:.{DIGITS}g}") for share in shares))


def _remainder(form: Form, part: Form, target_oi: Tensor) -> Tensor:
    """A matrix (o, i), fp64, less every term of the form but this part."""
    left = target_oi.double()
    if isinstance(form, Sum):
        for term in form.terms:
            if term is not part and isinstance(term, Form):
                left = left - term.dense().double()
    return left


def _has_codes(product: Product) -> bool:
    return isinstance(product.up, Sparse) or isinstance(product.down, Sparse)


def _log_spaced(n: int) -> tuple[int, ...]:
    """At most `POINTS` of the ranks 1 to n, both ends among them; all of them where they are no more."""
    if n <= POINTS:
        return tuple(range(1, n + 1))
    spaced = torch.logspace(0, float(torch.tensor(float(n)).log10()), POINTS, dtype=torch.float64)
    return tuple(sorted({min(n, round(rank)) for rank in spaced.tolist()} | {1, n}))
