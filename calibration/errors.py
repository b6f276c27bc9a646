"""What can be wrong with the text and the model that a calibration reads."""


class InputError(ValueError):
    """A text source, a tokenizer or an activation that cannot be used; the message says what would do."""
