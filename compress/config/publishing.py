"""Checks of the options that say what a result is called where it is published."""

import re

from compress.errors import RecipeError

_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")
_LONGEST = 96
"""Characters of a repository's name."""


def refuse_bad_id(name: str | None, option: str) -> None:
    """Raises RecipeError for what is no id of a repository on the hub: owner/name. None is not given."""
    if name is None:
        return
    problem = ""
    if not _HUB_ID.fullmatch(name):
        problem = "is no id of a repository on the hub"
    elif "--" in name or ".." in name or name.endswith((".", "-", ".git")):
        problem = "is no id that the hub takes: no --, no .., and no ., - or .git at the end"
    elif len(name.partition("/")[2]) > _LONGEST:
        problem = f"has a name of more than {_LONGEST} characters"
    if problem:
        raise RecipeError(f"{name!r} {problem}; write owner/name", option=option)


def refuse_bad_licence(name: str | None) -> None:
    """Raises RecipeError for a licence that cannot be an id or a name."""
    if name is not None and not re.fullmatch(r"[\w.+ -]*\w[\w.+ -]*", name):
        raise RecipeError(
            f"{name!r}; write the hub's id of the licence (apache-2.0, mit, llama3.1, ...), or its name",
            option="license",
        )
