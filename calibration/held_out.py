"""Which calibration sequences are held out: what was fitted without them is judged by them.

Shapes: b = sequences of a batch, t = tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from calibration.text.data import Tokens

EVERY = 8
"""One of so many sequences is held out."""


def kept_aside(tokens: Tokens, n_before: int) -> Tensor:
    """Mask of the tokens of a batch whose sequences are held out, the last of every eight: (b, t) bool.

    `n_before`: sequences in the batches before it.
    """
    b, t = tokens.input_ids.shape
    chosen = torch.arange(n_before + 1, n_before + b + 1) % EVERY == 0
    aside = chosen[:, None].expand(b, t)
    return aside if tokens.attention_mask is None else aside & tokens.attention_mask.bool().cpu()
