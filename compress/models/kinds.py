"""What a layer or tensor is for, told by its name: attention, experts, embeddings; and which expert's it is."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable
from dataclasses import dataclass

from compress.models.names import block_and_place


class Kind(enum.StrEnum):
    """Kinds of weights, in the order in which tables list them."""

    ATTENTION = "attention"
    MLP = "dense MLP"
    SHARED = "shared experts"
    EXPERTS = "experts"
    ROUTERS = "routers"
    TABLES = "embeddings and head"
    OTHER = "other"


EMBEDDINGS = re.compile(r"embed|wte|wpe|word_embeddings", re.IGNORECASE)
HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_projection|score|classifier|pooler)(\.|$)")
NORMS = re.compile(r"norm|(^|[._])ln(_|\.|\d)", re.IGNORECASE)
_EXPERT = re.compile(r"(?P<module>(?:.*\.)?experts)\.(?P<number>\d+)\.(?P<layer>.+)")
_PARTS = {
    Kind.EXPERTS: re.compile(r"experts"),
    Kind.ROUTERS: re.compile(r"gate|.*router.*|shared_expert_gate"),
    Kind.SHARED: re.compile(r"shared_(experts?|mlp)"),
    Kind.ATTENTION: re.compile(r".*(attn|attention).*"),
    Kind.MLP: re.compile(r"mlp|feed_forward|ffn|fc\d"),
}
"""The first of these that a whole part of a dotted name matches says its kind."""


@dataclass(frozen=True)
class ExpertLayer:
    """A layer, or a tensor, of one expert of a mixture."""

    module: str
    """The name of what holds all experts: `model.layers.3.mlp.experts`."""
    number: int
    """Which of them."""
    layer: str
    """Its name inside the expert: `gate_proj`."""

    @property
    def block(self) -> int:
        """The number of the block."""
        return block_and_place(self.module)[0]

    @property
    def pattern(self) -> str:
        """The glob that matches this layer of every expert: `model.layers.3.mlp.experts.*.gate_proj`."""
        return f"{self.module}.*.{self.layer}"

    @property
    def of_all(self) -> str:
        """The name without the number: `model.layers.3.mlp.experts.gate_proj`."""
        return f"{self.module}.{self.layer}"


def expert_of(name: str) -> ExpertLayer | None:
    """Which expert's layer or tensor it is; None for one of no expert, or of experts that are stacked."""
    found = _EXPERT.fullmatch(name)
    return found and ExpertLayer(found["module"], int(found["number"]), found["layer"])


def has_experts(names: Iterable[str]) -> bool:
    """Whether layers or tensors of these names are those of a mixture of experts."""
    return any(kind_of(name) is Kind.EXPERTS for name in names)


def kind_of(name: str) -> Kind:
    """The kind of a layer or tensor; names of tensors may end in `.weight`."""
    parts = name.split(".")
    if HEAD.search(name):
        return Kind.TABLES
    if NORMS.search(name):
        return Kind.OTHER
    if EMBEDDINGS.search(name):
        return Kind.TABLES
    matching = (
        kind for kind, pattern in _PARTS.items() if any(pattern.fullmatch(part) for part in parts)
    )
    return next(matching, Kind.OTHER)


def leaf_of(name: str) -> str:
    """The last part of a layer's name, with what tells an expert's or a shared expert's from others: `experts.up_proj`.

    Layers of all experts have one leaf.
    """
    expert = expert_of(name)
    if expert is not None:
        return f"experts.{expert.layer}"
    return ".".join(name.split(".")[-2:]) if kind_of(name) is Kind.SHARED else name.split(".")[-1]
