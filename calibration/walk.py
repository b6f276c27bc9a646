"""The walk: one decoder block at a time, with the calibration tokens at its door.

    for block in walk(model, loader, stream):
        for shared in block.observe(needs):     # statistics of the inputs of its linear layers
            ...
        block.replace(name, module)             # put compressed layers in

Between two turns the tokens go through the block as the caller left it (or as it was, see `Propagate`). The block is
loaded before it is yielded and freed after, so memory holds one block and the activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from calibration.errors import InputError
from calibration.experts.module import Experts, experts_in, rows_of
from calibration.experts.pooling import Routed, filled
from calibration.experts.routing import Routing
from calibration.held_out import kept_aside
from calibration.layers import is_linear
from calibration.memory import trim
from calibration.propagation import Propagate
from calibration.skeleton import PartLoader, decoder_blocks
from calibration.statistics.base import (
    HeldOutStatistic,
    Observation,
    PairStatistic,
    Statistic,
)
from calibration.statistics.collection import Statistics
from calibration.stream import Stream
from calibration.text.data import Tokens


@dataclass(frozen=True)
class SharedInput:
    """Layers that read the same tensor, and the statistics of that tensor."""

    names: tuple[str, ...]
    stats: Statistics
    routed: Routed | None = None
    """How much of the text they are of, if a router chose it."""


@dataclass
class Block:
    """A loaded decoder block; or several in a row, whose layers are known together and then replaced."""

    index: int
    """Of the first."""
    name: str
    module: nn.Module
    """Of this name; where there are several, a dictionary of them under the name of all blocks."""
    stream: Stream
    layers: dict[str, nn.Module] = field(default_factory=dict)
    """Its Linear and Conv1D layers by full name."""
    n_blocks: int = 1
    routing: Routing = Routing.ROUTED
    """The tokens from which statistics of experts are collected."""
    moves_on: bool = False
    """Whether observing sends the tokens on, through the block as it was loaded (nothing then propagates)."""
    advanced: bool = False
    """Whether it has."""

    @property
    def indices(self) -> range:
        """Of its blocks."""
        return range(self.index, self.index + self.n_blocks)

    def observe(
        self, names: frozenset[str], needs: frozenset[type[Statistic]]
    ) -> list[SharedInput]:
        """Run the tokens through the block as it is, and return the statistics of these layers' inputs.

        Layers are grouped by the tensor they read, in the order of their first call. A layer that saw no token is in
        no group, unless it is of an expert: see `pooling`. Raises InputError if an input holds NaN or infinity, naming
        the layer.
        """
        if self.advanced:
            raise RuntimeError(
                f"{self.name} was observed, and its tokens have moved on: observe it once"
            )
        watch = _Watch(needs)
        experts = self.experts
        for module in experts.values():
            module.routing, module.counts = self.routing, [0] * module.layout.n_experts
        hooks = [
            self.layers[name].register_forward_pre_hook(watch.hook(name))
            for name in self.layers
            if name in names
        ]
        try:
            for batch, tokens in enumerate(self.stream.batches):
                watch.begin(tokens)
                if PairStatistic.among(needs):
                    self._run_original(batch, watch)
                with torch.no_grad():
                    before = self.stream.hidden[batch].to(self._device)
                    after = self.stream.through(self.indices, batch, before)
                if self.moves_on:
                    self.stream.hidden[batch] = after
        finally:
            for hook in hooks:
                hook.remove()
            for module in experts.values():
                module.routing = Routing.ROUTED
        self.advanced = self.moves_on
        found = [(shared.names, shared.stats) for shared in watch.shared_inputs()]
        return [SharedInput(*entry) for entry in filled(found, experts, names, self.routing)]

    @property
    def experts(self) -> dict[str, Experts]:
        """The unstacked experts of a mixture by full name."""
        return {f"{self.name}.{part}": module for part, module in experts_in(self.module)}

    def _run_original(self, batch: int, watch: _Watch) -> None:
        """Send the original's hidden states on, through the block as loaded; the watch notes what layers read."""
        if self.stream.original is None:
            raise RuntimeError("an anchor is the original's hidden states: keep them first")
        with torch.no_grad(), watch.noting():
            before = self.stream.original[batch].to(self._device)
            self.stream.original[batch] = self.stream.through(self.indices, batch, before)

    @property
    def _device(self) -> torch.device:
        return next(self.module.parameters()).device

    def replace(self, name: str, module: nn.Module) -> None:
        """Put a module in the place of a layer, which goes."""
        del self.layers[name]
        parent, _, leaf = name.removeprefix(self.name + ".").rpartition(".")
        setattr(self.module.get_submodule(parent), leaf, module)


