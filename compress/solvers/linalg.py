"""Linear algebra that several methods share. Solves in fp64: a Gram squares the conditioning of its activations.

Shapes: o = out_features, i = in_features, r = rank. A Gram here is a mean per token, E[x x^T].
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from calibration.precision import cuda_products
from compress.errors import LayerError

OUTLIER_RIDGE = 1e-3


@contextmanager
def rough_products() -> Iterator[None]:
    """Within it, fp32 matrix products on CUDA devices may keep 10 bits of their factors (TF32).

    For steps whose result is fitted again. On CPUs they are as exact as ever: those with units for bf16 would be done
    with a dictionary in 0.6 to 0.9 of the time, 0.3 to 0.9 % worse, but the result would depend on the processor and
    on how many lines are worked on at a time.
    """
    with cuda_products("tf32"):
        yield


def shrink_(gram_ii: Tensor, shrinkage: float) -> Tensor:
    """G <- (1 - shrinkage) G + shrinkage diag(G), in place: inputs count as less correlated than they were seen to be.

    Schaefer and Strimmer 2005 (doi:10.2202/1544-6115.1175), target D; there against noise, here against what a mean
    over tokens hides. Error feedback puts errors where G says that inputs cancel them. They do over most tokens, but
    attention rests on the first of a sequence, whose value reaches every output and counts in G as any other's.
    """
    diagonal_i = gram_ii.diagonal().clone()
    gram_ii.mul_(1 - shrinkage)
    gram_ii.diagonal().copy_(diagonal_i)
    return gram_ii


def conditioned_(gram_ii: Tensor, shrinkage: float, damping: float) -> Tensor:
    """Shrunk, then damped, in place. Raises LayerError if all channels are dead."""
    return add_ridge_(shrink_(gram_ii, shrinkage), damping)


def add_ridge_(gram_ii: Tensor, damping: float) -> Tensor:
    """G += damping * (median(diag G) * I + 0.001 * diag G), in place: a Gram of 5,632 inputs is 254 MB.

    The median, not the mean that GPTQ takes: two channels a thousand times larger than the rest, common in language
    models, would drag the mean up and drown the others (1.76 times the optimal error, against 1.016; measured).
    If more than half of the channels are dead, the median of the live ones counts. The second term is felt only by
    channels far above the median: their fp32 products are off by more than the first term where there are fewer tokens
    than inputs, and the sum would not be definite. Raises LayerError if all channels are dead.
    """
    gram_ii.diagonal().add_(ridge(gram_ii.diagonal(), damping))
    return gram_ii


def ridge(diagonal_i: Tensor, damping: float, what: str = "input channel") -> Tensor:
    """What `add_ridge_` adds to a diagonal (i,) of second moments. Raises LayerError if they are all zero."""
    refuse_dead(diagonal_i, what)
    median = diagonal_i.median()
    scale = median if median > 0 else diagonal_i[diagonal_i > 0].median()
    return damping * (scale + OUTLIER_RIDGE * diagonal_i)


def refuse_dead(sizes_i: Tensor, what: str = "input channel") -> None:
    """Raises LayerError if all of these (i,) are zero: means of squares, or of magnitudes."""
    if not bool((sizes_i > 0).any()):
        raise LayerError(
            f"every {what} is zero on the calibration text; use other text, or --exclude the layer"
        )


def cholesky(matrix_ii: Tensor, what: str = "the Gram of its inputs") -> Tensor:
    """Lower Cholesky factor. Raises LayerError if the matrix is not positive definite, saying what would help."""
    factor, info = torch.linalg.cholesky_ex(matrix_ii)
    if int(info) != 0:
        raise LayerError(
            f"{what} is singular (order {int(info)} of {matrix_ii.shape[0]}): more calibration text, "
            "or a larger --method.damping or --method.base.damping (0.01 by default), makes it definite"
        )
    lower: Tensor = factor
    return lower


def inverse_factor(gram_ii: Tensor) -> Tensor:
    """The upper Cholesky factor U of the inverse Gram, G^-1 = U^T U: (i, i) fp32, from a definite one in fp64.

    With J the reversal of order and J G J = L L^T, U is J L^-1 J: the inverse itself is never formed.
    """
    reversed_ii = gram_ii.flip(0, 1)
    del gram_ii  # where the caller gave its only reference, 254 MB at 5,632 inputs go
    lower_ii = cholesky(reversed_ii)
    del reversed_ii
    inverse_ii = torch.eye(len(lower_ii), dtype=lower_ii.dtype, device=lower_ii.device).T
    torch.linalg.solve_triangular(lower_ii, inverse_ii, upper=False, out=inverse_ii)
    del lower_ii
    return inverse_ii.float().flip(0, 1)


def output_energy(error_oi: Tensor, gram_ii: Tensor) -> float:
    """trace(E G E^T): the mean over tokens of ||E x||^2."""
    error = error_oi.double()
    return float(((error @ gram_ii.double()) * error).sum())


def shifted_energy(error_oi: Tensor, offset_o: Tensor, gram_ii: Tensor, mean_i: Tensor) -> float:
    """The mean over tokens of ||E x - c||^2, for an offset c that the form adds to its outputs."""
    offset, shift = offset_o.double(), error_oi.double() @ mean_i.double()
    return output_energy(error_oi, gram_ii) + float(offset @ offset - 2 * (offset @ shift))


def whitened_svd(matrix_oi: Tensor, chol_ii: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Best rank-r B A for ||(M - B A) L||_F, with L L^T = G: up (o, r), down (r, i), spectrum of M L (descending).

    Eckart and Young 1936 in the metric of G; the squared residual is the sum of spectrum[r:]^2. One symmetric
    eigenproblem on the smaller side: if o <= i the left vectors U of M L give B = U, A = U^T M, and L is never
    inverted; else B = M L V and A = V^T L^-1.
    """
    matrix, chol = matrix_oi.double(), chol_ii.double()
    whitened = matrix @ chol
    if whitened.shape[0] <= whitened.shape[1]:
        energy, vectors = torch.linalg.eigh(whitened @ whitened.T)
        up = vectors[:, -rank:].flip(1)
        down = up.T @ matrix
    else:
        energy, vectors = torch.linalg.eigh(whitened.T @ whitened)
        basis = vectors[:, -rank:].flip(1)
        up = whitened @ basis
        down = torch.linalg.solve_triangular(chol, basis.T, upper=False, left=False)
    return up, down, energy.flip(0).clamp_min(0).sqrt()


