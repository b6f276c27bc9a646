"""Which special tokens a window of text begins with."""

import enum


class Bos(enum.StrEnum):
    """What the first tokens of every window of packed text are."""

    AUTO = "auto"
    """What the tokenizer itself puts in front of a text; nothing if it puts nothing there."""
    ALWAYS = "always"
    """The tokenizer's `bos_token`, even if it does not add it by itself."""
    NEVER = "never"
    """Nothing: windows begin in the middle of text, and only the end-of-text token joins documents."""
