"""Bases whose channels are rescaled: what AWQ and SmoothQuant move from a norm or a layer into the layers after it.

Such a base computes what the original does with other weights: W_base ~ diag(rows) W diag(columns).
The factors are found without knowing the architecture, by a few tokens: the block with the base's norms, and with the
original's weights rescaled layer by layer in the order in which they are called, must put out what the original's does.

    columns: the ratio of what the layer reads in the original to what it reads there, channel by channel
    rows: the best fit to the base's weight, where that makes most of its difference go; any rows will do, as what
          is read after them tells the columns of the layers that follow

Lin et al. 2023 (AWQ), arXiv:2306.00978, section 3.2; Xiao et al. 2022 (SmoothQuant), arXiv:2211.10438.
Shapes: o = out_features, i = in_features, t = tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from calibration.layers import is_linear
from calibration.skeleton import PartLoader, decoder_blocks
from calibration.stream import Stream
from calibration.text.data import Tokens
from compress.errors import CheckpointError
from compress.families.low_rank import Factors, as_low_rank
from compress.forms.base import Form
from compress.forms.low_rank import LowRank
from compress.models.layers import bias_of, is_transposed, weight_oi
from compress.solvers.linalg import to_storage

TOLERANCE = 2e-2
"""Relative difference of what a layer reads, and of what a block puts out: norms in 16 bits make up to 1e-3."""
MOST = 0.5
"""Rows count where they leave less than this share of the difference."""


@dataclass(frozen=True)
class Rescaling:
    """W_base ~ diag(rows) W diag(columns) for the weight W of the original: see `rescaling`."""

    rows_o: Tensor
    columns_i: Tensor

    def as_original(self, weight_oi: Tensor) -> Tensor:
        """A weight of the base, in the original's scale."""
        return weight_oi / self.rows_o[:, None] / self.columns_i

    def in_base(self, correction: Factors) -> LowRank:
        """A correction made in the original's scale, for the base's layer. Raises LayerError if a factor overflows."""
        factors = as_low_rank(correction)
        up, down = factors.up.weight.detach(), factors.down.weight.detach()
        return LowRank.from_factors(
            to_storage(up.float() * self.rows_o[:, None], up.dtype),
            to_storage(down.float() * self.columns_i, down.dtype),
        )


class Differing(Protocol):
    """A base checkpoint whose norms may differ from the original's."""

    @property
    def folder(self) -> Path:
        """The folder of the base, for messages."""

    @property
    def changed(self) -> Sequence[str]:
        """The tensors of the blocks, layers apart, that are not the original's."""

    @property
    def loader(self) -> PartLoader:
        """Loads its tensors into the model that the original is loaded into."""

    def form(self, name: str, device: torch.device) -> Form:
        """The form of a layer's weight."""


def rescalings(
    base: Differing, original: PartLoader, few: Tokens, device: torch.device
) -> dict[str, Rescaling]:
    """The factors of a base's layers, by name.

    Raises CheckpointError naming the tensors that differ if no factors make up for them.
    """
    model = original.model
    prefix, blocks = decoder_blocks(model)
    original.load_outside(f"{prefix}.", device)
    stream = Stream(model, blocks, [few])
    original.unload_outside(f"{prefix}.")
    found: dict[str, Rescaling] = {}
    for index, block in enumerate(blocks):
        original.load([f"{prefix}.{index}."], device)
        search = _Search(base, f"{prefix}.{index}", block)
        with torch.no_grad():
            after = search.original(stream, index)
            if any(name.startswith(f"{prefix}.{index}.") for name in base.changed):
                found |= search.rescaled(stream, index, after)
        stream.hidden[0] = after
        original.unload(block)
    return found


