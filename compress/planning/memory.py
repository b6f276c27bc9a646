"""The memory that compressing takes at its peak, from shapes alone.

While a block is worked on, the process holds what it held before (interpreter and libraries), the block's weights, the
statistics of its inputs, the hidden states of the calibration text, one batch on its way through the block, and what
the solver makes of one group of layers. Verification and evaluation come later, with other sums.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import psutil
import torch

from calibration.experts.module import Experts, experts_in
from calibration.memory import trim
from calibration.skeleton import PartLoader, decoder_blocks
from calibration.statistics.base import ObservedStatistic, PairStatistic, Statistic
from calibration.text.data import Tokens
from compress.models.names import block_and_place
from compress.planning.groups import STACK_ENTRIES, entries_in_a_stack
from compress.planning.layer import PlannedLayer
from compress.planning.plan import Plan

FP32, FP64 = 4, 8
SOLVER_SQUARES = 6
"""Matrices as large as a Gram that a solver holds besides it: damped, its factors and their inverse, in fp64."""
FURTHER_SQUARES = 3
"""As many for each further input of layers that share something: damped, its factors, in fp64."""
SOLVER_WEIGHTS = 8
"""Matrices as large as a weight: in fp32 and fp64, the error, the codes and the form's dense one."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of compression, by what holds them."""

    process: int
    weights: int
    statistics: int
    hidden: int
    batch: int
    solver: int

    @property
    def total(self) -> int:
        """All of it."""
        return (
            self.process
            + self.weights
            + self.statistics
            + self.hidden
            + max(self.batch, self.solver)
        )

    def lines(self) -> Iterator[str]:
        """The line of a plan."""
        parts = {
            "a block's weights": self.weights,
            "statistics": self.statistics,
            "hidden states": self.hidden,
            "a batch" if self.batch > self.solver else "the solver": max(self.batch, self.solver),
            "the process itself": self.process,
        }
        told = ", ".join(f"{name} {n_bytes / 1e9:.2f}" for name, n_bytes in parts.items())
        yield f"memory at the peak of compression: about {self.total / 1e9:.2f} GB ({told})"


def peak_memory(
    plan: Plan,
    loader: PartLoader,
    tokens: Tokens,
    batch_size: int,
    needs: Collection[type[Statistic]],
) -> Memory:
    """What the block that takes the most will take; `loader` and its skeleton need no weights."""
    prefix, blocks = decoder_blocks(loader.model)
    at_once, width = plan.blocks_at_once, loader.model.dtype.itemsize
    layers = _by_block(plan, prefix)
    ways = 2 if PairStatistic.among(needs) else 1
    trim()  # what planning itself has loaded and freed is none of it
    embeddings: Any = loader.model.get_input_embeddings()
    return Memory(
        process=psutil.Process().memory_info().rss,
        weights=at_once
        * max(width * sum(p.numel() for p in block.parameters()) for block in blocks),
        statistics=at_once * max(_statistics(found, needs, loader) for found in layers.values()),
        hidden=ways * tokens.n_tokens * embeddings.embedding_dim * width,
        batch=_batch(loader, batch_size * tokens.input_ids.shape[1], width),
        solver=max(_solver(found, loader) for found in _sharing(plan)) + _stack(plan, loader),
    )


def _by_block(plan: Plan, prefix: str) -> dict[str, list[PlannedLayer]]:
    found: dict[str, list[PlannedLayer]] = {}
    for layer in plan.layers:
        inside = layer.name.removeprefix(f"{prefix}.").partition(".")[0]
        found.setdefault(inside, []).append(layer)
    return found


def _statistics(
    layers: Collection[PlannedLayer], needs: Collection[type[Statistic]], loader: PartLoader
) -> int:
    """Of the inputs of a block's layers: an expert's gate and up read one, other layers are taken to read their own.

    One more for each place in which experts stand, for the sum over all of them.
    """
    kinds = ObservedStatistic.among(needs)
    inputs: dict[object, tuple[int, int]] = {}
    for layer in layers:
        inputs |= {key: layer.shape for key in _inputs(layer, loader)}
    return FP64 * sum(_numbers(kinds, shape) for shape in inputs.values())


def _inputs(layer: PlannedLayer, loader: PartLoader) -> Iterator[object]:
    for path in loader.experts:
        if layer.name.startswith(f"{path}."):
            expert, width = layer.name.removeprefix(f"{path}.").partition(".")[0], layer.shape[1]
            yield from ((path, expert, width), (path, "sum", width))
            return
    yield layer.name


def _numbers(kinds: Collection[type[Statistic]], shape: tuple[int, int]) -> int:
    """Numbers in memory: stored ones leave out half of a symmetric matrix."""
    return sum(2 * kind.n_numbers(shape) for kind in kinds)


def _batch(loader: PartLoader, n_tokens: int, width: int) -> int:
    """One batch inside a block: what its layers read and write, each kept until the block is done."""
    _, blocks = decoder_blocks(loader.model)
    return max(_activations(block, n_tokens) for block in blocks) * width


def _activations(block: torch.nn.Module, n_tokens: int) -> int:
    experts = dict(experts_in(block))
    inside = sum(_of_experts(module) for module in experts.values())
    outside = sum(
        sum(part.weight.shape)
        for name, part in block.named_modules()
        if isinstance(part, torch.nn.Linear)
        and not any(name.startswith(f"{path}.") for path in experts)
    )
    return n_tokens * (inside + outside)


def _of_experts(module: Experts) -> int:
    """Numbers for each token: as many experts as a router is likely to choose, of which none is certain."""
    layout, top = module.layout, min(module.layout.n_experts, 8)
    return top * (2 * layout.hidden + 4 * layout.inner)


def _sharing(plan: Plan) -> Collection[list[PlannedLayer]]:
    """Layers that share something together, and each other layer alone."""
    found: dict[str, list[PlannedLayer]] = {}
    for layer in plan.layers:
        found.setdefault(layer.stored_by, []).append(layer)
    return found.values()


def _stack(plan: Plan, loader: PartLoader) -> int:
    """Of the experts that are solved at once: as many as `STACK_ENTRIES` hold, or all that there are."""
    experts = tuple(f"{path}." for path in loader.experts)
    entries = [entries_in_a_stack(one.shape) for one in plan.layers if one.name.startswith(experts)]
    return FP32 * min(STACK_ENTRIES, sum(entries))


def _solver(layers: Sequence[PlannedLayer], loader: PartLoader) -> int:
    """Of layers that are solved together: in one block they read one input, but those of experts each their own."""
    experts = tuple(f"{path}." for path in loader.experts)
    inputs = {
        next(_inputs(layer, loader))
        if layer.name.startswith(experts)
        else block_and_place(layer.name)[0]
        for layer in layers
    }
    n_squares = SOLVER_SQUARES + FURTHER_SQUARES * (len(inputs) - 1)
    weights = SOLVER_WEIGHTS * sum(prod(layer.shape) for layer in layers) // 2
    return FP64 * (n_squares * layers[0].shape[1] ** 2 + weights)
