"""The options, groups and forms that all quantisers share."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from compress.errors import RecipeError
from compress.families.base import Compressor, LayerShape
from compress.forms.base import Form
from compress.forms.packing import words_for
from compress.forms.quantised import Quantised
from compress.solvers.grid import Grid, ScaleSearch, Symmetry

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (128, 64, 32)
FACTOR_GROUP = 64
WHOLE_ROW = -1
WORD_BYTES, SCALE_BYTES = 4, 2


@dataclass(frozen=True, kw_only=True)
class Quantiser(Compressor, ABC):
    """Options of every method that stores integer codes."""

    bits: int = field(
        default=4,
        metadata={
            "help": "bits of a weight's code: 2, 3, 4, 5, 6, 8; gptq exports hold no 5 and 6"
        },
    )
    group_size: int | None = field(
        default=None,
        metadata={
            "help": "inputs that share a scale; -1: a whole row. Default: the largest of 128, 64, 32 that divides "
            "every layer's inputs"
        },
    )
    symmetry: Symmetry = field(
        default=Symmetry.SYMMETRIC,
        metadata={
            "help": "what a group stores beside its scale: nothing, a zero point, or (affine) a float offset; "
            "gptq exports hold no offsets"
        },
    )
    scales: ScaleSearch = field(
        default=ScaleSearch.SEARCH,
        metadata={
            "help": "scale of a group: least error weighted by diag(G), or the smallest that clips nothing"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in BITS:
            raise RecipeError(
                f"{self.bits} is not supported; choose {', '.join(map(str, BITS))}",
                option="bits",
            )
        if self.group_size is not None and self.group_size < 1 and self.group_size != WHOLE_ROW:
            raise RecipeError(
                f"must be 1 or more, or -1 for a whole row, got {self.group_size}",
                option="group_size",
            )

    @property
    def grid(self) -> Grid:
        """The grid of these options."""
        return Grid(self.bits, self.symmetry, self.scales)

    def plan(
        self,
        layers: Mapping[str, LayerShape],
        rest_bytes: int = 0,  # noqa: ARG002  (bits decide the bytes, not a budget)
    ) -> dict[str, Compressor]:
        """Every layer's method with the group size settled.

        Raises RecipeError naming layers whose inputs it does not divide.
        """
        inputs = {name: layer.shape[1] for name, layer in layers.items()}
        if self.group_size is None:
            fitting = [size for size in GROUP_SIZES if all(n % size == 0 for n in inputs.values())]
            if not fitting:
                odd = {name: n for name, n in inputs.items() if n % GROUP_SIZES[-1]}
                raise RecipeError(
                    f"none of 128, 64, 32 divides the inputs of {_shown(odd)}; give one",
                    option="group_size",
                )
            return dict.fromkeys(layers, replace(self, group_size=fitting[0]))
        if self.group_size != WHOLE_ROW:
            odd = {name: n for name, n in inputs.items() if n % self.group_size}
            if odd:
                sizes = [
                    s
                    for s in (256, *GROUP_SIZES, 16, 8)
                    if all(n % s == 0 for n in inputs.values())
                ]
                raise RecipeError(
                    f"{self.group_size} does not divide the inputs of {_shown(odd)}; "
                    f"{', '.join(map(str, sizes)) or 'only -1, a whole row,'} would",
                    option="group_size",
                )
        return dict.fromkeys(layers, self)

    def leaves(self, layers: Mapping[str, LayerShape]) -> Mapping[str, str]:
        """Where no group size was given, layers whose inputs no default divides, unless they are all of that kind."""
        least = GROUP_SIZES[-1]
        odd = {name: layer.shape[1] for name, layer in layers.items() if layer.shape[1] % least}
        if self.group_size is not None or len(odd) == len(layers):
            return {}
        return {
            name: f"its {n} inputs are no multiple of {least}, the smallest default group"
            for name, n in odd.items()
        }

    def for_factors(self) -> Self:
        """The quantiser with a group size for thin factors of any rank, whose last group may be shorter."""
        return replace(self, group_size=self.group_size or FACTOR_GROUP)

    def group_of(self, n_inputs: int) -> int:
        """The settled group size of a layer with so many inputs."""
        return n_inputs if self.group_size in (None, WHOLE_ROW) else int(self.group_size or 0)

    def planned_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of codes and fp16 scales; of zero points or fp16 offsets; of input groups if out of order."""
        (o, i), (zeros, groups) = shape, self._zeros_and_groups(shape)
        scales = self._n_groups(i) * o * SCALE_BYTES
        beside = {Symmetry.ASYMMETRIC: zeros, Symmetry.AFFINE: scales}.get(self.symmetry, 0)
        codes = words_for(i, self.bits) * o * WORD_BYTES
        return codes + scales + beside + (0 if self.in_order else groups)

    def gptq_extra_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes that the GPTQ layout stores beyond the form: it always has zero points and every input's group.

        Raises ValueError for an affine grid, which it does not hold.
        """
        if self.symmetry is Symmetry.AFFINE:
            raise ValueError("the GPTQ layout holds no affine grid")
        zeros, groups = self._zeros_and_groups(shape)
        return (0 if self.symmetry is Symmetry.ASYMMETRIC else zeros) + (
            groups if self.in_order else 0
        )

    @property
    def in_order(self) -> bool:
        """Whether input i is in group i // group_size, so that no input's group is stored."""
        return True

    def _n_groups(self, n_inputs: int) -> int:
        return -(-n_inputs // self.group_of(n_inputs))

    def _zeros_and_groups(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Bytes of the packed zeros and of the int32 group of every input."""
        o, i = shape
        return self._n_groups(i) * words_for(o, self.bits) * WORD_BYTES, i * WORD_BYTES

    def forms(
        self,
        codes_oi: Tensor,
        scales_og: Tensor,
        zeros_og: Tensor,
        rows: Sequence[int],
        groups_i: Tensor | None = None,
    ) -> list[Form]:
        """The forms of a stack of quantised rows, one for each weight; `groups_i` if groups are not in order.

        On an affine grid the zeros are real numbers, -offset / scale.
        """
        each: list[Tensor | None] = [None] * len(rows)
        if self.symmetry is Symmetry.ASYMMETRIC:
            each = list(zeros_og.to(torch.uint8).split(list(rows)))
        found = [
            Quantised.from_codes(
                codes,
                scales,
                zeros,
                bits=self.bits,
                group_size=self.group_of(codes.shape[1]),
                groups_i=groups_i,
            )
            for codes, scales, zeros in zip(
                codes_oi.split(list(rows)), scales_og.split(list(rows)), each, strict=True
            )
        ]
        if self.symmetry is not Symmetry.AFFINE:
            return list(found)
        offsets = self.grid.offsets(scales_og, zeros_og).split(list(rows))
        return [form.with_offsets(part) for form, part in zip(found, offsets, strict=True)]


def stacked(weights: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Weights that share an input as one stack (fp32), and the number of rows of each."""
    return torch.cat([weight.float() for weight in weights]), [
        weight.shape[0] for weight in weights
    ]


def _shown(layers: Mapping[str, int]) -> str:
    few = [f"{name} ({n})" for name, n in list(layers.items())[:3]]
    return ", ".join(few) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
