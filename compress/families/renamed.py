"""RENAMED: options by their old names, for errors that name the new ones. Nothing is read by an old name."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Renamed:
    """What an option is called now."""

    new: str
    values: Mapping[str, str] = field(default_factory=dict)
    """Its values that have another name now, new by old."""
    methods: frozenset[str]
    """The methods that had it; another method may have an option of the old name."""


_CORRECTIONS = frozenset({"eora", "lqer", "svd_residual"})
_FACTORISATIONS = frozenset({"asvd", "fwsvd", "lord", "svd", "svd_llm", "welore"})

RENAMED: Mapping[str, Renamed] = {
    "then": Renamed(new="factor_quantizer", methods=_FACTORISATIONS),
    "guard": Renamed(new="holdout", values={"off": "none", "eighth": "1/8"}, methods=_CORRECTIONS),
    "anchor": Renamed(
        new="target",
        values={"none": "layer", "dense": "original"},
        methods=_CORRECTIONS | _FACTORISATIONS,
    ),
    "spread": Renamed(new="allocation", methods=frozenset({"cospadi"})),
    "adapter_allocation": Renamed(new="allocation", methods=_CORRECTIONS),
    "order": Renamed(
        new="act_order",
        values={"natural": "none", "activation": "desc_act"},
        methods=frozenset({"gptq"}),
    ),
}
FLAGS: Mapping[str, str] = {"--despite-differences": "--allow-mismatch"}
"""Flags of commands by their old names, which are no option of a recipe."""


def option_now(name: str) -> str | None:
    """What an option is called now: "holdout" for "method.guard"; None if it never had another name."""
    found = RENAMED.get(name.rpartition(".")[2])
    return None if found is None else found.new


def flag_now(flag: str) -> str | None:
    """What a flag is called now: "--holdout" for "--method.guard"; None if it never had another name."""
    option = option_now(flag.removeprefix("--").replace("-", "_"))
    return FLAGS.get(flag) if option is None else "--" + option.replace("_", "-")


def words_now(values: Mapping[str, object], known: Container[str]) -> str:
    """What those of the options in `values` that are `known` by another name are called now; empty for none."""
    return ", ".join(
        _now("", key, value)
        for key, value in values.items()
        if key not in known and key in RENAMED and RENAMED[key].new in known
    )


def old_words(method: Mapping[str, object], path: str = "") -> Iterator[str]:
    """The same of a method as an earlier version wrote it, by its name, and of the methods inside it."""
    for key, value in method.items():
        if key in RENAMED and method.get("name") in RENAMED[key].methods:
            yield _now(path, key, value)
        if isinstance(value, Mapping):
            yield from old_words(value, f"{path}{key}.")


def _now(path: str, key: str, value: object) -> str:
    found = RENAMED[key]
    if not isinstance(value, str):
        return f"`{path}{key}` is `{found.new}` now"
    return f"`{path}{key}: {value}` is `{found.new}: {found.values.get(value, value)}` now"