def whitened_spectrum(matrix_oi: Tensor, chol_ii: Tensor) -> Tensor:
    """All singular values of M L, descending, fp64: min(o, i) of them."""
    whitened = matrix_oi.double() @ chol_ii.double()
    if whitened.shape[0] > whitened.shape[1]:
        whitened = whitened.T
    energies: Tensor = torch.linalg.eigvalsh(whitened @ whitened.T)
    return energies.flip(0).clamp_min(0).sqrt()


def output_spectrum(matrix_oi: Tensor, gram_ii: Tensor) -> Tensor:
    """All singular values of M L for any L L^T = G, descending, fp64: min(o, i) of them; G may be singular.

    The roots of the eigenvalues of M G M^T, or of R G R^T with M = Q R where M is tall: Q changes none of them.
    """
    matrix = matrix_oi.double()
    if matrix.shape[0] > matrix.shape[1]:
        matrix = torch.linalg.qr(matrix, mode="r").R
    energies: Tensor = torch.linalg.eigvalsh(matrix @ gram_ii.double() @ matrix.T)
    return energies.flip(0).clamp_min(0).sqrt()


def balanced(up_or: Tensor, down_ri: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with ||up[:, k]|| == ||down[k, :]|| for every k, so that neither factor overflows 16 bits."""
    up_norm, down_norm = up_or.norm(dim=0), down_ri.norm(dim=1)
    live = (up_norm > 0) & (down_norm > 0)
    ratio = torch.where(
        live, (down_norm / up_norm.clamp_min(1e-300)).sqrt(), torch.ones_like(up_norm)
    )
    return up_or * ratio, down_ri / ratio[:, None].clamp_min(1e-300)


def refit_up(matrix_oi: Tensor, down_ri: Tensor, chol_ii: Tensor) -> Tensor:
    """The best up (o, r) for a given down: M G A^T (A G A^T)^+ with G = L L^T, which takes back what rounding A cost.

    Directions of A that carry nothing (a residual of lower rank than r) get zeros, hence the pseudo-inverse.
    """
    image_ri = down_ri.double() @ chol_ii
    up: Tensor = (matrix_oi.double() @ chol_ii @ image_ri.T) @ torch.linalg.pinv(
        image_ri @ image_ri.T, hermitian=True
    )
    return up


def carried(gram_ii: Tensor, cross_ii: Tensor, damping: float) -> Tensor:
    """C G^-1, both with one ridge: the identity where C is G. (i, i), fp64; the arguments are overwritten.

    What least squares makes of inputs x from inputs x', with C = E[x x'^T] and G = E[x' x'^T]; the ridge in both draws
    it to the identity, where x' says little, not to zero. Raises LayerError as `add_ridge_` and `cholesky` do.
    """
    added = ridge(gram_ii.diagonal(), damping)
    gram_ii.diagonal().add_(added)
    cross_ii.diagonal().add_(added)
    return torch.cholesky_solve(cross_ii.T, cholesky(gram_ii)).T


def to_storage(factor: Tensor, dtype: torch.dtype, option: str = "--factor-dtype") -> Tensor:
    """Cast to the dtype it is stored in. Raises LayerError, naming the option that says so, where that overflows."""
    stored = factor.to(dtype)
    if not bool(torch.isfinite(stored).all()):
        raise LayerError(
            f"what is stored reaches {float(factor.abs().max()):.3g}, beyond {dtype} "
            f"({torch.finfo(dtype).max:.3g}); use {option} bfloat16"
        )
    return stored.contiguous()
