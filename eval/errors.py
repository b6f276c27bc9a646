"""Errors of evaluations."""


class EvalError(ValueError):
    """A task, a text or a model that cannot be evaluated; the message says what would do."""
