"""Which tokens tell the statistics of experts. The names are options of a run, so this module imports no torch."""

import enum


class Routing(enum.StrEnum):
    """The tokens from which the statistics of an expert are collected; what the model computes is the same."""

    ROUTED = "routed"
    """Those that the router sends to it; where these are few, the layer's others are mixed in."""
    POOLED = "pooled"
    """Those that are sent to any expert of the layer, each inside the expert that reads it."""
    ALL = "all"
    """All tokens, through every expert."""
