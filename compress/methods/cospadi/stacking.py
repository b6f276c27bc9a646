"""The lines that are coded, made of weights with one dictionary, and the best dictionary for given codes.

Weights of one input share its Gram matrix; those of several inputs, the same layer of consecutive blocks, are each
measured by their own. Every weight counts by its relative error: its lines are scaled so that all have the same energy
of outputs, or the largest would take the dictionary for itself and leave the others what it happens to hold.

Shapes: o = out_features, i = in_features, n = lines, k = atoms, b = inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property, partial, reduce
from statistics import fmean
from typing import ClassVar

import torch
from torch import Tensor

from calibration.statistics.collection import Statistics
from calibration.statistics.gram import Gram
from compress.forms.sparse import Along
from compress.solvers.dictionary_learning import lengths_of
from compress.solvers.linalg import add_ridge_, cholesky, output_energy
from compress.solvers.masks import Pattern
from compress.solvers.sparse_coding import (
    TINY,
    Coded,
    CoupledLines,
    FreeLines,
    Lines,
    Steps,
    solved,
)

RECODING, POLISH_STEPS = Steps(8), 15
"""Steps that refine codes in their own metric, after the common one."""
MOST_STEPS = 50
"""The most steps of conjugate gradients for atoms under several metrics: some ten do."""
CLOSE = 1e-10
"""Share of the first residual, squared in the preconditioner's metric, at which they end."""


class Stacked(ABC):
    """Weights that share a dictionary, with the statistics of their inputs."""

    along: ClassVar[Along]

    def __init__(self, weights: Sequence[Tensor], stats: Statistics, damping: float) -> None:
        self.weights, self.damping = list(weights), damping
        self.inputs = [(list(part), own) for part, own in stats.by_input(self.weights)]

    @cached_property
    def _energies(self) -> list[list[float]]:
        """The output energy of each weight, ||W X^T||_F^2 for a mean row of X, by input."""
        return [
            [output_energy(weight, own[Gram].mean_ii()) for weight in part]
            for part, own in self.inputs
        ]

    @cached_property
    def shares(self) -> list[float]:
        """The factor on each input's Gram matrix: 1 for an only one, or that which makes outputs comparable."""
        if len(self.inputs) == 1:
            return [1.0]
        found = []
        for (part, own), energies in zip(self.inputs, self._energies, strict=True):
            gains = [
                energy / max(squared_norm(weight), TINY)
                for weight, energy in zip(part, energies, strict=True)
                if energy > 0
            ]
            # Weights without any would put out what a mean direction does; a Gram without any is refused later.
            mean = fmean(gains) if gains else float(own[Gram].mean_ii().diagonal().mean())
            found.append(1 / mean if mean > 0 else 1.0)
        return found

    @cached_property
    def scales(self) -> list[float]:
        """The factor on each weight that gives all the same output energy: 1 for an only one, or for zeros."""
        if len(self.weights) == 1:
            return [1.0]
        energies = [
            share * energy
            for share, own in zip(self.shares, self._energies, strict=True)
            for energy in own
        ]
        return [energy**-0.5 if energy > 0 else 1.0 for energy in energies]

    def scaled(self) -> list[Tensor]:
        """The weights, each times its scale."""
        return [w * scale for w, scale in zip(self.weights, self.scales, strict=True)]

    def counted(self, codes: Sequence[Tensor]) -> list[Tensor]:
        """The codes of each weight, fp64, times the weight's scale."""
        return [own.double() * scale for own, scale in zip(codes, self.scales, strict=True)]

    def metrics(self) -> list[Tensor]:
        """The damped Gram of each input, in its share: (i, i), fp64."""
        grams = [
            own.once(("damped gram", self.damping), partial(damped, own, self.damping))
            for _, own in self.inputs
        ]
        return [share * gram for share, gram in zip(self.shares, grams, strict=True)]

    @abstractmethod
    def lines(self) -> Lines:
        """The lines of all weights. Raises LayerError for a Gram matrix that is singular or zero."""

    @abstractmethod
    def codes(self, codes_nk: Tensor, s: int, pattern: Pattern) -> list[Tensor]:
        """The codes of each weight, (o, k) or (i, k), from those that were found for `lines`."""

    @abstractmethod
    def dictionary(self, codes: Sequence[Tensor]) -> Tensor:
        """The best one for every weight's codes as they are stored, (o, k) or (k, i): (k, i) or (o, k), fp64."""


