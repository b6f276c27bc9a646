"""Optional dependencies: what is asked for without them is refused before it starts, with the command that adds them.

Which distributions an extra brings is read from this distribution's own metadata, as pyproject.toml states it.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution, requires

from compress.errors import MissingExtraError

DISTRIBUTION = "compress-llm"
RUN = "run"
"""All that compresses, evaluates or reports; loading a checkpoint does without."""


def require(what: str, extra: str = RUN) -> None:
    """Raises MissingExtraError if a distribution of the extra is not installed, saying that `what` needs it.

    Source that was never installed states nothing, and nothing is refused.
    """
    absent = [name for name in distributions_of(extra) if not _is_installed(name)]
    if absent:
        be = "which is" if len(absent) == 1 else "which are"
        raise MissingExtraError(
            f"{what} needs {', '.join(absent)}, {be} not installed: pip install '{DISTRIBUTION}[{extra}]'"
        )


def distributions_of(extra: str) -> list[str]:
    """Names of the distributions that an extra adds, in their order; none if this one was never installed."""
    # Here, for whoever asks nothing of an extra does not need it.
    from packaging.requirements import Requirement

    try:
        stated = map(Requirement, requires(DISTRIBUTION) or ())
    except PackageNotFoundError:
        return []
    return [
        it.name
        for it in stated
        if it.marker is not None
        and it.marker.evaluate({"extra": extra})
        and not it.marker.evaluate({"extra": ""})
    ]


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True