class _Watch:
    """Collects statistics from forward pre-hooks; tensors are told apart by identity, while they are alive."""

    def __init__(self, needs: frozenset[type[Statistic]]) -> None:
        self.needs = needs
        self.leaders: dict[str, str] = {}
        self.sums: dict[str, Statistics] = {}
        self._seen: list[tuple[Tensor, str]] = []
        self._mask: Tensor | None = None
        self._aside: Tensor | None = None
        self._n_sequences = 0
        self._n_in_batch = 0
        self._originals: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._noting = False

    def begin(self, tokens: Tokens) -> None:
        """A new batch."""
        self._seen, self._mask = [], tokens.attention_mask
        if HeldOutStatistic.among(self.needs):
            self._aside = kept_aside(tokens, self._n_sequences)
        self._n_in_batch = len(tokens.input_ids)
        self._n_sequences += self._n_in_batch

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Within it, what layers read is the original's, and only remembered."""
        self._originals, self._noting = {}, True
        try:
            yield
        finally:
            self._noting = False

    def hook(self, name: str):  # type: ignore[no-untyped-def]
        """A forward pre-hook that observes the layer's input."""

        def observe(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            x, rows = args[0], rows_of(layer)
            if self._noting:
                self._originals[name] = x, rows
                return
            for tensor, leader in self._seen:
                if _same(tensor, x):
                    self._follow(name, leader)
                    return
            self._seen.append((x, name))
            self._follow(name, name)
            self._add(name, self._observation(name, x, rows))

        return observe

    def _observation(self, name: str, x: Tensor, rows: Tensor | None) -> Observation:
        original = None
        if rows is not None and self._originals and name not in self._originals:
            x, rows, original = x[:0], rows[:0], x[:0]  # the original sent no token to this expert
        elif name in self._originals:
            original, theirs = self._originals[name]
            if rows is not None and theirs is not None:  # the router may have chosen otherwise
                x, original, rows = _of_the_same(x, rows, original, theirs)
            original = tokens_of(original, self._mask, name, rows)
        seen = Observation(
            tokens_of(x, self._mask, name, rows), self._n_in_batch, original_ti=original
        )
        if self._aside is None:
            return seen
        held_out_ti = tokens_of(x, self._aside, name, rows)
        n_held_out = int(self._aside.any(1).sum())
        return replace(seen, held_out_ti=held_out_ti, n_held_out=n_held_out)

    def _add(self, name: str, seen: Observation) -> None:
        """Raises InputError naming the layer if sums are not finite."""
        if name in self.sums:
            self.sums[name].observe(seen)
        else:
            self.sums[name] = Statistics.observed(seen, self.needs)
        _refuse_not_finite(self.sums[name], name)

    def _follow(self, name: str, leader: str) -> None:
        if self.leaders.setdefault(name, leader) != leader:
            raise InputError(
                f"layer {name}: shares its input with {leader} in one batch but not in another"
            )

    def shared_inputs(self) -> list[SharedInput]:
        """Groups in the order of their first call."""
        return [
            SharedInput(tuple(n for n, of in self.leaders.items() if of == leader), stats)
            for leader, stats in self.sums.items()
        ]


def _of_the_same(
    x_ti: Tensor, rows: Tensor, original_ti: Tensor, theirs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of two inputs the rows of tokens that both have, in the tokens' order, and these tokens."""
    (rows, order), (theirs, other) = rows.sort(), theirs.sort()
    ours, also = torch.isin(rows, theirs), torch.isin(theirs, rows)
    return x_ti[order][ours], original_ti[other][also], rows[ours]


def _same(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    return (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a._version == b._version
    )


def tokens_of(x: Tensor, mask: Tensor | None, name: str, rows: Tensor | None = None) -> Tensor:
    """The rows of x that stand for tokens, padding dropped: (..., i) -> (t, i).

    `rows`: which tokens of the batch, flattened, x (t, i) is of, where a router has chosen them.
    """
    if mask is None:
        return x.reshape(-1, x.shape[-1])
    if rows is not None:
        return x[mask.to(x.device, torch.bool).flatten()[rows]]
    if x.ndim == 2 and x.shape[0] == mask.numel():  # OPT flattens the batch before its MLP
        return x[mask.to(x.device, torch.bool).flatten()]
    if x.shape[:2] != mask.shape:
        raise InputError(
            f"layer {name}: its input {tuple(x.shape)} does not tell which rows are padding; "
            f"use calibration text without padding (full sequences)"
        )
    return x[mask.to(x.device, torch.bool)]


def _refuse_not_finite(stats: Statistics, name: str) -> None:
    for statistic in stats.values():
        for tensor in statistic.tensors().values():
            if not bool(torch.isfinite(tensor).all()):
                raise InputError(
                    f"layer {name}: its inputs hold NaN or infinity on the calibration text; "
                    f"try --dtype float32, or look for NaN in the weights of the layers before it"
                )


def walk(
    stream: Stream,
    loader: PartLoader,
    *,
    propagate: Propagate,
    device: torch.device,
    at_once: int = 1,
    routing: Routing = Routing.ROUTED,
) -> Iterator[Block]:
    """Yield each decoder block, loaded, with the tokens of the stream before it; see the head of this file.

    `at_once`: how many blocks are loaded, and yielded, together; the last of them may be fewer.
    """
    _, blocks = decoder_blocks(stream.model)
    for start in range(0, len(blocks), at_once):
        block = _loaded(stream, loader, range(start, min(start + at_once, len(blocks))), device)
        block.moves_on, block.routing = propagate is Propagate.NONE, routing
        yield block
        if not block.moves_on:
            for index in block.indices:
                stream.advance(index)
        elif stream.batches and not block.advanced:
            raise RuntimeError(f"{block.name} was not observed, so its tokens have not moved on")
        loader.unload(block.module)
        trim()


def _loaded(stream: Stream, loader: PartLoader, indices: range, device: torch.device) -> Block:
    prefix, blocks = decoder_blocks(stream.model)
    loader.load([f"{prefix}.{index}." for index in indices], device)
    name, module = f"{prefix}.{indices.start}", blocks[indices.start]
    if len(indices) > 1:
        name, module = prefix, nn.ModuleDict({f"{index}": blocks[index] for index in indices})
    layers = {f"{name}.{part}": layer for part, layer in module.named_modules() if is_linear(layer)}
    return Block(indices.start, name, module, stream, layers, n_blocks=len(indices))
