"""The outputs that layers are fitted to after compressed blocks: the weight's own, or the original model's.

Shapes: o = out_features, i = in_features.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable, Sequence

from torch import Tensor

from calibration.statistics.collection import Statistics
from compress.solvers.linalg import carried

TARGET_DAMPING = 0.01


class FitTarget(enum.StrEnum):
    """The outputs that a layer is fitted to, on the inputs that the compressed blocks before it give."""

    LAYER = "layer"
    """The weight's outputs on these inputs."""
    ORIGINAL = "original"
    """The original model's outputs for the same tokens, so that a layer takes back what came before it."""


def towards_original(
    weights: Sequence[Tensor],
    stats: Statistics,
    moments: Callable[[], tuple[Tensor, Tensor]],
    key: Hashable = "",
) -> list[Tensor]:
    """W E[x x'^T] E[x' x'^T]^-1 of weights W (o, i): (o, i) each, fp64.

    It maps inputs x', from compressed layers, to the original's outputs W x with the least error: what is nearest to it
    in the metric of E[x' x'^T] is best for those outputs (AA-SVD, 2026, arXiv:2604.02119). `moments` gives E[x' x'^T]
    and E[x x'^T], (i, i) each, fp64, to be overwritten; `key` tells one kind of them from another.
    """
    carry_ii = stats.once(("cross_gram", key), lambda: carried(*moments(), TARGET_DAMPING))
    return [weight.double() @ carry_ii for weight in weights]
