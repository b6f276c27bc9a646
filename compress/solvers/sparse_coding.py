"""Sparse codes for atoms: two problems of one shape, and what alternates between them.

    min over Z, A of || R (M - Z A) ||_F,   every row of Z with the same number of nonzeros

M (n, d) is the weight, a row for each line that is coded; A (k, d) the atoms; Z (n, k) the codes. Where lines are
outputs, M is the whitened weight W L and R = I: lines are coded apart from each other. Where lines are inputs, M = W^T
and R^T R is the Gram of the inputs, which couples them.

With half of the atoms in use a coding is a pruning, not a matching pursuit: of a dense code for the Hessian A A^T that
all lines share. So it is ADMM (Boza 2024, arXiv:2401.02938, prunes weights so): matrix products and one factorisation.

Shapes: n = lines, d = entries of an atom, k = atoms, s = nonzeros of a line. All fp32.
"""

from __future__ import annotations

import enum
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from compress.errors import LayerError
from compress.solvers.linalg import cholesky, rough_products
from compress.solvers.masks import Pattern, largest_entries

SMALL, TINIEST = 1e-5, 1e-8
"""Ridges on normal equations scaled to a diagonal of ones, above what rounding to fp32 and fp64 makes of zero."""
BLOCK_ENTRIES = 1 << 24
"""Entries of codes that are worked on at a time."""
FLAT = 1e-6
"""Curvature below this share of the mean diagonal is none, in fp32."""
TINY = 1e-30


class Coded(enum.StrEnum):
    """Which side of the weight has the sparse codes."""

    AUTO = "auto"
    """The longer one: the dictionary is then the smaller."""
    OUTPUTS = "outputs"
    """A code for every output, as in the paper."""
    INPUTS = "inputs"
    """A code for every input."""


@dataclass(frozen=True)
class Steps:
    """Of ADMM."""

    number: int = 2
    """For a round, in which the atoms move too, many more of them do not pay."""
    penalty: float = 0.2
    """Its rho, as a share of the mean diagonal of the Hessian: .1 chooses too hastily, 1 is drawn to the start."""


SOME = Steps()


class Lines(ABC):
    """What is coded."""

    def __init__(self, target_nd: Tensor) -> None:
        self.target = target_nd
        self.goal = self.weighted(target_nd)
        """R^T R M: (n, d)."""
        self.total = float((self.goal * target_nd).sum(dtype=torch.float64))
        """||R M||_F^2."""

    @abstractmethod
    def weighted(self, matrix: Tensor) -> Tensor:
        """R^T R applied to something with a row for each line."""

    @abstractmethod
    def code(
        self,
        atoms_kd: Tensor,
        codes_nk: Tensor,
        s: int,
        pattern: Pattern,
        steps: Steps = SOME,
        dual_nk: Tensor | None = None,
    ) -> Tensor:
        """So many steps of ADMM from these codes, for these atoms: the new codes.

        `dual_nk` is where the steps begin, zeros unless given; where they end is written into it.
        """

    @abstractmethod
    def inner(self, one_nk: Tensor, other_nk: Tensor) -> Tensor:
        """Products of codes that are settled together: of each line (n, 1), or of all (1, 1)."""

    def error(self, codes_nk: Tensor, atoms_kd: Tensor) -> float:
        """||R (M - Z A)||_F / ||R M||_F; 0 for a weight of zeros."""
        return self._share(float(self.lost(codes_nk, atoms_kd).sum(dtype=torch.float64)))

    def _share(self, lost: float) -> float:
        return math.sqrt(max(lost, 0.0) / self.total) if self.total > 0 else 0.0

    def start(self, k: int) -> Tensor:
        """Atoms to begin with: principal components of the lines; beyond d of them, the lines that weigh most."""
        d = self.target.shape[1]
        atoms = self._components[: min(k, d)]
        if k > d:
            weights = (self.goal * self.target).sum(1)
            atoms = torch.cat([atoms, _unit(self.target[weights.topk(k - d).indices])])
        return atoms

    @cached_property
    def _components(self) -> Tensor:
        """Principal components of the lines, the first first: (d, d)."""
        moments = self.target.T.double() @ self.goal.double()
        _, vectors = torch.linalg.eigh((moments + moments.T) / 2)
        components: Tensor = vectors.flip(1).T.float()
        return components

    def lost(self, codes_nk: Tensor, atoms_kd: Tensor) -> Tensor:
        """What each line has of ||R (M - Z A)||_F^2: (n,)."""
        left = self.target - codes_nk @ atoms_kd
        return (self.weighted(left) * left).sum(1)

    def fit(self, codes_nk: Tensor) -> tuple[Tensor, float]:
        """The best atoms (k, d) for given codes, (Z^T G Z)^-1 Z^T G M with a small ridge, and the error they leave.

        The error comes from the same products: an error of 1e-3 is known to a few per cent, a smaller one is noise.
        Raises LayerError if there is no solution.
        """
        normal, right = codes_nk.T @ self.weighted(codes_nk), codes_nk.T @ self.goal
        try:
            atoms = solved(normal, right, SMALL)
        except (
            LayerError
        ):  # fp32 took what a code of hardly any weight has with the others below zero
            exact = codes_nk.double()
            normal, right = exact.T @ self.weighted(exact), exact.T @ self.goal.double()
            atoms = solved(normal, right, SMALL)
        explained = (atoms * (2 * right - normal @ atoms)).sum(dtype=torch.float64)
        return atoms.float(), self._share(self.total - float(explained))

    def polished(self, atoms_kd: Tensor, codes_nk: Tensor, n_steps: int) -> Tensor:
        """Conjugate gradients on the nonzeros that there are, as they are chosen."""
        hessian, mask = atoms_kd @ atoms_kd.T, (codes_nk != 0).to(codes_nk.dtype)
        gradient = (self.goal @ atoms_kd.T - self.weighted(codes_nk @ hessian)).mul_(mask)
        direction, codes = gradient.clone(), codes_nk.clone()
        square = self.inner(gradient, gradient)
        for _ in range(n_steps):
            image = self.weighted(direction @ hessian).mul_(mask)
            curvature, length = self.inner(direction, image), self.inner(direction, direction)
            step = _quotients(square, curvature, length, hessian)
            codes.addcmul_(direction, step)
            gradient.addcmul_(image, step, value=-1)
            before, square = square, self.inner(gradient, gradient)
            direction.mul_(square / before.clamp_min(TINY)).add_(gradient)
        return codes


