"""A model's logits over a text, in pieces of bounded size.

A vocabulary of 150,000 makes the logits of one window of 2,048 tokens 1.2 GB in fp32. So the
decoder runs once on the batch, and the model's own forward turns its hidden states into logits a
few positions at a time: for that the decoder is replaced, for the time of the call, by one that
returns the hidden states it is given. Whatever the model does after the decoder (final scaling,
soft capping) is then done by the model's own code.

Shapes: b = windows in a batch, t = tokens in a window, n = positions in a piece, v = vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from eval.errors import EvalError

# Of a piece's logits in fp32: half of 64 MB, for sums in float64 copy what they add up.
PIECE_BYTES = 32 << 20


@dataclass(frozen=True)
class LogitPieces:
    """The logits of one batch of windows, computed piece by piece when asked for.

    `decoded` is the decoder's output, with hidden states (b, t, d). It is None for an architecture
    whose forward does not go through `get_decoder()`: then the logits of a whole window are made at
    once, with the same result.
    """

    label: str
    model: PreTrainedModel
    ids_bt: Tensor
    decoded: ModelOutput | None

    @classmethod
    def of(cls, label: str, model: PreTrainedModel, ids_bt: Tensor) -> "LogitPieces":
        """Runs the decoder on the batch. `label` names the model in errors."""
        ids_bt = ids_bt.to(model.device)
        decoder = model.get_decoder()
        if decoder is model:
            return cls(label, model, ids_bt, None)
        decoded = decoder(input_ids=ids_bt, use_cache=False)
        if not isinstance(decoded, ModelOutput) or "last_hidden_state" not in decoded:
            return cls(label, model, ids_bt, None)
        if _logits(model, decoded, ids_bt, slice(0, 1), slice(0, 1)) is None:
            return cls(label, model, ids_bt, None)
        return cls(label, model, ids_bt, decoded)

    def window(self, row: int) -> Iterator[Tensor]:
        """Logits of window `row`, its positions in order, as fp32 tensors (n, v)."""
        n = piece_length(self.model)
        this = slice(row, row + 1)
        if self.decoded is None:
            logits_tv = self.model(input_ids=self.ids_bt[this], use_cache=False).logits[0]
            yield from (piece.float() for piece in logits_tv.split(n))
            return
        for start in range(0, self.ids_bt.shape[1], n):
            here = slice(start, start + n)
            logits = _logits(self.model, self.decoded, self.ids_bt, this, here)
            assert logits is not None, "the decoder was called a moment ago"
            yield logits[0].float()


def _logits(
    model: PreTrainedModel, decoded: ModelOutput, ids_bt: Tensor, rows: slice, positions: slice
) -> Tensor | None:
    """The model's logits for a part of what was decoded; None if it did not ask its decoder."""
    part = copy(decoded)
    part["last_hidden_state"] = decoded["last_hidden_state"][rows, positions]
    with _decoder_returning(model.get_decoder(), part) as calls:
        logits: Tensor = model(input_ids=ids_bt[rows, positions], use_cache=False).logits
    return logits if calls else None


@contextmanager
def _decoder_returning(decoder: nn.Module, output: ModelOutput) -> Iterator[list[int]]:
    """Lets `decoder` return `output`; yields a list that grows with each call."""
    calls: list[int] = []

    def returning(*_: Any, **__: Any) -> ModelOutput:
        calls.append(1)
        return output

    before = decoder.__dict__.get("forward")
    decoder.forward = returning
    try:
        yield calls
    finally:
        if before is None:
            del decoder.forward
        else:
            decoder.forward = before


def vocabulary(model: PreTrainedModel) -> int:
    """Number of logits the model has for a position."""
    rows = getattr(model.get_output_embeddings(), "out_features", None)
    return int(rows if rows is not None else model.config.get_text_config().vocab_size)


def piece_length(model: PreTrainedModel) -> int:
    """Positions in a piece, so that its logits in fp32 stay below `PIECE_BYTES`."""
    return max(1, PIECE_BYTES // (4 * vocabulary(model)))


def check_finite(logits_nv: Tensor, label: str, window: int) -> None:
    """Refuses NaN and infinite logits.

    Raises:
        EvalError: names the model and the window.
    """
    if not bool(torch.isfinite(logits_nv).all()):
        raise EvalError(
            f"{label}: NaN or infinite logits in window {window}; the model is broken, or its "
            "dtype overflows: try float32"
        )
