"""The experts of a report: the calibration tokens, error and bytes of each, and sentences on those that saw too few."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from compress.models.kinds import Kind, expert_of, kind_of
from compress.report.report import LayerReport, Report

MOST_NAMED = 5
"""Experts that a sentence names; it counts the others."""


@dataclass(frozen=True, kw_only=True)
class ExpertReport:
    """One compressed expert: what is known of its layers together."""

    module: str
    block: int
    number: int
    tokens: int
    """Calibration tokens that the router sent to it."""
    pooled: float
    """The largest weight of the layer's other experts in the statistics of one of its layers."""
    error: float | None
    """The mean of its layers' relative errors; None if none was measured."""

    @property
    def name(self) -> str:
        """As sentences name it."""
        return f"{self.number} of block {self.block}"


def experts_of(report: Report) -> list[ExpertReport]:
    """Every expert whose tokens were counted, in the model's order."""
    layers: dict[tuple[str, int], list[LayerReport]] = {}
    for layer in report.layers:
        expert = expert_of(layer.name)
        if expert is not None and layer.tokens is not None:
            layers.setdefault((expert.module, expert.number), []).append(layer)
    found = [_expert(module, number, own) for (module, number), own in layers.items()]
    return sorted(found, key=lambda one: (one.block, one.module, one.number))


def _expert(module: str, number: int, layers: Sequence[LayerReport]) -> ExpertReport:
    errors = [layer.relative_error for layer in layers if layer.relative_error is not None]
    expert = expert_of(layers[0].name)
    assert expert is not None  # those of others are not among the layers of an expert
    return ExpertReport(
        module=module,
        block=expert.block,
        number=number,
        tokens=max(layer.tokens or 0 for layer in layers),
        pooled=max(layer.pooled or 0.0 for layer in layers),
        error=sum(errors) / len(errors) if errors else None,
    )


def bytes_by_kind(report: Report) -> dict[Kind, tuple[int, int]]:
    """Bytes of each kind of weights, before and after, in the order of kinds."""
    sizes = [
        (one.name, one.bytes_before, one.bytes_after)
        for one in (*report.layers, *report.embeddings)
    ]
    sizes += [(one.name, one.n_bytes, one.n_bytes) for one in report.kept]
    found: dict[Kind, tuple[int, int]] = {}
    for name, before, after in sizes:
        sums = found.get(kind_of(name), (0, 0))
        found[kind_of(name)] = (sums[0] + before, sums[1] + after)
    return {kind: found[kind] for kind in Kind if kind in found}


def experts_line(report: Report) -> str:
    """A sentence for a terminal: "experts: 90 % of the compressed weights; 3 of 512 saw no calibration token".

    It is empty for a model without experts.
    """
    experts = experts_of(report)
    if not experts:
        return ""
    sizes = [(kind_of(layer.name), math.prod(layer.shape)) for layer in report.layers]
    share = sum(n for kind, n in sizes if kind is Kind.EXPERTS) / sum(n for _, n in sizes)
    unseen, few = _unseen(experts), _few(report, experts)
    some = f", {len(few):,} fewer than needed (pooled statistics mixed in)" if few else ""
    return (
        f"experts: {100 * share:.0f} % of the compressed weights; {len(unseen) or 'none'} of {len(experts):,} saw no "
        f"calibration token{some}"
    )


def experts_text(report: Report) -> str:
    """Sentences for pages and cards: how many experts saw no token or too few, the first of them, whose statistics."""
    experts = experts_of(report)
    n, how = len(experts), _routing(report)
    if how == "pooled":
        whose = "Every expert was compressed with the statistics of its whole layer (--moe pooled)."
    elif how == "all":
        whose = "Every expert was compressed with the statistics of all tokens (--moe all)."
    else:
        whose = "Each expert was compressed with the statistics of the tokens that the router sent to it."
    unseen, few = _unseen(experts), _few(report, experts)
    parts = [f"{n:,} experts in {len({one.module for one in experts})} layers.", whose]
    if unseen:
        parts.append(f"{len(unseen):,} of them saw no calibration token: {_named(unseen)}.")
    else:
        parts.append("All of them saw calibration tokens.")
    if few:
        parts.append(
            f"{len(few):,} saw fewer than their layers have inputs, so that statistics of the layer's other experts "
            f"were mixed in ({_named(few)}), by a weight of {few[0].pooled:.2f} at most, and of "
            f"{sum(one.pooled for one in few) / len(few):.2f} in the mean."
        )
    if unseen and how == "routed":
        parts.append("Those that saw none have the statistics of the others alone.")
    return " ".join(parts)


def _routing(report: Report) -> str:
    return str(report.recipe.get("moe", "routed"))


def _unseen(experts: Sequence[ExpertReport]) -> list[ExpertReport]:
    return [one for one in experts if one.tokens == 0]


def _few(report: Report, experts: Sequence[ExpertReport]) -> list[ExpertReport]:
    """Experts with some tokens, to whose statistics those of others were added for want of more; most first."""
    if _routing(report) == "pooled":
        return []
    few = [one for one in experts if one.tokens and one.pooled > 0]
    return sorted(few, key=lambda one: -one.pooled)


def _named(experts: Sequence[ExpertReport]) -> str:
    shown = ", ".join(one.name for one in experts[:MOST_NAMED])
    more = len(experts) - MOST_NAMED
    return f"{shown} and {more:,} more" if more > 0 else shown
