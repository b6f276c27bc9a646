"""The hidden states of the calibration tokens between two decoder blocks, and the arguments blocks are called with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from calibration.errors import InputError
from calibration.outputs import predictions
from calibration.text.data import Tokens


@dataclass(frozen=True)
class Call:
    """How the model called one block, hidden states aside."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    n_returned: int
    """Entries of the tuple that the model takes from it, hidden states first; 0 where it takes these alone."""


class HiddenStates:
    """One tensor (b, t, d) for each batch; above `memory_bytes` further ones are kept in files, which go with it."""

    def __init__(self, memory_bytes: int) -> None:
        self._memory_bytes, self._held = memory_bytes, 0
        self._entries: list[Tensor | Path] = []
        self._folder: TemporaryDirectory[str] | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def append(self, hidden: Tensor) -> None:
        """Add the next batch."""
        self._entries.append(self._keep(hidden, len(self._entries)))

    def __setitem__(self, index: int, hidden: Tensor) -> None:
        old = self._entries[index]
        if isinstance(old, Tensor):
            self._held -= old.nbytes
        self._entries[index] = self._keep(hidden, index)

    def __getitem__(self, index: int) -> Tensor:
        entry = self._entries[index]
        return entry if isinstance(entry, Tensor) else load_file(entry)["hidden"]

    def _keep(self, hidden: Tensor, index: int) -> Tensor | Path:
        if self._held + hidden.nbytes <= self._memory_bytes:
            self._held += hidden.nbytes
            return hidden
        if self._folder is None:
            self._folder = TemporaryDirectory(prefix="compress-activations-")
        path = Path(self._folder.name) / f"{index}.safetensors"
        save_file({"hidden": hidden.cpu().contiguous()}, path)
        return path


class Stream:
    """Batches of tokens on their way through the blocks: hidden states now, and each block's recorded arguments.

    Made by running the model's own forward on each batch with every block replaced by a stub that records its
    arguments and returns the hidden states unchanged, so masks, rotary embeddings and sliding windows are the
    model's own. Everything outside the blocks must be loaded.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: nn.ModuleList,
        batches: Sequence[Tokens],
        memory_bytes: int = 4 << 30,
    ) -> None:
        """Raises InputError if the model does not call its blocks one after the other."""
        self.model, self.blocks, self.batches = model, blocks, list(batches)
        self._memory_bytes = memory_bytes
        self.hidden = HiddenStates(memory_bytes)
        self.original: HiddenStates | None = None
        self.calls: list[list[Call]] = []
        for tokens in self.batches:
            first, calls = _record(model, blocks, tokens)
            self.hidden.append(first)
            self.calls.append(calls)

    def keep_original(self) -> None:
        """Remember the hidden states as they are, the original model's, and bring them along beside the others.

        `Block.observe` does: it runs them through each block before that is compressed.
        """
        self.original = HiddenStates(self._memory_bytes)
        for batch in range(len(self.batches)):
            self.original.append(self.hidden[batch])

    def run(self, block: int, batch: int) -> Tensor:
        """The block's output for one batch, from the hidden states as they are now: (b, t, d)."""
        device = next(self.blocks[block].parameters()).device
        with torch.no_grad():
            return self.call(block, batch, self.hidden[batch].to(device))

    def through(self, blocks: range, batch: int, hidden: Tensor) -> Tensor:
        """What several blocks in a row make of hidden states (b, t, d), see `call`."""
        for block in blocks:
            hidden = self.call(block, batch, hidden)
        return hidden

    def call(self, block: int, batch: int, hidden: Tensor) -> Tensor:
        """What the block makes of any hidden states (b, t, d) with the arguments recorded for a batch."""
        call = self.calls[batch][block]
        output = self.blocks[block](hidden, *call.args, **call.kwargs)
        out: Tensor = output[0] if isinstance(output, tuple | list) else output
        return out

    def advance(self, block: int) -> None:
        """Send every batch through the block as it is now."""
        for batch in range(len(self.batches)):
            self.hidden[batch] = self.run(block, batch)

    def predictions(self, batch: int) -> Tensor:
        """What the model's own forward makes of the hidden states after the last block: (b, t, v)."""
        with torch.no_grad():
            return predictions(self.output(batch, self.hidden[batch]))

    def output(self, batch: int, final: Tensor) -> Any:
        """What the model's own forward returns where its last block returns `final` (b, t, d)."""
        calls = self.calls[batch]

        def replay(position: int, hidden: Tensor) -> Any:
            out = final.to(hidden.device) if position == len(self.blocks) - 1 else hidden
            return _returned(out, calls[position].n_returned)

        tokens = self.batches[batch]
        with _stubbed(self.blocks, lambda k, hidden, _args, _kwargs: replay(k, hidden)):
            return self.model(**model_inputs(self.model, tokens))


