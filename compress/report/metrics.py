"""METRICS: the table of the figures that describe a compressed model. A row is a figure in every place that shows some.

Summaries, cards, pages, comparisons, CSV, JSON, sweeps and the schema of reports iterate over the table, so that
another figure is another row:

    METRICS["task_items"] = Metric(
        key="task_items",
        label="items scored",
        direction=Direction.HIGHER,
        format=Decimals(0),
        help="how many items the tasks had",
        read=lambda side: Measured(...) if side.scores is not None else None,
    )
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Flag, StrEnum, auto
from typing import TYPE_CHECKING

from compress.report.numbers import (
    NOTHING,
    Decimals,
    Format,
    Measured,
    Significant,
    decimal,
    in_bytes,
)
from compress.report.sides import Side, Sides
from eval.accuracy import accuracies, mean_accuracy

if TYPE_CHECKING:
    from eval.paired import Interval, PairedChange, PairedRatio
    from eval.scores import Fidelity, Footprint


class Direction(StrEnum):
    """Which end of a metric is the better one."""

    LOWER = "lower"
    HIGHER = "higher"


class Shown(Flag):
    """Places that show a metric for people; CSV and JSON hold them all."""

    SUMMARY = auto()
    """The rows "before" and "after" of a run: in the terminal, in Markdown and on the card."""
    HEADLINE = auto()
    """The figures at the top of a run's page."""
    TABLE = auto()
    """A column of tables that compare runs."""
    PARETO = auto()
    """A plot of size against it, and the choice of the best run at each size."""
    EVERYWHERE = SUMMARY | HEADLINE | TABLE | PARETO


@dataclass(frozen=True)
class Changed:
    """How a metric changed from the original to the compressed model, on the same items or windows."""

    value: float
    """A difference, or the ratio of what is after to what is before."""
    interval: Interval | None
    """Confidence interval; None for too few items."""
    verdict: str
    """Verdict in words: "no significant change"."""
    text: str
    """The value for people: "-0.050", "×1.047"."""
    interval_text: str
    """"-0.125 to +0.025"; empty without an interval."""


def ratio_changed(found: PairedRatio) -> Changed:
    """The change of what is told as a ratio."""
    return _changed(found.ratio, found.interval, found.verdict, lambda it: decimal(it, 3), "×")


def difference_changed(found: PairedChange) -> Changed:
    """The change of what is told as a difference."""
    return _changed(found.change, found.interval, found.verdict, lambda it: f"{it:+.3f}", "")


def _changed(
    value: float, interval: Interval | None, verdict: str, text: Callable[[float], str], sign: str
) -> Changed:
    ends = "" if interval is None else f"{text(interval.low)} to {text(interval.high)}"
    return Changed(value, interval, verdict, f"{sign}{text(value)}", ends)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One figure of a model: a row of METRICS."""

    key: str
    """Its name in CSV and JSON, in names of pictures, and for `sweep --by`."""
    label: str
    """Its name in sentences and in rows."""
    short: str = ""
    """Its name at the head of a column; empty: the label."""
    unit: str = ""
    """A unit that stands behind its name: "nats/token"; empty where the format writes it."""
    direction: Direction
    """Whether lower or higher values are better."""
    format: Format
    """Writes a value for people."""
    help: str
    """Definition in one line."""
    read: Callable[[Side], Measured | None]
    """Reads it from one of the two models; None where it was not measured."""
    is_exact: bool = False
    """Whether it is counted, so that it never has a standard error."""
    is_against_original: bool = False
    """Whether it compares a model with the original, so that the original has none."""
    paired: Callable[[Sides], Changed | None] | None = None
    """Its change on the same items, with an interval; None where that cannot be told."""
    beside: Callable[[Sides], str] | None = None
    """A remark below it on the page of a run; None: its change, or else its standard error."""
    option: str | None = None
    """The option of a recipe without which it is not measured."""
    hub: str | None = None
    """Its id among the hub's metrics (hf.co/metrics); None: it is not in a card's front matter."""
    far: float = math.inf
    """Runs whose value is more than so many times that of the best are left out of plots, which they would squeeze."""
    shown: Shown = Shown.EVERYWHERE
    """Places that show it to people."""

    @property
    def title(self) -> str:
        """Label and unit: "KL divergence, nats/token"."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    @property
    def column(self) -> str:
        """Its short name, without the unit: "KL"."""
        return self.short or self.label

    @property
    def heading(self) -> str:
        """The head of a column: "KL, nats/token"."""
        return f"{self.column}, {self.unit}" if self.unit else self.column

    def before(self, sides: Sides) -> Measured | None:
        """Its value for the original."""
        return None if self.is_against_original else self.read(sides.before)

    def after(self, sides: Sides) -> Measured | None:
        """Its value for the compressed model."""
        return self.read(sides.after)

    def changed(self, sides: Sides) -> Changed | None:
        """Its paired change, where there is one."""
        return None if self.paired is None else self.paired(sides)

    def text(self, measured: Measured | None) -> str:
        """The value with its standard error: "27.80 ± 0.12"; "-" for None."""
        return NOTHING if measured is None else str(self.format(measured))

    def loss(self, value: float) -> float:
        """The value, or its negative where higher is better: less is better in any case."""
        return value if self.direction is Direction.LOWER else -value


