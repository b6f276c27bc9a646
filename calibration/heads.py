"""The kinds of output that a model can have: they decide how it is loaded, cut text for, and what its loss is."""

import enum


class Head(enum.StrEnum):
    """A kind of output."""

    NEXT_TOKEN = "next token"
    """Logits of the next token, at every token."""
    CLASSES = "classes"
    """Logits of the classes of a whole sequence."""
    FEATURES = "features"
    """Hidden states: an encoder, for embeddings."""