def model_inputs(model: PreTrainedModel, tokens: Tokens) -> dict[str, Any]:
    """Keyword arguments of the model's forward for these tokens."""
    embeddings = model.get_input_embeddings()
    device = next(chain(embeddings.parameters(), embeddings.buffers())).device
    inputs: dict[str, Any] = {"input_ids": tokens.input_ids.to(device)}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    if tokens.attention_mask is not None:
        inputs["attention_mask"] = tokens.attention_mask.to(device)
    return inputs


class _More:
    """Stands for what a block returns beside hidden states: attention weights, which nothing reads."""


_MORE, _MOST_RETURNED = _More(), 3

Stub = Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Any]


@contextmanager
def _stubbed(blocks: nn.ModuleList, stub: Stub) -> Iterator[None]:
    """Replace each block's forward; attributes that the model reads from a block stay readable."""

    def bind(position: int) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return stub(position, hidden_states, args, kwargs)

        return forward

    for position, block in enumerate(blocks):
        block.forward = bind(position)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _record(
    model: PreTrainedModel, blocks: nn.ModuleList, tokens: Tokens
) -> tuple[Tensor, list[Call]]:
    """Hidden states before the first block, and how each block is called."""
    # A model that indexes what a block returns (bloom, codegen, gptj), or unpacks it (bamba), takes a tuple. Given a
    # tensor it would silently slice the batch off, which the shapes give away.
    failure: Exception | None = None
    for n_returned in range(_MOST_RETURNED + 1):
        recorder = _Recorder(n_returned)
        with torch.no_grad(), _stubbed(blocks, recorder):
            try:
                last = _without_head(model, blocks)(**model_inputs(model, tokens)).last_hidden_state
            except (AttributeError, IndexError, TypeError, ValueError, RuntimeError) as error:
                failure = error
                continue
        shapes = {tuple(hidden.shape) for hidden in recorder.seen}
        whole = last.ndim == 3 and last.shape[:2] == tokens.input_ids.shape
        if len(recorder.seen) == len(blocks) and len(shapes) == 1 and whole:
            recorder.refuse_more(type(model).__name__)
            return recorder.seen[0], recorder.calls
    raise InputError(
        f"model: {type(model).__name__} does not call its {len(blocks)} blocks one after the other on hidden states "
        f"of one shape, so it can't be walked block by block" + (f" ({failure})" if failure else "")
    )


def _without_head(model: PreTrainedModel, blocks: nn.ModuleList) -> nn.Module:
    """The part that a head is on; where the model has another prefix than that part's name (Llama 4), by its blocks."""
    if model.base_model is not model:
        return model.base_model
    holders = (part for part in model.modules() if any(blocks is own for own in part.children()))
    return next((part for part in holders if isinstance(part, PreTrainedModel)), model)


class _Recorder:
    """A stub that notes how each block is called and hands the hidden states on."""

    def __init__(self, n_returned: int) -> None:
        self.n_returned = n_returned
        self.seen: list[Tensor] = []
        self.calls: list[Call] = []

    def __call__(
        self, _: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.seen.append(hidden)
        self.calls.append(Call(args, kwargs, self.n_returned))
        return _returned(hidden, self.n_returned)

    def refuse_more(self, model: str) -> None:
        """Raises InputError if a block needs more of the one before it than its hidden states as they are."""
        for index, (before, hidden) in enumerate(pairwise(self.seen), start=1):
            call = self.calls[index]
            if any(value is _MORE for value in (*call.args, *call.kwargs.values())):
                raise InputError(
                    f"{model} hands more than hidden states from block to block, so it can't be walked block by block",
                    option="model",
                )
            if hidden is not before and not _equal(hidden, before):
                raise InputError(
                    f"{model} changes the hidden states between its blocks {index - 1} and {index}, so it can't be "
                    "walked block by block",
                    option="model",
                )


def _returned(hidden: Tensor, n_returned: int) -> Any:
    """What a block returns of which the model takes so many entries."""
    return (hidden, *[_MORE] * (n_returned - 1)) if n_returned else hidden


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)
