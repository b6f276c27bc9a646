"""Stacks of experts in an MLX checkpoint, put together from experts that come one by one.

Shapes: o = out_features, i = in_features, e = experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.bases.mlx import Place
from compress.errors import CheckpointError


class ExpertStacks:
    """The tensors of each stack that is not complete."""

    def __init__(self, n_experts: int) -> None:
        """`n_experts`: in each stack."""
        self.n_experts = n_experts
        self._waiting: dict[str, dict[int, Mapping[str, Tensor]]] = {}
        self.paths: set[str] = set()
        """Those of the stacks that are complete."""

    def put(self, place: Place, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add an expert's tensors; those of the stack by name (e, ...) if it was the last, else nothing.

        Raises CheckpointError for experts of one stack that are stored in different ways.
        """
        members = self._waiting.setdefault(place.path, {})
        first = next(iter(members.values()), parts)
        if _kind(first) != _kind(parts):
            raise CheckpointError(
                f"mlx export: {place.path} holds all experts of its block in one way, and number {place.number} "
                f"differs from {next(iter(members))} in bits, groups or dtype; compress all of them alike, or "
                "--exclude '*experts*'"
            )
        members[place.number] = parts
        if len(members) < self.n_experts:
            return {}
        del self._waiting[place.path]
        self.paths.add(place.path)
        order = [members[number] for number in sorted(members)]
        return {part: torch.stack([one[part] for one in order]) for part in parts}

    def refuse_incomplete(self) -> None:
        """Raises CheckpointError for a stack in which an expert is missing."""
        for path, members in self._waiting.items():
            raise CheckpointError(
                f"mlx export: {path} has {len(members)} of {self.n_experts} experts; the checkpoint is incomplete"
            )


def _kind(parts: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {part: (value.shape, value.dtype) for part, value in parts.items()}
