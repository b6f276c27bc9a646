"""The cost of an error in a layer, for plans that compare layers."""

from __future__ import annotations

from calibration.statistics.collection import Statistics
from calibration.statistics.gradient_energy import GradientEnergy
from compress.errors import LayerError
from compress.families.base import Survey
from compress.solvers.rank_allocation import Importance


def cost_of_error(importance: Importance, survey: Survey) -> float:
    """The cost of a unit of a surveyed layer's squared error."""
    match importance:
        case Importance.RELATIVE:
            return 1 / survey.total if survey.total > 0 else 1.0
        case Importance.FISHER | Importance.KL:
            return survey.cost
    return 1.0


def fisher_cost(importance: Importance, stats: Statistics) -> float:
    """The mean squared gradient of the loss by an output, if that is what errors cost; 1 if not.

    Raises LayerError if the loss does not depend on the layer.
    """
    if importance is not Importance.FISHER:
        return 1.0
    if GradientEnergy not in stats:
        raise LayerError("the loss does not depend on it, so it has no Fisher; --exclude it")
    cost: float = stats[GradientEnergy].mean()
    return cost
