"""Which parameters of a test run in the quick part: a case or two take the main road, the others are slow."""

from collections.abc import Callable, Iterable

import pytest


def slow_if(is_slow: Callable[..., object], values: Iterable[object]) -> list[object]:
    """The values as parameters; those that `is_slow` says are of slow tests."""
    return [
        pytest.param(*given, marks=pytest.mark.slow) if is_slow(*given) else pytest.param(*given)
        for given in (value if isinstance(value, tuple) else (value,) for value in values)
    ]


def slow_but(values: Iterable[object], *, kept: object) -> list[object]:
    """The values as parameters, of slow tests but for `kept`."""
    return slow_if(lambda value: value != kept, values)