class OfOutputs(Stacked):
    """A code for every output, W = Z D; the dictionary is in the space of the inputs."""

    along = Along.ROWS

    def lines(self) -> Lines:
        """The rows of all weights in the metric of the one input, or in the mean of all metrics."""
        if len(self.inputs) == 1:
            return FreeLines(torch.cat(self.scaled()) @ whitening(self.inputs[0][1], self.damping))
        chol_ii = cholesky(total(self.metrics())).float()
        return FreeLines(torch.cat(self.scaled()) @ chol_ii)

    def codes(self, codes_nk: Tensor, s: int, pattern: Pattern) -> list[Tensor]:
        """The codes of each weight without its scale; of several inputs, refined in the weight's own metric."""
        found = codes_nk.split([len(weight) for weight in self.weights])
        parts = [part / scale for part, scale in zip(found, self.scales, strict=True)]
        if len(self.inputs) == 1:
            return parts
        stack, codes = torch.cat(self.scaled()).double(), codes_nk.double()
        atoms_ki = solved(codes.T @ codes, codes.T @ stack).float()
        metrics = [whitening(own, self.damping) for part, own in self.inputs for _ in part]
        return [
            recoded(FreeLines(weight @ chol_ii), atoms_ki @ chol_ii, part, (s, pattern))
            for weight, chol_ii, part in zip(self.weights, metrics, parts, strict=True)
        ]

    def dictionary(self, codes: Sequence[Tensor]) -> Tensor:
        """The least-squares dictionary: (Z^T Z)^-1 Z^T W under one metric, where the inputs drop out."""
        weights = [weight.double() for weight in self.scaled()]
        together, weight = torch.cat(self.counted(codes)), torch.cat(weights)
        common = solved(together.T @ together, together.T @ weight)
        if len(self.inputs) == 1:
            return common
        normals, rights, metrics = [], [], self.metrics()
        n_lines = [sum(map(len, part)) for part, _ in self.inputs]
        parts = zip(together.split(n_lines), weight.split(n_lines), metrics, strict=True)
        for own, part, gram_ii in parts:
            normals.append(own.T @ own)
            rights.append(own.T @ part @ gram_ii)
        return under_all(common, normals, metrics, total(rights))


class OfInputs(Stacked):
    """A code for every input, W = D Z; each of the weights has an input of its own."""

    along = Along.COLUMNS

    def lines(self) -> Lines:
        """Scaled to inputs of one size, so that the penalty of ADMM suits all."""
        scaled = [self._of_one_size(own) for _, own in self.inputs]
        target = torch.cat([(w * r).T for w, r in zip(self.scaled(), self._roots(), strict=True)])
        return CoupledLines(target, [gram for gram, _, _ in scaled], [eig for _, _, eig in scaled])

    def codes(self, codes_nk: Tensor, s: int, pattern: Pattern) -> list[Tensor]:  # noqa: ARG002
        """The codes of each weight without the scale of its lines."""
        roots = [root * scale for root, scale in zip(self._roots(), self.scales, strict=True)]
        parts = codes_nk.split([len(root) for root in roots])
        return [part / root[:, None] for part, root in zip(parts, roots, strict=True)]

    def dictionary(self, codes: Sequence[Tensor]) -> Tensor:
        """The least-squares dictionary, (sum of Z G Z^T)^-1 (sum of Z G W^T), transposed."""
        counted = self.counted(codes)
        images = [own @ gram for own, gram in zip(counted, self.metrics(), strict=True)]
        normals = [image @ own.T for image, own in zip(images, counted, strict=True)]
        rights = [image @ w.double().T for image, w in zip(images, self.scaled(), strict=True)]
        return solved(total(normals), total(rights)).T

    def _roots(self) -> list[Tensor]:
        """The factors on the lines of each scaled weight: (i,)."""
        return [
            share**0.5 * self._of_one_size(own)[1]
            for share, (_, own) in zip(self.shares, self.inputs, strict=True)
        ]

    def _of_one_size(self, stats: Statistics) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """The Gram matrix with a diagonal of ones, the roots of its diagonal before, and its eigendecomposition."""

        def make() -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
            gram_ii = damped(stats, self.damping)
            root_i = gram_ii.diagonal().sqrt()
            gram_ii /= root_i * root_i[:, None]
            return gram_ii.float(), root_i.float(), torch.linalg.eigh(gram_ii)

        return stats.once(("scaled gram", self.damping), make)


