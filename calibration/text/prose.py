"""The text that needs no download: the language reference that every CPython carries.

`pydoc_data.topics` holds about 80 articles, 465,000 characters in Python 3.11. Articles quote one
another ("if" is a part of "compound"), so a split by article alone would leak: a paragraph counts
once, and belongs to the held-out part if any of its articles does.
"""

import hashlib
import platform
from typing import Any

_HELD_OUT_EVERY = 4


def python_docs(part: str) -> tuple[list[str], dict[str, Any]]:
    """The articles of `part` ("calibration" or "heldout") and what they are.

    Of the articles in alphabetical order every fourth is held out.
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    held_names = names[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY]
    seen: set[str] = set()
    held_out = {name: _without_repeats(topics[name], seen) for name in held_names}
    if part == "heldout":
        chosen = held_out
    else:
        rest = [name for name in names if name not in held_out]
        chosen = {name: _without_repeats(topics[name], seen) for name in rest}
    texts = [text for text in chosen.values() if text]
    provenance = {
        "source": "python-docs",
        "kind": "built-in",
        "python": platform.python_version(),
        "sha256": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
        "topics": [name for name, text in chosen.items() if text],
    }
    return texts, provenance


def _without_repeats(text: str, seen: set[str]) -> str:
    """The paragraphs of `text` that are not in `seen`, which they join."""
    fresh = []
    for paragraph in text.split("\n\n"):
        key = " ".join(paragraph.split())
        if key and key not in seen:
            seen.add(key)
            fresh.append(paragraph)
    return "\n\n".join(fresh)
