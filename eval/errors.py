"""What can be wrong with what an evaluation is asked to do."""


class EvalError(ValueError):
    """A task, a text or a model that cannot be evaluated; the message says what would do."""
