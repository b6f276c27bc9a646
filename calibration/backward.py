"""Gradients of the loss, block by block: the walk there and back, with one block in memory at a time.

Forwards every block's input is kept (in files, above a limit). Then, from the last block to the first, each block is
loaded again, run once more with its graph recorded, and the gradient by its output becomes the gradient by its input.
No weight has a gradient of its own: what a layer reads and the gradient by what it writes are all that is needed.

    way = Backward(stream, loader, device)
    for index in way.there():                       # first block first
        ...
    for index, found in way.back(names, kinds):     # last block first
        found["model.layers.3.mlp.up_proj"][Fisher]

Cost: two forward passes, and one by the blocks' inputs back. Every batch must be one sequence (see `gradients`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calibration.errors import InputError
from calibration.experts.module import experts_in, rows_of
from calibration.experts.pooling import filled_gradients
from calibration.heads import Head
from calibration.layers import is_linear
from calibration.memory import trim
from calibration.outputs import head_of
from calibration.skeleton import PartLoader, decoder_blocks
from calibration.statistics.base import GradientStatistic
from calibration.statistics.collection import Statistics
from calibration.stream import HiddenStates, Stream
from calibration.text.data import Tokens
from calibration.walk import tokens_of

MEMORY_BYTES = 4 << 30

Loss = Callable[[Any, Tokens], Tensor]
"""From what the model returns for one sequence, and the sequence, the negative log-likelihood of its labels in nats."""


def next_token_loss(output: Any, tokens: Tokens) -> Tensor:
    """Of a language model: summed over the text's own tokens of one sequence that follow another.

    Padding and special tokens that the text did not bring never count.
    """
    logits: Tensor = output.logits[0, :-1].float()
    labels = tokens.input_ids[0, 1:].to(logits.device)
    if tokens.attention_mask is not None:
        seen = (tokens.attention_mask[0, 1:] * tokens.attention_mask[0, :-1]).bool()
        labels = labels.masked_fill(~seen.to(labels.device), -100)
    if tokens.inserted is not None:
        labels = labels.masked_fill(tokens.inserted[0, 1:].to(labels.device), -100)
    return F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)


def class_loss(output: Any, tokens: Tokens) -> Tensor:
    """Of a sequence classifier: of the class of one sequence. Raises InputError for text without labels."""
    if tokens.labels is None:
        raise InputError(
            "calibration: the Fisher of a classifier is of its classes, and the text has none; "
            "give a .jsonl or .parquet file whose rows have a whole number as 'label'"
        )
    logits: Tensor = output.logits.float()
    return F.cross_entropy(logits, tokens.labels.to(logits.device), reduction="sum")


def feature_loss(output: Any, tokens: Tokens) -> Tensor:
    """Of an encoder: of a unit Gaussian around the mean of its features over the tokens, at one draw.

    Where a model has no loss, its Fisher is that of its outputs as they are: the expected square of the gradient is
    J^T J, J the derivative of the pooled features, whatever they are used for. The draw is the sequence's own.
    """
    features = output.last_hidden_state[0].float()
    if tokens.attention_mask is not None:
        features = features[tokens.attention_mask[0].bool().to(features.device)]
    generator = torch.Generator().manual_seed(int(tokens.input_ids.sum()))
    draw = torch.randn(features.shape[1], generator=generator).to(features.device)
    drawn: Tensor = features.mean(0) @ draw
    return drawn


LOSSES: Mapping[Head, Loss] = {
    Head.NEXT_TOKEN: next_token_loss,
    Head.CLASSES: class_loss,
    Head.FEATURES: feature_loss,
    Head.IMAGE_TEXT: next_token_loss,
}


class Backward:
    """The way there and back; each step is a block, so that the caller can tell how far it is."""

    def __init__(self, stream: Stream, loader: PartLoader, device: torch.device) -> None:
        """Raises ValueError if a batch is not one sequence."""
        if any(len(tokens) != 1 for tokens in stream.batches):
            raise ValueError(
                "the Fisher is a sum over single sequences: make the stream of batches of 1"
            )
        self._stream, self._loader, self._device = stream, loader, device
        self._prefix, self._blocks = decoder_blocks(stream.model)
        self._inputs: list[HiddenStates] = []

    def there(self) -> Iterator[int]:
        """Bring the tokens to the end; what every block was given on the way is kept, batch by batch."""
        for index, module in enumerate(self._blocks):
            self._loader.load([f"{self._prefix}.{index}."], self._device)
            kept = HiddenStates(MEMORY_BYTES // len(self._blocks))
            for batch in range(len(self._stream.batches)):
                kept.append(self._stream.hidden[batch])
            self._inputs.append(kept)
            self._stream.advance(index)
            self._loader.unload(module)
            trim()
            yield index

    def back(
        self, names: frozenset[str], kinds: frozenset[type[GradientStatistic]]
    ) -> Iterator[tuple[int, Mapping[str, Statistics]]]:
        """The statistics of the gradients of these layers, a block at a time, the last block first.

        Layers that no token of the loss depends on are left out. Everything outside the blocks is loaded first and put
        away again. Raises InputError if a gradient is not finite.
        """
        gradients = self._at_the_end()
        for index in reversed(range(len(self._blocks))):
            name, module = f"{self._prefix}.{index}", self._blocks[index]
            self._loader.load([name + "."], self._device)
            module.requires_grad_(requires_grad=False)
            layers = {
                full: layer
                for part, layer in module.named_modules()
                if is_linear(layer) and (full := f"{name}.{part}") in names
            }
            ways = self._inputs[index], gradients
            found = _through(self._stream, index, layers, kinds, ways)
            experts = {f"{name}.{part}": these for part, these in experts_in(module)}
            yield index, filled_gradients(found, experts, names)
            self._loader.unload(module)
            trim()

    def _at_the_end(self) -> HiddenStates:
        """The gradient of every sequence's loss by the output of the last block."""
        stream = self._stream
        self._loader.load_outside(f"{self._prefix}.", self._device)
        stream.model.requires_grad_(requires_grad=False)
        gradients = HiddenStates(MEMORY_BYTES)
        loss = LOSSES[head_of(stream.model.config) or Head.NEXT_TOKEN]
        for batch, tokens in enumerate(stream.batches):
            final = stream.hidden[batch].to(self._device).detach().requires_grad_()
            with torch.enable_grad():
                lost = loss(stream.output(batch, final), tokens)
            (gradient,) = torch.autograd.grad(lost, final)
            gradients.append(gradient)
        self._loader.unload_outside(f"{self._prefix}.")
        return gradients