def shown_in(place: Shown) -> list[Metric]:
    """The metrics that a place shows, in the order of the table."""
    return [metric for metric in METRICS.values() if place in metric.shown]


def of_fidelity(
    read: Callable[[Fidelity], tuple[float, float | None]],
) -> Callable[[Side], Measured | None]:
    """Reads a value and its standard error from the comparison on held-out text."""

    def reader(side: Side) -> Measured | None:
        if side.scores is None or side.scores.fidelity is None:
            return None
        return Measured(*read(side.scores.fidelity))

    return reader


def of_footprint(read: Callable[[Footprint], float | None]) -> Callable[[Side], Measured | None]:
    """Reads a value from what a model costs."""

    def reader(side: Side) -> Measured | None:
        if side.scores is None or side.scores.footprint is None:
            return None
        return counted_value(read(side.scores.footprint))

    return reader


def counted_value(value: float | None) -> Measured | None:
    """A value without an error, or None for None."""
    return None if value is None else Measured(value)


def _ratio(key: str, sides: Sides) -> float | None:
    """The value after divided by the value before; None unless both are positive."""
    before, after = METRICS[key].before(sides), METRICS[key].after(sides)
    if before is None or after is None or not (before.value > 0 and after.value > 0):
        return None
    return after.value / before.value


def _smaller(sides: Sides) -> str:
    ratio = _ratio("n_bytes", sides)
    if ratio is None:
        return ""
    return f"{1 / ratio:.2f}× smaller" if ratio < 1 else f"{ratio:.2f}× larger"


def _whole_bits(sides: Sides) -> str:
    metric = METRICS["bits_per_weight"]
    after = metric.after(sides)
    return "" if after is None else f"{metric.text(after)} in the whole checkpoint"


def _speed(key: str) -> Callable[[Sides], str]:
    def text(sides: Sides) -> str:
        ratio = _ratio(key, sides)
        return "" if ratio is None else f"{ratio:.2f}× as fast"

    return text


def _accuracy(side: Side) -> Measured | None:
    found = () if side.scores is None else accuracies(side.scores, side.tasks)
    return Measured(*mean_accuracy(found)) if found else None


def _accuracy_change(sides: Sides) -> Changed | None:
    before, after = (
        () if side.scores is None else accuracies(side.scores, side.tasks)
        for side in (sides.before, sides.after)
    )
    if not after or not all(task.per_item for task in (*before, *after)):
        return None
    # Resampling needs numpy and scipy, and help on `sweep --by` needs the table without them.
    from eval.paired import mean_change

    return difference_changed(mean_change(before, after))


def _perplexity_change(sides: Sides) -> Changed | None:
    before, after = (
        None if side.scores is None else side.scores.fidelity
        for side in (sides.before, sides.after)
    )
    if before is None or after is None or not before.windows or not after.windows:
        return None
    from eval.paired import perplexity_ratio

    return ratio_changed(perplexity_ratio(before, after))