class FreeLines(Lines):
    """Lines that are coded apart from each other: R = I."""

    def __init__(self, target_nd: Tensor, block_entries: int = BLOCK_ENTRIES) -> None:
        super().__init__(target_nd)
        self._block_entries = block_entries

    def weighted(self, matrix: Tensor) -> Tensor:  # noqa: D102
        return matrix

    def code(  # noqa: D102
        self,
        atoms_kd: Tensor,
        codes_nk: Tensor,
        s: int,
        pattern: Pattern,
        steps: Steps = SOME,
        dual_nk: Tensor | None = None,
    ) -> Tensor:
        hessian = atoms_kd @ atoms_kd.T
        penalty = steps.penalty * float(hessian.diagonal().mean())
        hessian.diagonal().add_(penalty)
        inverse = torch.cholesky_inverse(cholesky(hessian, "the Gram of its atoms"))
        to_codes = atoms_kd.T @ inverse  # (d, k): M A^T (H + rho I)^-1 in one product
        dual_nk = torch.zeros_like(codes_nk) if dual_nk is None else dual_nk
        coded = torch.empty_like(codes_nk)
        n_lines = max(1, self._block_entries // len(atoms_kd))
        split = (each.split(n_lines) for each in (self.target, codes_nk, dual_nk, coded))
        for lines, old, dual, new in zip(*split, strict=True):
            with rough_products():
                still, wanted, pull = lines @ to_codes, torch.empty_like(old), old - dual
                for _ in range(steps.number):
                    torch.add(still, dual, out=wanted).addmm_(pull, inverse, alpha=penalty)
                    largest_entries(wanted, s, pattern, out=new)
                    torch.sub(wanted, new, out=dual)
                    torch.sub(new, dual, out=pull)
        return coded

    def polished(self, atoms_kd: Tensor, codes_nk: Tensor, n_steps: int) -> Tensor:  # noqa: D102
        n_lines = max(1, self._block_entries // len(atoms_kd))
        if len(codes_nk) <= n_lines:
            return super().polished(atoms_kd, codes_nk, n_steps)
        parts = zip(self.target.split(n_lines), codes_nk.split(n_lines), strict=True)
        some = (FreeLines(lines).polished(atoms_kd, codes, n_steps) for lines, codes in parts)
        return torch.cat(list(some))

    def inner(self, one_nk: Tensor, other_nk: Tensor) -> Tensor:  # noqa: D102
        return (one_nk * other_nk).sum(1, keepdim=True)


class CoupledLines(Lines):
    """Lines that Grams couple, those of one input each: R^T R = diag(G, ...), the lines scaled to diagonals of 1.

    The step of ADMM is exact: with G = Q diag(l) Q^T and A A^T = V diag(m) V^T it is a product with 1 / (l m^T + rho).
    """

    def __init__(
        self,
        target_nd: Tensor,
        grams: Sequence[Tensor],
        eigen: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """`grams`: one (n, n) for each input, in the order of the lines; `eigen`: their values and vectors."""
        self._grams = grams
        self._counts = [len(gram) for gram in grams]
        super().__init__(target_nd)
        found = [torch.linalg.eigh(gram.double()) for gram in grams] if eigen is None else eigen
        self._eigen = [(values.clamp_min(0).float(), vectors.float()) for values, vectors in found]

    def weighted(self, matrix: Tensor) -> Tensor:  # noqa: D102
        parts = matrix.split(self._counts)
        if len(parts) == 1:
            return self._grams[0].to(matrix.dtype) @ matrix
        pairs = zip(self._grams, parts, strict=True)
        return torch.cat([gram.to(matrix.dtype) @ part for gram, part in pairs])

    def code(  # noqa: D102
        self,
        atoms_kd: Tensor,
        codes_nk: Tensor,
        s: int,
        pattern: Pattern,
        steps: Steps = SOME,
        dual_nk: Tensor | None = None,
    ) -> Tensor:
        hessian = atoms_kd @ atoms_kd.T
        penalty = steps.penalty * float(hessian.diagonal().mean())
        sizes, turn = torch.linalg.eigh(hessian)  # beside the penalty what fp32 loses is nothing
        sizes = sizes.clamp_min(0)
        dual_nk = torch.zeros_like(codes_nk) if dual_nk is None else dual_nk
        coded = torch.empty_like(codes_nk)
        split = (each.split(self._counts) for each in (self.goal, codes_nk, dual_nk, coded))
        for (values, vectors), goal, old, dual, new in zip(self._eigen, *split, strict=True):
            factors = 1 / (values[:, None] * sizes + penalty).clamp_min(TINY)
            with rough_products():
                aim, pull = vectors.T @ (goal @ (atoms_kd.T @ turn)), old - dual
                for _ in range(steps.number):
                    turned = (vectors.T @ (pull @ turn)).mul_(penalty).add_(aim).mul_(factors)
                    wanted = (vectors @ (turned @ turn.T)).add_(dual)
                    largest_entries(wanted, s, pattern, out=new)
                    torch.sub(wanted, new, out=dual)
                    torch.sub(new, dual, out=pull)
        return coded

    def inner(self, one_nk: Tensor, other_nk: Tensor) -> Tensor:  # noqa: D102
        return (one_nk * other_nk).sum().view(1, 1)


def _quotients(squares: Tensor, curvature: Tensor, lengths: Tensor, hessian_kk: Tensor) -> Tensor:
    """Step sizes; none along directions in which the Hessian is flat: there is nothing left but rounding."""
    flat = curvature <= FLAT * hessian_kk.diagonal().mean() * lengths
    return torch.where(flat, torch.zeros_like(squares), squares / curvature.clamp_min(TINY))


def solved(normal_kk: Tensor, right_kd: Tensor, ridge: float = TINIEST) -> Tensor:
    """N^-1 B for symmetric N >= 0, in its dtype, with this ridge; zeros for rows of N that are zero.

    Raises LayerError if it is not definite.
    """
    root_k = normal_kk.diagonal().clamp_min(0).sqrt()
    scale_k = torch.where(root_k > 0, 1 / root_k, torch.zeros_like(root_k))
    damped = normal_kk * scale_k * scale_k[:, None]
    damped.diagonal().fill_(1 + ridge)
    solution: Tensor = torch.cholesky_solve(
        right_kd * scale_k[:, None], cholesky(damped, "the Gram of its codes")
    )
    return solution * scale_k[:, None]


def _unit(rows: Tensor) -> Tensor:
    lengths = rows.norm(dim=1, keepdim=True)
    unit: Tensor = rows / lengths.clamp_min(1e-8)
    return unit