def _through(
    stream: Stream,
    index: int,
    layers: Mapping[str, nn.Module],
    kinds: frozenset[type[GradientStatistic]],
    ways: tuple[HiddenStates, HiddenStates],
) -> dict[str, Statistics]:
    """The statistics of one block's layers; the gradients by its output become those by its input."""
    inputs, gradients = ways
    sums: dict[str, Statistics] = {}
    for batch, tokens in enumerate(stream.batches):
        watch = _Watch()
        hooks = [layer.register_forward_hook(watch.hook(name)) for name, layer in layers.items()]
        try:
            with torch.enable_grad():
                hidden = inputs[batch].to(gradients[batch].device).detach().requires_grad_()
                out = stream.call(index, batch, hidden)
        finally:
            for hook in hooks:
                hook.remove()
        sources = [hidden, *(call.written for call in watch.calls)]
        found = torch.autograd.grad(
            out, sources, gradients[batch].to(out.device), allow_unused=True
        )
        gradients[batch] = found[0]
        for call, gradient in zip(watch.calls, found[1:], strict=True):
            if gradient is not None:
                _add(sums, call.name, kinds, _rows(call, gradient, tokens.attention_mask))
    return sums


@dataclass(frozen=True)
class _Call:
    """What a layer read and wrote; of which tokens, where a router has chosen them."""

    name: str
    read: Tensor
    written: Tensor
    rows: Tensor | None


class _Watch:
    """What each layer reads and writes, call by call."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []

    def hook(self, name: str):  # type: ignore[no-untyped-def]
        """A forward hook. It hands a copy on: the model may change that in place."""

        def keep(layer: nn.Module, args: tuple[Tensor, ...], written: Tensor) -> Tensor:
            self.calls.append(_Call(name, args[0].detach(), written, rows_of(layer)))
            return written.clone()

        return keep


def _rows(call: _Call, gradient: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a layer read, (t, i), and the gradient by what it wrote, (t, o), padding dropped."""
    name, read, rows = call.name, call.read, call.rows
    x_ti = tokens_of(read, mask, name, rows)
    g_to = tokens_of(gradient, mask, name, rows)
    if not bool(torch.isfinite(g_to).all()):
        raise InputError(
            f"layer {name}: the gradient of the loss by its outputs holds NaN or infinity; try --dtype float32"
        )
    return x_ti, g_to


def _add(
    sums: dict[str, Statistics],
    name: str,
    kinds: frozenset[type[GradientStatistic]],
    rows: tuple[Tensor, Tensor],
) -> None:
    """One more sample of a layer."""
    if name in sums:
        for kind, value in sums[name].items():
            sums[name][kind] = value.with_sample(*rows)
    else:
        sums[name] = Statistics(
            {kind: kind.of(*rows) for kind in sorted(kinds, key=lambda k: k.name)}
        )
