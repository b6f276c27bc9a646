"""Refuses a stranger's `calibration` or `eval` package that Python would import instead of ours."""

from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

_NEIGHBOURS = ("calibration", "eval")


def refuse_strangers() -> None:
    """Checks that the packages this one stands on lie beside it.

    Other distributions install packages of these names, and an eval.py in the current folder wins
    under `python -m`.

    Raises:
        ImportError: naming the file that is in the way.
    """
    parent = Path(__file__).resolve().parent.parent
    for name in _NEIGHBOURS:
        found = _location(name)
        if found != parent / name:
            raise ImportError(
                f"`{name}` would be imported from {found}, not from {parent / name}: another "
                f"package or file of that name is in the way. Uninstall or rename it, start from "
                f"another folder, or give compress-llm an environment of its own.",
                name=name,
            )


def _location(name: str) -> Path | None:
    """Folder of the package that `import name` gives, or the file if it is no package."""
    try:
        spec = find_spec(name)
    except ValueError:  # imported already, without a spec, as some test runners do
        spec = PathFinder.find_spec(name)
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    return Path(spec.origin).resolve() if spec.origin else None
