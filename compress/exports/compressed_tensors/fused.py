"""Layers that servers compute as one, and whose grids must therefore be one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from compress.models.kinds import expert_of

SETS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
"""Layers beside each other that vLLM and SGLang make one layer of."""
PLAIN = "as it is"


@dataclass(frozen=True)
class Mixed:
    """A set of fused layers that are not stored alike."""

    parent: str
    """What holds them."""
    stored: Mapping[str, str]
    """How each is stored, by the last part of its name; of experts, by all after the number."""

    @property
    def is_partly_plain(self) -> bool:
        """Whether some of them are ordinary weights."""
        return PLAIN in self.stored.values()

    def __str__(self) -> str:
        told = "; ".join(f"{name}: {how}" for name, how in self.stored.items())
        return f"{self.parent} ({told})"


def mixed_sets(stored: Mapping[str, str]) -> Iterator[Mixed]:
    """The sets whose members differ, given how each layer is stored: a grid in words, or `PLAIN`."""
    sets: dict[tuple[str, int], dict[str, str]] = {}
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
            first = {how: name for name, how in reversed(members.items())}
            shown = members if len(members) <= len(SETS[0]) else {n: h for h, n in first.items()}
            yield Mixed(parent, shown)


def fused_warnings(stored: Mapping[str, str]) -> Iterator[str]:
    """A sentence for sets of several grids, and one for sets of which some are plain."""
    found = list(mixed_sets(stored))
    for part, effect in (
        ([one for one in found if not one.is_partly_plain], "reads all with the first one's grid"),
        ([one for one in found if one.is_partly_plain], "refuses the checkpoint"),
    ):
        if part:
            more = f", and {len(part) - 1} more such sets" if len(part) > 1 else ""
            yield (
                f"vLLM computes as one what is stored differently in {part[0]}{more}, and {effect}; give the layers of "
                "such a set one grid, or leave all of them out; transformers reads each by itself, vLLM --export dense"
            )
