"""Holm's correction of p-values for several tests."""

from collections.abc import Sequence


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for there being several (Holm 1979): the k-th smallest of m times m - k + 1, never falling."""
    n, reached = len(p_values), 0.0
    adjusted = [0.0] * n
    for done, index in enumerate(sorted(range(n), key=p_values.__getitem__)):
        reached = max(reached, min(1.0, (n - done) * p_values[index]))
        adjusted[index] = reached
    return adjusted