def stacked(weights: Sequence[Tensor], stats: Statistics, coded: Coded, damping: float) -> Stacked:
    """Weights (o, i) with one dictionary; coded by inputs, they have as many outputs and each its own input."""
    kind = OfOutputs if coded is Coded.OUTPUTS else OfInputs
    return kind(weights, stats, damping)


def damped(stats: Statistics, damping: float) -> Tensor:
    """The mean Gram with its ridge: (i, i), fp64."""
    return add_ridge_(stats[Gram].mean_ii(), damping)


def whitening(stats: Statistics, damping: float) -> Tensor:
    """L with L L^T the damped Gram: (i, i), fp32. Raises LayerError for a Gram that is singular or zero."""
    return stats.once(("whitening", damping), lambda: cholesky(damped(stats, damping)).float())


def recoded(
    lines: FreeLines, atoms_kd: Tensor, codes_nk: Tensor, form: tuple[int, Pattern]
) -> Tensor:
    """Better codes (n, k) for given atoms, from codes that were found in another metric; those, if none are better."""
    lengths = lengths_of(atoms_kd)
    atoms, before = atoms_kd / lengths[:, None], codes_nk * lengths
    codes = lines.code(atoms, before, *form, RECODING)
    codes = lines.polished(atoms, codes, POLISH_STEPS)
    better = lines.error(codes, atoms) < lines.error(before, atoms)
    return codes / lengths if better else codes_nk


def under_all(
    start_kd: Tensor, normals: Sequence[Tensor], metrics: Sequence[Tensor], right_kd: Tensor
) -> Tensor:
    """D with sum_b H_b D G_b = R, the best atoms under several metrics: (k, d), fp64.

    Conjugate gradients from what the mean metric gives, preconditioned by the mean of the H and of the G: the error
    falls with every step. CoSpaDi (arXiv:2509.22075) takes the mean metric alone.
    """
    normal_kk, factor_dd = total(normals), cholesky(total(metrics))

    def image(atoms: Tensor) -> Tensor:
        return total([h @ atoms @ g for h, g in zip(normals, metrics, strict=True)])

    def conditioned(residual: Tensor) -> Tensor:
        return torch.cholesky_solve(solved(normal_kk, residual).T, factor_dd).T

    atoms, residual = start_kd.clone(), right_kd - image(start_kd)
    direction = guess = conditioned(residual)
    square = first = float((residual * guess).sum())
    for _ in range(MOST_STEPS):
        if square <= CLOSE * first or first <= 0:
            break
        turned = image(direction)
        step = square / float((direction * turned).sum())
        atoms += step * direction
        residual -= step * turned
        guess = conditioned(residual)
        before, square = square, float((residual * guess).sum())
        direction = guess + square / before * direction
    return atoms


def squared_norm(weight_oi: Tensor) -> float:
    """The squared Frobenius norm, ||W||_F^2."""
    return float(weight_oi.double().square().sum())


def total(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of one tensor or more, of one shape."""
    return reduce(torch.add, tensors)
