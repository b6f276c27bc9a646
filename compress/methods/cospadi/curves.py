"""The error of dictionaries by their number of atoms, measured at a few sizes and interpolated between.

The sizes are measured by the first rounds of the solver. Without any, dictionaries of more atoms than an atom has
entries look worse than smaller ones, and the plan takes its bytes from where they would have done most. Shapes: o =
out_features, i = in_features, n = lines, d = entries of an atom, k = atoms.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from calibration.statistics.collection import Statistics
from compress.errors import LayerError
from compress.families.base import Survey, Trial
from compress.families.importance import fisher_cost
from compress.forms.dense import Dense
from compress.methods.cospadi.options import CoSpaDiOptions
from compress.methods.cospadi.stacking import Stacked, stacked
from compress.solvers.dictionary_learning import alternating, oneshot
from compress.solvers.sparse_coding import Coded, Lines

ATOM_MULTIPLE = 4
"""The number of atoms is a multiple of it, as the pattern 2:4 needs."""
SHARES = (0.4, 0.6, 0.8, 1.0)
"""Shares of the weight's numbers at which curves are measured."""
ROUNDS = 3
"""Rounds of the solver at each size: a survey then takes about as long as compressing."""
MASK = 1 / 16
"""The size of a mask's bit as a share of a number, roughly: where the points lie does not matter much."""
NOTHING = 1e-9
"""Share of a weight's energy below which it counts as zero."""


def side_of(method: CoSpaDiOptions, n_outputs: int, n_inputs: int) -> Coded:
    """The side that layers with one dictionary have codes for: the given one, or the more numerous."""
    if method.coded is not Coded.AUTO:
        return method.coded
    return Coded.INPUTS if n_outputs < n_inputs and method.codes_inputs else Coded.OUTPUTS


def curves(
    method: CoSpaDiOptions, weights: Sequence[Tensor], stats: Sequence[Statistics]
) -> list[Survey]:
    """Surveys of weights (o, i) with one input: error curves of one dictionary for all, or of one each.

    Each weight has a dictionary of its own where inputs have codes.
    """
    side = _side(method, weights)
    if len(weights) > 1 and side is Coded.INPUTS:
        pairs = zip(weights, stats, strict=True)
        return [found for w, own in pairs for found in curves(method, [w], [own])]
    stack = stacked(weights, stats[0], side, method.damping)
    lines = stack.lines()
    sizes = sorted({_atoms_for(share, lines, method.resolved_ratio) for share in SHARES})
    lost = [_split(lines.lost(*_coded(method, lines, k)), stack) for k in sizes]
    # A larger dictionary could do what a smaller one does.
    falling = list(zip(*(accumulate(each, min) for each in zip(*lost, strict=True)), strict=True))
    energies = _split((lines.goal * lines.target).sum(1), stack)
    return [
        Survey(
            points=tuple((k, each[number]) for k, each in zip(sizes, falling, strict=True)),
            energy=energies[number],
            cost=fisher_cost(method.resolved_importance, own),
        )
        for number, own in enumerate(stats)
    ]


def trials(
    method: CoSpaDiOptions,
    weights: Sequence[Tensor],
    surveys: Sequence[Survey],
    stats: Sequence[Statistics],
) -> list[Trial]:
    """Trials of each weight with a dictionary of about the share of numbers that `keep` says, after the first rounds.

    Raises LayerError for a weight of zeros, of which no error can be measured.
    """
    side = _side(method, weights)
    if len(weights) > 1 and side is Coded.INPUTS:
        triples = zip(weights, surveys, stats, strict=True)
        return [found for w, own, each in triples for found in trials(method, [w], [own], [each])]
    stack = stacked(weights, stats[0], side, method.damping)
    lines = stack.lines()
    k = _atoms_for(method.resolved_keep, lines, method.resolved_ratio)
    codes = stack.codes(_coded(method, lines, k)[0], method.nonzeros(k), method.pattern)
    if side is Coded.INPUTS:
        codes = [each.T for each in codes]
    atoms, together = stack.dictionary(codes), torch.cat(codes).double()
    product = (together @ atoms if side is Coded.OUTPUTS else atoms @ together).float()
    lost = [max(lost_at(survey, k), NOTHING * survey.energy) for survey in surveys]
    if min(lost) <= 0:
        raise LayerError("its weight is zero, so no error can be measured; --exclude it")
    rows = product.split([len(weight) for weight in weights])
    return [Trial(Dense(part), each) for part, each in zip(rows, lost, strict=True)]


def lost_at(survey: Survey, k: int) -> float:
    """The squared error with k atoms: log-linear between measured sizes, constant beyond the last.

    With no atoms it is the energy of the weight.
    """
    points = [(0, survey.energy), *survey.points]
    above = bisect.bisect_right([size for size, _ in points], k)
    if above == len(points):
        return points[-1][1]
    (low, most), (high, least) = points[above - 1], points[above]
    if most <= 0 or least <= 0:
        return least if k == high else most
    part = (k - low) / (high - low)
    return math.exp((1 - part) * math.log(most) + part * math.log(least))


def _side(method: CoSpaDiOptions, weights: Sequence[Tensor]) -> Coded:
    return side_of(method, sum(len(weight) for weight in weights), weights[0].shape[1])


def _split(lost_n: Tensor, stack: Stacked) -> list[float]:
    """The loss of each weight, in the weight's own scale, from that of its lines."""
    n_lines = [len(weight) for weight in stack.weights] if len(stack.weights) > 1 else [len(lost_n)]
    parts = zip(lost_n.double().split(n_lines), stack.scales, strict=True)
    return [max(float(part.sum()), 0.0) / scale**2 for part, scale in parts]


def _atoms_for(share: float, lines: Lines, ratio: float) -> int:
    """The number of atoms that, with their codes, take about a share of the numbers: a multiple of 4, at least 4."""
    n, d = lines.target.shape
    k = share * n * d / (d + n * (1 / ratio + MASK))
    return max(ATOM_MULTIPLE, int(k) // ATOM_MULTIPLE * ATOM_MULTIPLE)


def _coded(method: CoSpaDiOptions, lines: Lines, k: int) -> tuple[Tensor, Tensor]:
    s = method.nonzeros(k)
    if method.solver.iterates:
        return alternating(lines, k, s, method.pattern, ROUNDS)
    return oneshot(lines, k, s, method.pattern)
