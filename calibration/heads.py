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
    IMAGE_TEXT = "next token beside images"
    """Logits of the next token, of a language model that has an image encoder at its side."""

    @property
    def writes_text(self) -> bool:
        """Whether the logits are of the next token, so that the model is a language model."""
        return self in (Head.NEXT_TOKEN, Head.IMAGE_TEXT)
