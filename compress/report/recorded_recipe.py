"""The parts of the recipe in a report that readers count on: reports may be cut, edited or made by hand.

The rest of the recipe is kept as it is: a later version's options are nothing to refuse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.errors import CheckpointError
from compress.families.renamed import old_words

_KINDS: Mapping[str, tuple[type, ...]] = {
    "model": (str,),
    "method": (Mapping,),
    "tasks": (list, tuple),
    "eval_text": (str, type(None)),
    "eval_windows": (int,),
}
_WORDS = {str: "text", Mapping: "an object", list: "a list", int: "a number"}


def refuse_unreadable(recipe: Mapping[str, Any], path: str) -> None:
    """Raises CheckpointError naming an entry that is missing, of a wrong type or of an older version."""
    for key, kinds in _KINDS.items():
        if key not in recipe:
            raise CheckpointError(f"{path}: missing {key}")
        if not isinstance(recipe[key], kinds) or isinstance(recipe[key], bool):
            raise CheckpointError(f"{path}.{key}: {recipe[key]!r} is not {_WORDS[kinds[0]]}")
    _refuse_others(recipe["tasks"], f"{path}.tasks")
    if told := list(old_words(recipe["method"])):
        raise CheckpointError(
            f"{path}.method: {', '.join(told)}: an earlier version wrote this; change the words in the file"
        )
    method: Any = recipe["method"]
    where = f"{path}.method"
    while method is not None:
        if not isinstance(method, Mapping):
            raise CheckpointError(f"{where}: {method!r} is no method with a name")
        if not isinstance(method.get("name"), str):
            raise CheckpointError(f"{where}: missing name")
        method, where = method.get("base"), f"{where}.base"


def _refuse_others(names: Sequence[Any], path: str) -> None:
    other = next((name for name in names if not isinstance(name, str)), None)
    if other is not None:
        raise CheckpointError(f"{path}: {other!r} is no name of a task")


def method_text(method: Mapping[str, Any]) -> str:
    """A method and its base by name: "eora on gptq"."""
    base = method.get("base")
    name = str(method["name"])
    return f"{name} on {method_text(base)}" if isinstance(base, Mapping) else name
