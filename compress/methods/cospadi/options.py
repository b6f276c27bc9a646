"""Which options of a dictionary method go together."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from compress.errors import RecipeError
from compress.methods.cospadi.planner import DEPTH, AtomAllocation, Share
from compress.solvers.masks import Pattern
from compress.solvers.rank_allocation import Importance
from compress.solvers.sparse_coding import Coded

if TYPE_CHECKING:
    from compress.methods.cospadi.method import CoSpaDi


class Solver(enum.StrEnum):
    """How codes and atoms are found."""

    ADMM = "admm"
    """Codes by ADMM, atoms by least squares, in turn."""
    KSVD = "ksvd"
    """The paper's: codes of outputs by matching pursuit, atoms by K-SVD. Takes hundreds of times as long."""
    ONESHOT = "oneshot"
    """Principal components, their largest coefficients, one fit."""

    @property
    def iterates(self) -> bool:
        """Whether there are rounds."""
        return self is not Solver.ONESHOT


ROUNDS = {Solver.ADMM: 12, Solver.KSVD: 60}


def refuse_idle(method: CoSpaDi) -> None:
    """Raises RecipeError for an option that others would leave without effect."""
    if method.pattern is Pattern.TWO_OF_FOUR and method.ratio not in (2.0, 2.5):
        raise RecipeError(
            f"method.ratio: {method.ratio} does nothing where two of every four are nonzero"
        )
    if method.share is Share.INPUTS and method.coded is Coded.INPUTS:
        raise RecipeError(
            "method.coded: inputs have a dictionary of outputs, which layers with one input cannot share; "
            "give --share none, or depth"
        )
    _refuse_idle_depth(method)
    if method.solver is Solver.ONESHOT and method.rounds is not None:
        raise RecipeError(f"method.rounds: {method.rounds} does nothing with --solver oneshot")
    if method.solver is Solver.KSVD and method.pattern is not Pattern.FREE:
        raise RecipeError(
            f"method.pattern: {method.pattern} is nothing that ksvd can find; use --solver admm"
        )
    if method.solver is Solver.KSVD and method.coded is Coded.INPUTS:
        raise RecipeError("method.coded: ksvd codes outputs only; use --solver admm")
    if method.atoms is not None and (method.budget or method.allocation is AtomAllocation.ERRORS):
        raise RecipeError(
            f"method.atoms: {method.atoms} for every dictionary leave a budget or a plan by errors nothing to do"
        )
    if method.allocation is AtomAllocation.UNIFORM and method.importance is not Importance.RELATIVE:
        raise RecipeError(
            f"method.importance: {method.importance} serves --allocation errors, and does nothing in a uniform plan"
        )


def _refuse_idle_depth(method: CoSpaDi) -> None:
    if method.share is not Share.DEPTH and method.depth != DEPTH:
        raise RecipeError(f"method.depth: {method.depth} does nothing without --share depth")
    if method.depth < 2:
        raise RecipeError(f"method.depth: {method.depth} blocks share nothing; 2 or more")
    if method.share is Share.DEPTH and method.allocation is AtomAllocation.ERRORS:
        raise RecipeError(
            "method.allocation: errors are measured of dictionaries within a block; use uniform with --share depth"
        )
