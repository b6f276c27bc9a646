"""Divergence of the model's predictions when one layer alone is compressed, measured for every layer in one walk.

A variant of the model differs from it in one layer. Its hidden states leave the original's at that layer's block and
then follow through the same blocks, each loaded once, so memory holds one block and the variants' hidden states (in
files, above a limit). Cost: for B blocks of n layers B n (B + 1) / 2 blocks' forwards over the few tokens it reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calibration.outputs import predictions
from calibration.skeleton import decoder_blocks
from calibration.stream import HiddenStates, Stream
from calibration.text.data import Tokens
from calibration.walk import Block
from compress.callbacks import Progress
from compress.errors import LayerError
from compress.forms.base import Form
from compress.forms.linear import CompressedLinear
from compress.models.layers import bias_of, weight_oi
from compress.prepare.prepare import Prepared

N_TOKENS = 1024
"""Tokens that are read, in whole sequences, one at least."""
MEMORY_BYTES = 4 << 30


class Divergences:
    """The original's hidden states, and those of every variant so far."""

    def __init__(self, prepared: Prepared) -> None:
        """Takes the first calibration sequences. Everything outside the blocks is loaded, and put away again."""
        self._prepared = prepared
        prefix, blocks = decoder_blocks(prepared.model)
        self._outside = f"{prefix}."
        prepared.loader.load_outside(self._outside, prepared.device)
        n_sequences = max(1, N_TOKENS // prepared.tokens.input_ids.shape[1])
        batches = list(itertools.islice(prepared.tokens.singles(), n_sequences))
        self._stream = Stream(prepared.model, blocks, batches)
        prepared.loader.unload_outside(self._outside)
        self._variants: dict[str, HiddenStates] = {}

    def through(self, block: Block, forms: Mapping[str, Form]) -> None:
        """Send all on through a loaded block, the original; each form alone, by layer, makes a variant."""
        run = self._stream.call
        n_batches = len(self._stream.batches)
        with torch.no_grad():
            for hidden in self._variants.values():
                for batch in range(n_batches):
                    hidden[batch] = run(block.index, batch, hidden[batch])
            for name, form in forms.items():
                with _InPlace(block, name, form.unpacked(self._prepared.dtype)):
                    self._variants[name] = self._started(block.index)
            self._stream.advance(block.index)

    def _started(self, index: int) -> HiddenStates:
        started = HiddenStates(MEMORY_BYTES // len(self._prepared.plan.selected))
        for batch in range(len(self._stream.batches)):
            started.append(self._stream.run(index, batch))
        return started

    def measured(self, progress: Progress) -> dict[str, float]:
        """KL(original || variant) in nats per token, by the layer that the variant differs in.

        Raises LayerError naming a layer whose variant does not predict numbers.
        """
        loader = self._prepared.loader
        loader.load_outside(self._outside, self._prepared.device)
        totals = dict.fromkeys(self._variants, 0.0)
        n_tokens, done = 0, 0
        total = len(self._stream.batches) * len(self._variants)
        for batch, tokens in enumerate(self._stream.batches):
            reference = self._log_probabilities(batch, self._stream.hidden[batch], tokens)
            n_tokens += len(reference)
            for name, hidden in self._variants.items():
                found = self._log_probabilities(batch, hidden[batch], tokens)
                progress("divergences", done := done + 1, total)
                totals[name] += float(F.kl_div(found, reference, reduction="sum", log_target=True))
        loader.unload_outside(self._outside)
        strange = next((name for name, total in totals.items() if not total < torch.inf), None)
        if strange is not None:
            raise LayerError(
                f"layer {strange}: compressed alone, it makes the logits NaN or infinite"
            )
        return {name: total / n_tokens for name, total in totals.items()}

    def _log_probabilities(self, batch: int, final: Tensor, tokens: Tokens) -> Tensor:
        """Log-probabilities of the next token, (t, vocabulary), at every token that counts."""
        with torch.no_grad():
            logits = predictions(self._stream.output(batch, final))[0]
        if len(logits) > 1:
            logits = logits[_counted(tokens).to(logits.device)]
        return F.log_softmax(logits.float(), dim=-1)


def _counted(tokens: Tokens) -> Tensor:
    """Which tokens (t,) of a sequence count: no padding, and none before a special token that is not the text's own."""
    counted = torch.ones(tokens.input_ids.shape[1], dtype=torch.bool)
    if tokens.attention_mask is not None:
        counted &= tokens.attention_mask[0].bool()
    if tokens.inserted is not None:
        counted[:-1] &= ~tokens.inserted[0, 1:]
    return counted


class _InPlace:
    """Within it, a form stands in the place of a block's layer."""

    def __init__(self, block: Block, name: str, form: Form) -> None:
        self._layer = block.layers[name]
        parent, _, self._leaf = name.removeprefix(block.name + ".").rpartition(".")
        self._parent: nn.Module = block.module.get_submodule(parent)
        self._form = CompressedLinear(form, bias_of(self._layer), weight_oi(self._layer).dtype)

    def __enter__(self) -> None:
        setattr(self._parent, self._leaf, self._form)

    def __exit__(self, *_: object) -> None:
        setattr(self._parent, self._leaf, self._layer)
