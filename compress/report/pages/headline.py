"""What a reader wants to know first: a handful of figures, each with what it was before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from compress.report.pages.tasks import perplexity_text
from compress.report.report import Report
from compress.report.summary import decimal, megabytes
from eval.scores import Fidelity, Footprint

_HUNDRED = 100.0


@dataclass(frozen=True)
class Stat:
    """One figure; `was` and `change` are empty where there is nothing to compare with."""

    label: str
    value: str
    unit: str = ""
    was: str = ""
    change: str = ""


def headline(report: Report) -> list[Stat]:
    """Size first, then what it costs in quality, then speed; only what was measured."""
    scores = report.scores
    stats = [_size(report)]
    if scores is None:
        return [*stats, _layer_bits(report), *_layer_error(report)]
    stats.append(_bits(report))
    if scores.before.fidelity is not None and scores.after.fidelity is not None:
        stats.extend(_fidelity(scores.before.fidelity, scores.after.fidelity))
    if scores.before.footprint is not None and scores.after.footprint is not None:
        stats.extend(_speed(scores.before.footprint, scores.after.footprint))
    return [*stats, *_layer_error(report)]


def lead(report: Report) -> str:
    """The result in a sentence."""
    totals = report.totals
    sizes = f"{megabytes(totals.tensor_bytes_before)} became {megabytes(totals.tensor_bytes_after)}"
    scores = report.scores
    if scores is None or scores.before.fidelity is None or scores.after.fidelity is None:
        return sizes
    before, after = scores.before.fidelity.perplexity, scores.after.fidelity.perplexity
    return f"{sizes}, perplexity {decimal(before, 2)} became {decimal(after, 2)}"


def _size(report: Report) -> Stat:
    totals = report.totals
    value, _, unit = megabytes(totals.tensor_bytes_after).partition(" ")
    smaller = totals.tensor_bytes_before / totals.tensor_bytes_after
    times = f"{smaller:.2f}× smaller" if smaller > 1 else f"{1 / smaller:.2f}× larger"
    return Stat("Size", value, unit, megabytes(totals.tensor_bytes_before), times)


def _layer_bits(report: Report) -> Stat:
    totals = report.totals
    bits = totals.layer_bits_per_weight
    was = bits * totals.layer_bytes_before / totals.layer_bytes_after
    return Stat("Bits per weight", f"{bits:.2f}", "", f"{was:.0f}", "in the compressed layers")


def _layer_error(report: Report) -> Iterator[Stat]:
    error = report.totals.relative_error
    if error is not None:
        percent = f"{error * _HUNDRED:.1f}"
        yield Stat("Output error", percent, "%", change="of all layers, relative")


def _bits(report: Report) -> Stat:
    scores = report.scores
    if scores is None or scores.after.footprint is None:
        return _layer_bits(report)
    was = (
        f"{scores.before.footprint.bits_per_weight:.2f}"
        if scores.before.footprint is not None
        else ""
    )
    bits = scores.after.footprint.bits_per_weight
    layers = f"{report.totals.layer_bits_per_weight:.2f} in the layers"
    return Stat("Bits per weight", f"{bits:.2f}", "", was, layers)


def _fidelity(before: Fidelity, after: Fidelity) -> Iterator[Stat]:
    was, change = decimal(before.perplexity, 2), perplexity_text(before, after)
    yield Stat("Perplexity", decimal(after.perplexity, 2), "", was, change)
    spread = "" if after.kl_stderr is None else f" ± {after.kl_stderr:.4f}"
    yield Stat("KL divergence", f"{after.kl:.4f}", "nats", change=f"a token{spread}")
    agreement = f"{after.top1_agreement * _HUNDRED:.1f}"
    yield Stat("Top-1 agreement", agreement, "%", change="same likeliest token")


def _speed(before: Footprint, after: Footprint) -> Iterator[Stat]:
    known = (before.decode_tokens_per_s, after.decode_tokens_per_s)
    if known[0] is not None and known[1] is not None:
        yield _tokens("Writing", known[0], known[1])
    yield _tokens("Reading", before.prefill_tokens_per_s, after.prefill_tokens_per_s)


def _tokens(label: str, before: float, after: float) -> Stat:
    digits = 1 if after < _HUNDRED else 0
    times = f"{after / before:.2f}× as fast"
    return Stat(label, f"{after:.{digits}f}", "tokens/s", f"{before:.{digits}f}", times)
