"""How far compressed activations feed forward during calibration."""

import enum


class Propagate(enum.StrEnum):
    """How far compressed activations feed forward."""

    NONE = "none"
    """Every block sees what the original model would give it: statistics serve any method."""
    BLOCK = "block"
    """A block sees the output of the compressed blocks before it."""
    SUBLAYER = "sublayer"
    """Besides, within a block each layer sees its compressed predecessors: more passes, closer statistics."""
