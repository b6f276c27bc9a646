"""Scores of an evaluation: plain values, ready for a report.

A standard error is None where it is not known (a single window or item, or a metric that is no mean
over items); it is never zero for lack of knowledge.
"""

import math
from collections.abc import Sequence
from dataclasses import field

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from eval.errors import EvalError

MOST_NATS = 700.0
"""Nats a token whose perplexity a double can hold; a guess among 100,000 tokens costs 12."""
ACCURACY = "accuracy"
"""The task under which the accuracy of a classifier of whole sequences is told."""
STRICT = ConfigDict(strict=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
"""Values are what their types say, in Python as in JSON; a docstring of a field is its description in a JSON Schema.

A field that came later has a default, so that the reports of earlier versions are still read.
"""


@dataclass(frozen=True, config=STRICT)
class WindowSums:
    """Sums over the predicted tokens of one window of text."""

    n_tokens: int
    nll: float
    """Negative log-likelihood, nats."""
    kl: float
    """KL(original || model), nats."""
    n_agreements: int
    """Positions where the likeliest token is the original's."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Sample:
    """A prompt and what each model wrote after it, likeliest token by likeliest token."""

    prompt: str
    framing: str
    """"chat": a user's message in the tokenizer's chat template; "text": as it is."""
    before: str
    after: str


@dataclass(frozen=True, config=STRICT)
class Fidelity:
    """How a model predicts a text, and how far it is from the original on it.

    `kl` is KL(original || model) in nats a token, `top1_agreement` the share of positions where
    both models' likeliest token is the same. For the original itself they are 0 and 1, exactly.
    Standard errors are over windows of text, not over tokens, which are not independent.
    """

    perplexity: float
    perplexity_stderr: float | None
    kl: float
    kl_stderr: float | None
    top1_agreement: float
    top1_stderr: float | None
    n_tokens: int
    windows: tuple[WindowSums, ...] = field(default=(), repr=False)
    """Sums of every window, in the text's order: with another model's they give paired differences."""


@dataclass(frozen=True, config=STRICT)
class TaskScore:
    """One metric of one task or group of tasks.

    `per_item` holds the metric of each item in order, where the value is their mean; else it is
    empty. Two models that saw the same items can be compared with `paired_difference`.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    n_items: int
    version: str
    higher_is_better: bool
    per_item: tuple[float, ...] = field(default=(), repr=False)
    n_shot: int | None = None
    """Examples in the prompt; None for a group of tasks, and where there is no prompt."""


@dataclass(frozen=True, config=STRICT)
class Footprint:
    """Footprint of a checkpoint: bytes, tokens per second for one sequence, bytes of memory.

    `bits_per_weight` is 8 * tensor_bytes / n_parameters_reference, so scales, indices, adapters
    and everything that was left as it was are paid for. `decode_tokens_per_s` is None for a model
    that writes nothing, `peak_rss_bytes` if it was not measured.
    """

    bytes_on_disk: int
    tensor_bytes: int
    n_parameters_reference: int
    bits_per_weight: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float | None
    peak_rss_bytes: int | None
    device: str


@dataclass(frozen=True, config=STRICT)
class Scores:
    """All scores of one model; None or empty for what was not evaluated."""

    fidelity: Fidelity | None
    tasks: tuple[TaskScore, ...]
    footprint: Footprint | None


def no_progress(stage: str, done: int, total: int) -> None:
    """Ignores progress."""


def exp_of_nats(nats: float) -> float:
    """The perplexity, or the ratio of two, of so many nats a token. Raises EvalError above `MOST_NATS`."""
    if nats > MOST_NATS:
        raise EvalError(
            f"fidelity: {nats:.4g} nats a token, of which no perplexity can be told (at most {MOST_NATS:.0f}); the "
            "model is broken: look at the layers' errors"
        )
    return math.exp(nats)


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error (sample deviation over sqrt(n)); None for fewer than two values.

    Raises:
        EvalError: there are no values.
    """
    if not values:
        raise EvalError("a mean needs at least one value; there is none")
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def paired_difference(after: TaskScore, before: TaskScore) -> tuple[float, float | None]:
    """Mean of (after - before) over the items both were scored on, and its standard error.

    Much sharper than the two scores' own errors suggest, for most items do not change.

    Raises:
        EvalError: the two are not the same metric of the same task version on equally many items,
            or the metric is no mean over items.
    """
    return mean_and_stderr([mine - other for mine, other in paired_items(after, before)])


def paired_items(after: TaskScore, before: TaskScore) -> list[tuple[float, float]]:
    """(after, before) of each item both were scored on.

    Raises:
        EvalError: as `paired_difference`.
    """
    for name in ("task", "metric", "version", "n_items"):
        mine, other = getattr(after, name), getattr(before, name)
        if mine != other:
            raise EvalError(f"paired_difference: {name} {mine!r} and {other!r} cannot be compared")
    if not after.per_item or len(after.per_item) != len(before.per_item):
        raise EvalError(
            f"paired_difference: {after.task} {after.metric} has no score for each item; "
            "compare the two values instead"
        )
    return list(zip(after.per_item, before.per_item, strict=True))


def primary(scores: Sequence[TaskScore]) -> dict[str, TaskScore]:
    """The one metric of each task to show first: acc_norm if the task has it, else its first."""
    chosen: dict[str, TaskScore] = {}
    for score in scores:
        if score.task not in chosen or score.metric == "acc_norm":
            chosen[score.task] = score
    return chosen
