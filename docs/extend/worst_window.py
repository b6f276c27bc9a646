"""A metric: nats per token in the window of held-out text that the model predicts worst."""

from __future__ import annotations

from compress.report.metrics import Changed, Direction, Metric, ratio_changed
from compress.report.numbers import Decimals, Measured
from compress.report.sides import Side, Sides
from eval.paired import PairedRatio


def worst_window(side: Side) -> Measured | None:
    """The value for one of the two models; None if no text was evaluated."""
    if side.scores is None or side.scores.fidelity is None:
        return None
    return Measured(max(it.nll / it.n_tokens for it in side.scores.fidelity.windows), 0.001)


def worst_change(sides: Sides) -> Changed | None:
    """How it changed from the original to the compressed model."""
    before, after = worst_window(sides.before), worst_window(sides.after)
    if before is None or after is None:
        return None
    return ratio_changed(PairedRatio(ratio=after.value / before.value, interval=None, n_windows=16))


WORST_WINDOW = Metric(
    key="worst_window",
    label="worst window",
    unit="nats/token",
    direction=Direction.LOWER,
    format=Decimals(5),
    help="mean negative log-likelihood of the hardest window",
    read=worst_window,
    paired=worst_change,
    hub="nll",
)
