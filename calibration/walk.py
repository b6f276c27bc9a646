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
        no group. Raises InputError if an input holds NaN or infinity, naming the layer.
        """
        if self.advanced:
            raise RuntimeError(
                f"{self.name} was observed, and its tokens have moved on: observe it once"
            )
        watch = _Watch(needs)
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
        self.advanced = self.moves_on
        return watch.shared_inputs()

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
        self._originals: dict[str, Tensor] = {}
        self._noting = False

    def begin(self, tokens: Tokens) -> None:
        """A new batch."""
        self._seen, self._mask = [], tokens.attention_mask
        if HeldOutStatistic.among(self.needs):
            self._aside = kept_aside(tokens, self._n_sequences)
        self._n_sequences += len(tokens.input_ids)

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

        def observe(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if self._noting:
                self._originals[name] = tokens_of(x, self._mask, name)[0]
                return
            for tensor, leader in self._seen:
                if _same(tensor, x):
                    self._follow(name, leader)
                    return
            self._seen.append((x, name))
            self._follow(name, name)
            rows, n_sequences = tokens_of(x, self._mask, name)
            seen = Observation(rows, n_sequences, original_ti=self._originals.get(name))
            if self._aside is not None:
                held_out_ti = tokens_of(x, self._aside, name)[0]
                n_held_out = int(self._aside.any(1).sum())
                seen = replace(seen, held_out_ti=held_out_ti, n_held_out=n_held_out)
            self._add(name, seen)

        return observe

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


def _same(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    return (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a._version == b._version
    )


def tokens_of(x: Tensor, mask: Tensor | None, name: str) -> tuple[Tensor, int]:
    """The rows of x that stand for tokens, padding dropped: (..., i) -> (t, i)."""
    if mask is None:
        return x.reshape(-1, x.shape[-1]), x.shape[0]
    if x.ndim == 2 and x.shape[0] == mask.numel():  # OPT flattens the batch before its MLP
        return x[mask.to(x.device, torch.bool).flatten()], mask.shape[0]
    if x.shape[:2] != mask.shape:
        raise InputError(
            f"layer {name}: its input {tuple(x.shape)} does not tell which rows are padding; "
            f"use calibration text without padding (full sequences)"
        )
    return x[mask.to(x.device, torch.bool)], x.shape[0]


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
) -> Iterator[Block]:
    """Yield each decoder block, loaded, with the tokens of the stream before it; see the head of this file.

    `at_once`: how many blocks are loaded, and yielded, together; the last of them may be fewer.
    """
    _, blocks = decoder_blocks(stream.model)
    for start in range(0, len(blocks), at_once):
        block = _loaded(stream, loader, range(start, min(start + at_once, len(blocks))), device)
        block.moves_on = propagate is Propagate.NONE
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
