"""Statistics of experts that saw few tokens: those of the layer's other experts are mixed in.

An expert that n tokens were sent to is filled up with averages over all its layer's experts, as if it had seen the
fewest that its Gram needs: with weight w = 1 - n / n_fewest they are those of the layer, and with 1 - w its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from calibration.experts.module import DOWN, Experts
from calibration.experts.routing import Routing
from calibration.statistics.collection import Statistics

TOKENS_PER_FEATURE = 1
"""Fewest tokens for each feature that a layer reads: with fewer the Gram is singular whatever they are."""


@dataclass(frozen=True)
class Routed:
    """How much of the calibration text an expert's statistics are of."""

    n_tokens: int
    """Tokens that the router sent to it."""
    pooled: float
    """The weight of the layer's other tokens in its statistics, 0 to 1."""


Filled = tuple[tuple[str, ...], Statistics, Routed | None]
"""Names of layers that read one input, its statistics, and for those of an expert how they were collected."""


def filled(
    found: Sequence[tuple[tuple[str, ...], Statistics]],
    experts: Mapping[str, Experts],
    names: frozenset[str],
    routing: Routing,
) -> list[Filled]:
    """The inputs that were found, and those of experts that saw no token; each expert's with what it lacks filled in.

    `experts`: by full name; `names`: the layers whose inputs are wanted. Where no expert of a layer saw a token, none
    is added.
    """
    own = {name: stats for group, stats in found for name in group}
    done: dict[str, Filled] = {}
    for path, module in experts.items():
        for groups in _groups(path, module, names):
            have = {n: own[group[0]] for n, group in groups.items() if group[0] in own}
            if not have:
                continue
            pool = None if routing is Routing.ALL else _sum(list(have.values()))
            for number, group in groups.items():
                done[group[0]] = group, *_one(have.get(number), pool, module, number, routing)
    return [*_in_order(found, done), *done.values()]


def _in_order(
    found: Sequence[tuple[tuple[str, ...], Statistics]], done: dict[str, Filled]
) -> Iterator[Filled]:
    """The inputs as they were found; of several experts', and other layers', the input of each by itself.

    Takes those of experts out of `done`.
    """
    inside = {name for group, _, _ in done.values() for name in group}
    for group, stats in found:
        if others := tuple(name for name in group if name not in inside):
            yield others, stats, None
        yield from (done.pop(name) for name in group if name in done)


def filled_gradients(
    found: Mapping[str, Statistics], experts: Mapping[str, Experts], names: frozenset[str]
) -> dict[str, Statistics]:
    """Statistics of gradients by layer, with what an expert lacks filled in, as `filled` does."""
    done = dict(found)
    for path, module in experts.items():
        for projection in module.layout.projections:
            every = {n: f"{path}.{n}.{projection}" for n in range(module.layout.n_experts)}
            have = {n: found[name] for n, name in every.items() if name in found}
            if not have:
                continue
            pool = _sum(list(have.values()))
            for number, name in every.items():
                if name in names:
                    done[name], _ = _one(have.get(number), pool, module, number, Routing.ROUTED)
    return done


def _groups(
    path: str, module: Experts, names: frozenset[str]
) -> Iterator[dict[int, tuple[str, ...]]]:
    """For what experts read, and for what the last layer of each reads: the wanted layers by the expert's number."""
    before = tuple(p for p in module.layout.projections if p != DOWN)
    for role in (before, (DOWN,)):
        every = {
            number: tuple(name for p in role if (name := f"{path}.{number}.{p}") in names)
            for number in range(module.layout.n_experts)
        }
        if groups := {number: group for number, group in every.items() if group}:
            yield groups


def _one(
    own: Statistics | None,
    pool: Statistics | None,
    module: Experts,
    number: int,
    routing: Routing,
) -> tuple[Statistics, Routed | None]:
    """`pool`: the sum over the layer's experts; None if each has seen all tokens."""
    if pool is None:
        assert own is not None
        return own, Routed(module.counts[number], 0.0) if own else None
    if not pool:  # nothing is collected but which layers read one tensor
        return pool, None
    seen = 0 if own is None else n_tokens(own)
    if routing is Routing.POOLED:
        return pool, Routed(seen, 1.0)
    fewest = min(TOKENS_PER_FEATURE * width(pool), n_tokens(pool))
    if own is not None and seen >= fewest:
        return own, Routed(seen, 0.0)
    share = (fewest - seen) / n_tokens(pool)
    more = Statistics({kind: value.scaled(share) for kind, value in pool.items()})
    return (more if own is None else own.absorb(more)), Routed(seen, 1 - seen / fewest)


def _sum(all_stats: Sequence[Statistics]) -> Statistics:
    """The sum, in memory of its own."""
    first, *others = all_stats
    total = Statistics({kind: value.scaled(1.0) for kind, value in first.items()})
    for other in others:
        total = total.absorb(other)
    return total


def n_tokens(stats: Statistics) -> int:
    """The most tokens that one of the statistics is of: some are of a part, as those that are held out."""
    found: int = max(value.n_tokens for value in stats.values())
    return found


def width(stats: Statistics) -> int:
    """Features of the input."""
    tensors = (tensor for value in stats.values() for tensor in value.tensors().values())
    return max(int(tensor.shape[-1]) for tensor in tensors)
