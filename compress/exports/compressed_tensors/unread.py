"""What servers and transformers do not read of a compressed-tensors checkpoint: grids that they want to be one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from compress.families.quantiser import WHOLE_ROW
from compress.models.kinds import Kind, expert_of, kind_of

SETS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
"""Layers beside each other that vLLM and SGLang make one layer of."""


@dataclass(frozen=True)
class Told:
    """How a layer is stored, as far as readers care."""

    bits: int
    """0 for an ordinary weight."""
    group_size: int | None = None
    asymmetric: bool = False

    def __str__(self) -> str:
        if not self.bits:
            return "not quantised"
        rows = "whole rows" if self.group_size == WHOLE_ROW else f"groups of {self.group_size}"
        return f"{self.bits} bits, {rows}{', zero points' if self.asymmetric else ''}"


PLAIN = Told(0)


@dataclass(frozen=True)
class _Set:
    """Layers that are computed as one, and are not stored alike."""

    parent: str
    stored: Mapping[str, Told]
    """By the last part of a layer's name; of experts, by all after `experts.`."""

    @property
    def is_partly_plain(self) -> bool:
        return PLAIN in self.stored.values()

    def __str__(self) -> str:
        first: dict[Told, str] = {}
        for name, how in self.stored.items():
            first.setdefault(how, name)
        told = "; ".join(f"{name}: {how}" for how, name in first.items())
        return f"{self.parent} ({told})"


def fused_warnings(stored: Mapping[str, Told]) -> Iterator[str]:
    """A sentence for sets of several grids, and one for sets of which some layers are not quantised."""
    found = list(_mixed_sets(stored))
    for part, effect in (
        ([one for one in found if not one.is_partly_plain], "reads all with the first one's grid"),
        ([one for one in found if one.is_partly_plain], "refuses the checkpoint"),
    ):
        if part:
            more = f" and {len(part) - 1} more such sets" if len(part) > 1 else ""
            yield (
                f"vLLM computes as one what is stored differently in {part[0]}{more}, and {effect}; give the layers of "
                "such a set one grid, or leave all of them out; transformers reads each by itself, vLLM --export dense"
            )


def _mixed_sets(stored: Mapping[str, Told]) -> Iterator[_Set]:
    sets: dict[tuple[str, int], dict[str, Told]] = {}
    for name, how in stored.items():
        expert = expert_of(name)
        if expert is not None:  # one kernel computes all layers of all experts
            sets.setdefault((expert.module, -1), {})[f"{expert.number}.{expert.layer}"] = how
            continue
        parent, _, leaf = name.rpartition(".")
        number = next((k for k, members in enumerate(SETS) if leaf in members), None)
        if number is not None:
            sets.setdefault((parent, number), {})[leaf] = how
    for (parent, _), members in sets.items():
        if len(set(members.values())) > 1:
            yield _Set(parent, members)


def unread_by_transformers(stored: Mapping[str, Told]) -> Iterator[str]:
    """Sentences on experts and on several grids, which transformers 5.23 does not load."""
    experts = {how for name, how in stored.items() if kind_of(name) is Kind.EXPERTS}
    others = {how for how in stored.values() if how != PLAIN}
    if PLAIN in experts and others:
        yield (
            "transformers 5.23 loads no compressed-tensors checkpoint whose experts are not quantised; vLLM does, and "
            "transformers --export dense"
        )
    if any(how.asymmetric for how in experts):
        yield (
            "transformers 5.23 loads no experts with zero points; vLLM does; --symmetry symmetric is loaded by both"
        )
    if len(others) > 1:
        yield (
            "transformers 5.23 reads layers of several grids only without CompressedTensorsConfig(dequantize=True)"
        )
