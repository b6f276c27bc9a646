"""A metric: nats per token, each window of held-out text weighing the same, whatever its length."""

from __future__ import annotations

from statistics import fmean

from compress.report.metrics import Changed, Direction, Metric, difference_changed
from compress.report.numbers import Decimals, Measured
from compress.report.sides import Side, Sides
from eval.paired import PairedChange, change_interval
from eval.scores import mean_and_stderr


def nats(side: Side) -> list[float]:
    """Nats per token of every window that a model read; empty if no text was evaluated."""
    if side.scores is None or side.scores.fidelity is None:
        return []
    return [window.nll / window.n_tokens for window in side.scores.fidelity.windows]


def window_nll(side: Side) -> Measured | None:
    """The value for one of the two models, with its standard error over windows."""
    return Measured(*mean_and_stderr(nats(side))) if nats(side) else None


def window_nll_change(sides: Sides) -> Changed | None:
    """The mean difference over the same windows, with its bootstrap interval."""
    before, after = nats(sides.before), nats(sides.after)
    if not before or len(before) != len(after):
        return None
    differences = [mine - other for mine, other in zip(after, before, strict=True)]
    found = PairedChange(
        change=fmean(differences),
        interval=change_interval([differences], seed=0),
        p_value=None,
        bootstrap_p=None,
        n_items=len(differences),
        n_up=sum(difference > 0 for difference in differences),
        n_down=sum(difference < 0 for difference in differences),
        higher_is_better=False,
    )
    return difference_changed(found)


WINDOW_NLL = Metric(
    key="window_nll",
    label="negative log-likelihood of a window",
    short="window NLL",
    unit="nats/token",
    direction=Direction.LOWER,
    format=Decimals(5),
    help="mean over windows of held-out text of the negative log-likelihood of a token",
    read=window_nll,
    paired=window_nll_change,
    option="eval_windows",
    hub="nll",
)
