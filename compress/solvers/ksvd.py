"""K-SVD with orthogonal matching pursuit: the published solver, to compare with.

Codes: orthogonal matching pursuit (Pati et al. 1993), all lines of a block at once; the atoms' Gram is orthogonalised
along each line's own choice (as in Rubinstein et al. 2008, "Efficient implementation of the K-SVD algorithm using batch
orthogonal matching pursuit"). Atoms: K-SVD (Aharon et al. 2006), one after the other, each rank-one problem by a few
power iterations (Shopkhoev et al. 2025, arXiv:2509.22075, algorithm 1 and table 8: 60 rounds, 8 power iterations,
columns of the weight to begin with).

With hundreds of nonzeros a line this takes hundreds of times as long as `dictionary.alternating`, and ends higher.
Shapes: n = lines, d = entries of an atom, k = atoms, s = nonzeros of a line.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.solvers.dictionary_learning import Watch, no_watch, unit
from compress.solvers.sparse_coding import FreeLines

N_POWER = 8
BLOCK_ENTRIES = 1 << 25
"""Entries of the orthogonalised Gram that are held at a time: n s k for a block of n lines."""
NOTHING = 1e-10
"""Of an atom of length 1, squared, what the atoms before it leave where it depends on them."""


def ksvd(
    lines: FreeLines, k: int, s: int, n_rounds: int, seed: int = 0, watch: Watch = no_watch
) -> tuple[Tensor, Tensor]:
    """Matching pursuit and K-SVD in turn, from random lines as atoms. Returns codes (n, k) and atoms (k, d)."""
    atoms = _random_lines(lines.target, k, seed)
    codes = lines.target.new_zeros(len(lines.target), k)
    for number in range(1, n_rounds + 1):
        codes = matching_pursuit(lines.target, atoms, s)
        codes, atoms = sweep(lines.target, codes, atoms)
        watch(number, lines.error(codes, atoms))
    return codes, atoms


def matching_pursuit(target_nd: Tensor, atoms_kd: Tensor, s: int) -> Tensor:
    """Greedy codes with at most s nonzeros: each the atom most correlated with what is left; all refitted. (n, k).

    Atoms have length 1. A line that is exact before s atoms gets no more of them.
    """
    gram_kk = atoms_kd @ atoms_kd.T
    n_lines = max(1, BLOCK_ENTRIES // (s * len(atoms_kd)))
    blocks = (target_nd @ atoms_kd.T).split(n_lines)
    return torch.cat([_pursued(correlations, gram_kk, s) for correlations in blocks])


def _pursued(correlations_nk: Tensor, gram_kk: Tensor, s: int) -> Tensor:
    """Of one block. Direction l of a line is what its l-th atom adds to those before, by its products with atoms."""
    n, k = correlations_nk.shape
    left = correlations_nk.clone()
    free = torch.ones_like(left)
    directions = left.new_zeros(n, s, k)
    chosen = torch.zeros(n, s, dtype=torch.int64, device=left.device)
    coefficients = left.new_zeros(n, s)
    rows = torch.arange(n, device=left.device)
    for step in range(s):
        best = (left * free).abs().argmax(1)
        chosen[:, step], free[rows, best] = best, 0
        before = directions[:, :step]
        new = gram_kk[best] - torch.einsum("nl,nlk->nk", before[rows, :, best], before)
        length = new[rows, best]
        usable = length > NOTHING
        scale = torch.where(usable, length.clamp_min(NOTHING).rsqrt(), torch.zeros_like(length))
        new *= scale[:, None]
        coefficients[:, step] = left[rows, best] * scale
        left -= coefficients[:, step, None] * new
        directions[:, step] = new
    triangle = directions.gather(2, chosen[:, None].expand(n, s, s)).triu()
    diagonal = triangle.diagonal(dim1=1, dim2=2)
    diagonal += (diagonal == 0).to(diagonal.dtype)  # an atom that adds nothing gets no weight
    values = torch.linalg.solve_triangular(triangle, coefficients[..., None], upper=True)
    return torch.zeros_like(left).scatter_(1, chosen, values[..., 0])


def sweep(target_nd: Tensor, codes_nk: Tensor, atoms_kd: Tensor) -> tuple[Tensor, Tensor]:
    """Every atom and its coefficients anew, one after the other, the places of the nonzeros kept.

    An atom that no line uses becomes the line that is worst off.
    """
    codes, atoms = codes_nk.clone(), atoms_kd.clone()
    left = target_nd - codes @ atoms
    for atom in range(len(atoms)):
        users = codes[:, atom].nonzero().squeeze(1)
        if len(users) == 0:
            worst = left[left.square().sum(1).argmax()]
            atoms[atom] = worst / worst.norm().clamp_min(1e-30)
            continue
        part = left[users] + torch.outer(codes[users, atom], atoms[atom])
        values = codes[users, atom]
        for _ in range(N_POWER):
            direction = part.T @ values
            direction = direction / direction.norm().clamp_min(1e-30)
            values = part @ direction
        atoms[atom], codes[users, atom] = direction, values
        left[users] = part - torch.outer(values, direction)
    return codes, atoms


def _random_lines(target_nd: Tensor, k: int, seed: int) -> Tensor:
    """So many of the lines, each once as long as there are others, and noise beyond them; of length 1."""
    generator = torch.Generator().manual_seed(seed)
    n, d = target_nd.shape
    picked = target_nd[torch.randperm(n, generator=generator)[:k].to(target_nd.device)]
    noise = torch.randn(max(k - n, 0), d, generator=generator).to(target_nd)
    return unit(torch.cat([picked, noise]))
