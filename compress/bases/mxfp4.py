"""MXFP4 checkpoints of transformers' `mxfp4`: gpt-oss, whose stacked experts are stored in 4 bits of floating point.

NAME_blocks (E, o, i / 32, 16) uint8, two E2M1 codes a byte; NAME_scales (E, o, i / 32) E8M0. The model's parameter NAME
is (E, i, o), turned. Every product is a bfloat16 number, but for powers beyond its range.
Facts: transformers' `convert_moe_packed_tensors`.
Shapes: E = number of experts, o = out_features, i = in_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from compress.bases.base import Base, Loading, fits, names_in
from compress.bases.floats import e2m1, e8m0
from compress.errors import CheckpointError
from compress.forms.base import Form
from compress.models.checkpoint import some

BLOCKS, SCALES = "_blocks", "_scales"
GROUP, BYTES = 32, 16
"""Numbers that share a scale, and the bytes of their codes."""


class Mxfp4Base(Base, name="mxfp4"):
    """Stacked experts as codes of 4 bits, and powers of two for groups of 32; all else as it is."""

    published = True
    loading = Loading(
        packages=("accelerate", "kernels"), imports=(), arguments={}, peft=True, vllm=()
    )

    def _find_layers(self) -> tuple[str, ...]:
        """No layer is stored in 4 bits, only stacks. Raises CheckpointError for an incomplete one."""
        blocks = {key.removesuffix(BLOCKS) for key in self.reader if key.endswith(BLOCKS)}
        scales = {key.removesuffix(SCALES) for key in self.reader if key.endswith(SCALES)}
        if not blocks | scales:
            raise CheckpointError(
                f"{self.folder}: its config says {self.format}, but no tensor's name ends in {BLOCKS}; the two do not "
                "belong together, download the checkpoint again"
            )
        for one, other, end in ((blocks, scales, SCALES), (scales, blocks, BLOCKS)):
            lacking = [f"{name}{end}" for name in one - other]
            if lacking:
                raise CheckpointError(
                    f"{self.folder}: it lacks {some(lacking)}; the checkpoint is incomplete, download it again"
                )
        for pattern in names_in(self.settings, "modules_to_not_convert"):
            odd = sorted(name for name in blocks if fits(rf"(?:{pattern})(?=\.|$)", name))
            if odd:
                raise CheckpointError(
                    f"{self.folder}: {odd[0]} is stored in 4 bits, but modules_to_not_convert in its config has "
                    f"{pattern!r}, so that readers take it for ordinary weights; download the checkpoint again"
                )
        return ()

    @property
    def grid(self) -> str:
        """All experts have the same."""
        return f"experts in groups of {GROUP}"

    @cached_property
    def stacks(self) -> Mapping[str, tuple[str, ...]]:
        """The experts of each layer."""
        stems = [key.removesuffix(BLOCKS) for key in self.reader if key.endswith(BLOCKS)]
        return {stem: (f"{stem}{BLOCKS}", f"{stem}{SCALES}") for stem in stems}

    def stack_shape(self, name: str) -> tuple[int, ...]:
        """(E, i, o), with which the scales' shape must agree."""
        blocks, scales = self.stacks[name]
        shape = tuple(self.reader.shape(blocks))
        for tensor in (blocks, scales):
            if self.reader.dtype(tensor) != torch.uint8:
                found = str(self.reader.dtype(tensor)).removeprefix("torch.")
                raise CheckpointError(
                    f"{self.folder}: {tensor} is stored as {found}; it must be uint8"
                )
        if len(shape) != 4 or shape[3] != BYTES:
            raise CheckpointError(
                f"{self.folder}: {blocks} has the shape {shape}; it must be (experts, outputs, inputs / {GROUP}, "
                f"{BYTES})"
            )
        if tuple(self.reader.shape(scales)) != shape[:3]:
            raise CheckpointError(
                f"{self.folder}: {scales} has the shape {tuple(self.reader.shape(scales))}; it must be {shape[:3]} for "
                f"{blocks} of {shape}"
            )
        return shape[0], shape[2] * GROUP, shape[1]

    def stack(self, name: str) -> Tensor:
        """(E, i, o) bfloat16."""
        self.stack_shape(name)
        blocks, scales = self.stacks[name]
        powers = e8m0(f"{self.folder}: {scales}", self.reader[scales])
        found = []
        for codes, scale in zip(self.reader[blocks], powers, strict=True):  # fp32 of one expert
            values = e2m1(codes).mul_(scale[..., None]).flatten(-2)
            found.append(values.T.to(torch.bfloat16))
        stack = torch.stack(found)
        if not bool(torch.isfinite(stack).all()):
            raise CheckpointError(
                f"{self.folder}: {name} overflows with the scales in {scales}; the checkpoint is corrupt, download it "
                "again"
            )
        return stack

    def form(self, name: str) -> Form:
        """Raises KeyError: no layer is packed."""
        raise KeyError(name)

    def shape(self, name: str) -> tuple[int, int]:
        """Raises KeyError: no layer is packed."""
        raise KeyError(name)
