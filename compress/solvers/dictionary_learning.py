"""Solvers for a dictionary and its sparse codes: what alternates, and when it stops.

Shapes: n = lines, d = entries of an atom, k = atoms, s = nonzeros of a line (see `coding`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from compress.solvers.linalg import rough_products
from compress.solvers.masks import Pattern, largest
from compress.solvers.sparse_coding import Lines

EXTRAPOLATION = 0.8
CARRIED = 0.5
"""Share of ADMM's dual variable that goes into the next round: without it two steps a round are too few, and all of it
belongs to atoms that are no more. With it 12 rounds of two steps reach what 12 of three reached, in 0.8 of the time."""
POLISH_STEPS = 6
LEAST_USE = 2
"""Lines that must use an atom; one that fewer use is dead."""

Watch = Callable[[int, float], None]


def no_watch(_round: int, _error: float) -> None:
    """Nobody looks."""


def oneshot(lines: Lines, k: int, s: int, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """No iteration: principal components, the largest coefficients of each line, atoms fitted to them.

    As ROCKET (2026, arXiv:2602.11008) begins; it chooses by another measure of importance. Returns codes, atoms.
    """
    codes = _first_codes(lines, lines.start(k), s, pattern)
    return codes, lines.fit(codes)[0]


def alternating(
    lines: Lines, k: int, s: int, pattern: Pattern, n_rounds: int, watch: Watch = no_watch
) -> tuple[Tensor, Tensor]:
    """ADMM for the codes and least squares for the atoms in turn, then a polish. Returns codes (n, k), atoms (k, d).

    The codes of a round are made for atoms extrapolated from the last two; dead atoms become the lines that are worst
    off. Never worse than `oneshot`: it is where the rounds begin, and the best of all rounds is what is polished.
    `watch` is told the error after every round.
    """
    atoms = extrapolated = lines.start(k)
    codes = _first_codes(lines, atoms, s, pattern)
    fitted, error = lines.fit(codes)
    if not bool(codes.any()):  # a weight of zeros
        return codes, fitted
    best, dual = (error, codes, fitted), torch.zeros_like(codes)
    for number in range(1, n_rounds + 1):
        codes = lines.code(extrapolated, codes, s, pattern, dual_nk=dual)
        before = atoms
        atoms, error = lines.fit(codes)
        watch(number, error)
        if error < best[0]:
            best = (error, codes, atoms)
        codes, atoms = revived(lines, codes, atoms)
        lengths = lengths_of(atoms)
        atoms, codes = atoms / lengths[:, None], codes * lengths
        dual.mul_(CARRIED * lengths)
        step = EXTRAPOLATION * (atoms - before) if number > 1 else 0
        extrapolated = unit(atoms + step)
    return _polished(lines, *best)


def _polished(lines: Lines, error: float, codes: Tensor, atoms: Tensor) -> tuple[Tensor, Tensor]:
    with rough_products():
        finer = lines.polished(atoms, codes, POLISH_STEPS)
    fitted, reached = lines.fit(finer)
    return (finer, fitted) if reached < error else (codes, atoms)


def _first_codes(lines: Lines, atoms: Tensor, s: int, pattern: Pattern) -> Tensor:
    dense = lines.target @ atoms.T
    return dense * largest(dense, s, pattern)


def revived(lines: Lines, codes: Tensor, atoms: Tensor) -> tuple[Tensor, Tensor]:
    """Atoms that hardly a line uses become the lines that are worst off; no code uses them yet."""
    dead = (codes != 0).sum(0) < LEAST_USE
    n_dead = min(int(dead.sum()), len(lines.target))
    if n_dead == 0:
        return codes, atoms
    dead = dead.nonzero().squeeze(1)[:n_dead]
    codes, atoms = codes.clone(), atoms.clone()
    codes[:, dead] = 0
    left = lines.target - codes @ atoms
    worst = (lines.weighted(left) * left).sum(1).topk(n_dead).indices
    atoms[dead] = left[worst]
    return codes, atoms


def lengths_of(atoms: Tensor) -> Tensor:
    """Of each atom (k,); 1 for atoms of zeros, which so stay what they are when divided by it."""
    lengths = atoms.norm(dim=1)
    return torch.where(lengths > 0, lengths, torch.ones_like(lengths))


def unit(atoms: Tensor) -> Tensor:
    """Atoms of length 1; those of zeros stay so."""
    return atoms / lengths_of(atoms)[:, None]
