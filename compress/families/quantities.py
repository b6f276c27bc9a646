"""Amounts as people write them."""

import re

from compress.errors import RecipeError

UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}


_KNOWN = "B, kB, MB, GB, TB, KiB, MiB, GiB, TiB"


def parse_bytes(text: str, option: str) -> int:
    """A number of bytes from `120MB`, `1.5 GiB` or `4096`. Raises RecipeError naming the option."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].lower() not in UNITS:
        raise RecipeError(
            f"{text!r} is not an amount of bytes; write 120MB, 1.5GiB or 4096 (units: {_KNOWN})",
            option=option,
        )
    return int(float(match[1]) * UNITS[match[2].lower()])


def parse_share_or_bytes(text: str, whole: int, option: str, of: str) -> int:
    """Bytes from `20MB`, or from a share of some whole, `5%`; `of` says whose.

    Raises RecipeError naming the option, for more than the whole too.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if match and float(match[1]) > 100:
        raise RecipeError(
            f"{text} is more than all of {of} bytes; 100% is the most, or give bytes (20MB)",
            option=option,
        )
    if match:
        return int(float(match[1]) / 100 * whole)
    try:
        return parse_bytes(text, option)
    except RecipeError as error:
        raise RecipeError(f"{error.reason}, or 5% of {of}", option=option) from error