class _Search:
    """One block, loaded from the original."""

    def __init__(self, base: Differing, name: str, block: nn.Module) -> None:
        self.base, self.name, self.block = base, name, block
        self.layers = {
            f"{name}.{part}": layer for part, layer in block.named_modules() if is_linear(layer)
        }
        self.inputs: dict[str, Tensor] = {}
        self.found: dict[str, Rescaling] = {}

    def original(self, stream: Stream, index: int) -> Tensor:
        """The outputs of the original block; the inputs of its layers are remembered."""

        def remember(name: str) -> Any:
            return lambda _, args: self.inputs.__setitem__(name, _rows(args[0]))

        return self._run(stream, index, {name: remember(name) for name in self.layers})

    def rescaled(self, stream: Stream, index: int, expected: Tensor) -> Mapping[str, Rescaling]:
        """The factors of its layers. Raises CheckpointError if there are none that put out the same."""
        loader = self.base.loader
        loader.load([f"{self.name}."], expected.device, without=self.layers)

        def fit(name: str) -> Any:
            return lambda layer, args: self._fit(name, layer, _rows(args[0]))

        found = self._run(stream, index, {name: fit(name) for name in self.layers})
        difference = _distance(found, expected)
        if difference > TOLERANCE:
            self._refuse(f"the outputs of the block differ by {difference:.1%}")
        return self.found

    def _run(self, stream: Stream, index: int, hooks: Mapping[str, Any]) -> Tensor:
        handles = [
            self.layers[name].register_forward_pre_hook(hook) for name, hook in hooks.items()
        ]
        try:
            return stream.run(index, 0)
        finally:
            for handle in handles:
                handle.remove()

    def _fit(self, name: str, layer: nn.Module, read_ti: Tensor) -> None:
        """Find the factors of a layer, and let it compute with the original's weight rescaled by them."""
        if name not in self.inputs or self.inputs[name].shape != read_ti.shape:
            self._refuse(f"{name} reads another number of tokens")
        own = weight_oi(layer).float()
        base = self.base.form(name, own.device).dense()
        columns_i = _columns(self.inputs[name], read_ti, own, base)
        difference = _distance(read_ti * columns_i, self.inputs[name])
        if difference > TOLERANCE:
            self._refuse(
                f"the inputs of {name} are not rescaled inputs of the original ({difference:.1%})"
            )
        target = own * columns_i
        rows_o = _rows_of(target, base)
        self.found[name] = Rescaling(rows_o, columns_i)
        weight = (target * rows_o[:, None]).to(layer.weight.dtype)  # type: ignore[arg-type]
        layer.weight.data = weight.T.contiguous() if is_transposed(layer) else weight
        bias = bias_of(layer)
        if bias is not None:
            bias.copy_(bias.float() * rows_o)

    def _refuse(self, why: str) -> NoReturn:
        names = [name for name in self.base.changed if name.startswith(f"{self.name}.")]
        raise CheckpointError(
            f"{self.base.folder}: {', '.join(names)} differ from the original's, and the "
            f"layers after them do not make up for it: {why}; name the model that the checkpoint was made from",
            option="base_checkpoint",
        )


def _rows(x: Tensor) -> Tensor:
    return x.detach().float().reshape(-1, x.shape[-1]).clone()


def _columns(original_ti: Tensor, base_ti: Tensor, own_oi: Tensor, base_oi: Tensor) -> Tensor:
    """x = columns * x_base, by least squares; by the weights for channels that no token uses."""
    ratio = _ratio((original_ti * base_ti).sum(0), base_ti.square().sum(0))
    by_weight = _ratio((own_oi * base_oi).sum(0), own_oi.square().sum(0))
    usable = torch.where(by_weight > 0, by_weight, torch.ones_like(by_weight))
    return torch.where(ratio.abs() > 1e-6, ratio, usable)


def _rows_of(target_oi: Tensor, base_oi: Tensor) -> Tensor:
    """base ~ diag(rows) target; ones, unless rows make most of the difference go."""
    rows = _ratio((target_oi * base_oi).sum(1), target_oi.square().sum(1))
    plain = torch.ones_like(rows)
    if not bool((rows > 0).all()):
        return plain
    left = (base_oi - rows[:, None] * target_oi) / rows[:, None]
    return rows if float(left.norm()) < MOST * float((base_oi - target_oi).norm()) else plain


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below.clamp_min(1e-30), torch.zeros_like(above))


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-30))
