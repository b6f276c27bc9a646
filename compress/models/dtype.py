"""The number formats that a run can compute in, by name."""

from enum import StrEnum


class Dtype(StrEnum):
    """The number format that a model computes in; auto takes the one of its checkpoint."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
