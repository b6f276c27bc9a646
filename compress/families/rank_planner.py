"""Ranks for the layers of a factorisation: first the bytes they may take, then an allocation that spends them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from compress.errors import RecipeError
from compress.families.base import LayerShape, Survey
from compress.families.budget import layer_budget
from compress.families.factorisation_options import FactorisationOptions, parse_rank
from compress.families.importance import cost_of_error
from compress.models.names import matches
from compress.solvers.knapsack import BudgetError
from compress.solvers.rank_allocation import PLANS, Allocation, Curve, Ranks, by_spectrum, uniform


@dataclass(frozen=True)
class RankPlanner:
    """A planner of ranks under one method's options."""

    method: FactorisationOptions
    layers: Mapping[str, LayerShape]
    rest_bytes: int
    """The size of everything else in the checkpoint."""

    def ranks(self) -> Ranks:
        """A rank for each layer, None where it stays dense.

        Raises RecipeError for a budget that can't be, or naming the layer that it does not pay for, and for a rank
        that a layer cannot have.
        """
        given = self._given()
        if self.method.rank is not None:
            return {name: given.get(name, self.method.rank) for name in self.layers}
        curves = {name: self._curve(layer) for name, layer in self.layers.items()}
        taken = sum(curves[name].bytes_at(rank) for name, rank in given.items())
        free = {name: curve for name, curve in curves.items() if name not in given}
        # Given ranks for every layer leave nothing to a share; a budget is a bound in any case.
        if free or self.method.budget is not None:
            self._refuse_overspent(taken)
        ranks = given | (self._spread(free, self._budget() - taken) if free else {})
        return {name: ranks[name] for name in self.layers}

    def _refuse_overspent(self, taken: int) -> None:
        budget = self._budget()
        if taken > budget:
            raise RecipeError(
                f"the given ranks take {taken} bytes, and --{self._option} leaves {budget} for all layers; give lower "
                "ranks, or keep more",
                option="ranks",
            )

    @property
    def _option(self) -> str:
        """The name of the option that bounds the bytes."""
        return "keep" if self.method.budget is None else "budget"

    def _given(self) -> Ranks:
        """The ranks that `--ranks` gives, by layer. Raises RecipeError for a pattern that matches no layer."""
        given: Ranks = {}
        for entry in self.method.ranks:
            pattern, rank = parse_rank(entry)
            found = [name for name in self.layers if matches(name, pattern)]
            if not found:
                raise RecipeError(f"{pattern!r} in {entry!r} matches no layer", option="ranks")
            for name in found:
                shape = self.layers[name].shape
                if rank is not None and rank > min(shape):
                    raise RecipeError(
                        f"{entry!r} is above min(out, in) of {name} {shape}; give {min(shape)} or less",
                        option="ranks",
                    )
            given |= dict.fromkeys(found, rank)
        return given

    def _spread(self, curves: Mapping[str, Curve], budget: int) -> Ranks:
        """Ranks that take at most `budget` bytes together."""
        method = self.method
        if method.resolved_allocation is Allocation.UNIFORM:
            return self._evenly(curves, budget)
        if any(self.layers[name].survey is None for name in curves):
            # Provisional: what has no rank that saves bytes will be left dense.
            return {
                name: rank if curves[name].bytes_at(rank) < curves[name].dense_bytes else None
                for name, rank in uniform(curves, budget, method.resolved_multiple).items()
            }
        try:
            if method.resolved_allocation is Allocation.SPECTRUM:
                return by_spectrum(curves, budget, method.resolved_multiple, method.resolved_floor)
            return PLANS[method.resolved_allocation](curves, budget, method.resolved_multiple)
        except BudgetError as error:
            lower = (
                ", a smaller --floor" if method.resolved_allocation is Allocation.SPECTRUM else ""
            )
            raise RecipeError(
                f"with --allocation {method.resolved_allocation} {error}; keep more, give a smaller "
                f"--rank-multiple{lower}, or --exclude layers",
                option=self._option,
            ) from error

    def _curve(self, layer: LayerShape) -> Curve:
        nothing = torch.zeros(min(layer.shape), dtype=torch.float64)
        survey = Survey(nothing) if layer.survey is None else layer.survey
        planned = self.method.stored_as(layer)
        return Curve(
            layer.shape,
            layer.n_bytes,
            partial(planned.factor_bytes, layer.shape),
            survey.spectrum,
            cost_of_error(self.method.resolved_importance, survey),
        )

    def _budget(self) -> int:
        """The bytes that all layers may take together."""
        method = self.method
        return layer_budget(method.resolved_keep, method.budget, self.layers, self.rest_bytes)

    def _evenly(self, curves: Mapping[str, Curve], budget: int) -> Ranks:
        """Ranks by which every layer keeps the same share.

        Raises RecipeError naming a layer whose share pays for no rank.
        """
        ranks = uniform(curves, budget, self.method.resolved_multiple)
        share = budget / sum(curve.dense_bytes for curve in curves.values())
        for name, curve in curves.items():
            if ranks[name] is None:
                raise RecipeError(
                    f"{share:.3g} of the bytes of {name} {curve.shape} does not pay for rank "
                    f"{self.method.resolved_multiple}; keep more, or --exclude it, or give a smaller --rank-multiple",
                    option=self._option,
                )
        return ranks
