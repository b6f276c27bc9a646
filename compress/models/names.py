"""Names of layers: the block and place that one tells, and the patterns that choose among them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from compress.errors import RecipeError


def block_and_place(name: str) -> tuple[int, str]:
    """The number of a layer's block, and what its name is within: `model.layers.3.mlp.up_proj` -> 3, `mlp.up_proj`."""
    _, *found = re.split(r"\.(\d+)\.", name, maxsplit=1)
    return (int(found[0]), found[1]) if found else (0, name)


def matches(name: str, pattern: str) -> bool:
    """Whether a glob matches a layer's full name or a run of its dotted parts: `k_proj`, `layers.0`, `*.mlp.*`."""
    return any(
        fnmatchcase(name, glob)
        for glob in (pattern, f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*")
    )


def select(
    names: Iterable[str], include: Sequence[str], exclude: Sequence[str]
) -> Mapping[str, str | None]:
    """For each layer, None if it is compressed, else the reason why not.

    Raises RecipeError for a pattern that matches nothing, and where nothing is left to compress.
    """
    known = list(names)
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(matches(name, pattern) for name in known):
                raise RecipeError(
                    f"{pattern!r} matches no linear layer of the decoder blocks; there are "
                    f"{', '.join(sorted({name.rpartition('.')[2] for name in known}))}, such as {known[0]}"
                    if known
                    else f"{pattern!r} matches nothing: the decoder blocks hold no linear layer",
                    option=option,
                )
    reasons: dict[str, str | None] = {}
    for name in known:
        excluded = next((pattern for pattern in exclude if matches(name, pattern)), None)
        if excluded is not None:
            reasons[name] = f"excluded by {excluded!r}"
        elif include and not any(matches(name, pattern) for pattern in include):
            reasons[name] = "not among --include"
        else:
            reasons[name] = None
    if known and all(reason is not None for reason in reasons.values()):
        raise RecipeError("together with exclude it leaves no layer to compress", option="include")
    return reasons