_ROWS = (
    Metric(
        key="n_bytes",
        label="whole checkpoint",
        short="size",
        direction=Direction.LOWER,
        format=in_bytes,
        help="bytes of all tensors of the checkpoint, those that were kept included",
        read=lambda side: counted_value(side.tensor_bytes),
        is_exact=True,
        beside=_smaller,
        shown=~Shown.PARETO,
    ),
    Metric(
        key="layer_bits_per_weight",
        label="bits per weight, layers",
        short="bits, layers",
        direction=Direction.LOWER,
        format=Decimals(2),
        help="bits per weight of the compressed layers, scales and factors included",
        read=lambda side: counted_value(side.layer_bits_per_weight),
        is_exact=True,
        beside=_whole_bits,
        shown=Shown.HEADLINE | Shown.TABLE,
    ),
    Metric(
        key="bits_per_weight",
        label="bits per weight, whole checkpoint",
        short="bits, all",
        direction=Direction.LOWER,
        format=Decimals(2),
        help="bits of the whole checkpoint per parameter of the original",
        read=of_footprint(lambda it: it.bits_per_weight),
        is_exact=True,
        shown=Shown.SUMMARY | Shown.TABLE,
    ),
    Metric(
        key="perplexity",
        label="perplexity",
        direction=Direction.LOWER,
        format=Significant(4),
        help="exp of the mean negative log-likelihood of a token of held-out text",
        read=of_fidelity(lambda it: (it.perplexity, it.perplexity_stderr)),
        paired=_perplexity_change,
        option="eval_windows",
        hub="perplexity",
        far=1000.0,
    ),
    Metric(
        key="kl",
        label="KL divergence",
        short="KL",
        unit="nats/token",
        direction=Direction.LOWER,
        format=Decimals(4),
        help="KL(original || model) of the next token on held-out text; 0 for the original itself",
        read=of_fidelity(lambda it: (it.kl, it.kl_stderr)),
        is_against_original=True,
        option="eval_windows",
    ),
    Metric(
        key="top1_agreement",
        label="top-1 agreement",
        short="top-1",
        direction=Direction.HIGHER,
        format=Decimals(1, scale=100.0, suffix="%"),
        help="positions of held-out text where the likeliest token is the original's",
        read=of_fidelity(lambda it: (it.top1_agreement, it.top1_stderr)),
        is_against_original=True,
        option="eval_windows",
        shown=~Shown.PARETO,
    ),
    Metric(
        key="accuracy",
        label="mean accuracy",
        short="accuracy",
        direction=Direction.HIGHER,
        format=Decimals(3),
        help="mean accuracy of the tasks, each weighing the same",
        read=_accuracy,
        paired=_accuracy_change,
        option="tasks",
        shown=Shown.TABLE | Shown.PARETO,
    ),
    Metric(
        key="prefill_tokens_per_s",
        label="prefill",
        unit="tokens/s",
        direction=Direction.HIGHER,
        format=Significant(3),
        help="tokens of a prompt read in a second, one sequence at a time",
        read=of_footprint(lambda it: it.prefill_tokens_per_s),
        is_exact=True,
        beside=_speed("prefill_tokens_per_s"),
        shown=~Shown.PARETO,
    ),
    Metric(
        key="decode_tokens_per_s",
        label="decode",
        unit="tokens/s",
        direction=Direction.HIGHER,
        format=Significant(3),
        help="tokens written in a second, one sequence at a time",
        read=of_footprint(lambda it: it.decode_tokens_per_s),
        is_exact=True,
        beside=_speed("decode_tokens_per_s"),
        shown=~Shown.PARETO,
    ),
    Metric(
        key="peak_rss_bytes",
        label="peak memory",
        short="memory",
        direction=Direction.LOWER,
        format=in_bytes,
        help="most bytes that a process held in memory while it measured the speed",
        read=of_footprint(lambda it: it.peak_rss_bytes),
        is_exact=True,
        shown=Shown.SUMMARY,
    ),
    Metric(
        key="relative_error",
        label="output error of the layers",
        short="error",
        direction=Direction.LOWER,
        format=Decimals(1, scale=100.0, suffix="%"),
        help="||(W - W') X|| over ||W X|| of all compressed layers together, on the calibration tokens",
        read=lambda side: counted_value(side.relative_error),
        is_exact=True,
        is_against_original=True,
        shown=Shown.HEADLINE,
    ),
)

METRICS: dict[str, Metric] = {metric.key: metric for metric in _ROWS}
"""Every metric by its key, in the order in which they are shown."""
