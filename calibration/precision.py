"""What matrix products of fp32 keep of their factors on CUDA devices."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch


@contextmanager
def cuda_products(precision: Literal["ieee", "tf32"]) -> Iterator[None]:
    """Within it all 23 bits ("ieee") or 10 of them ("tf32"); after it, whatever the program had set before."""
    backend = torch.backends.cuda.matmul
    # Restored through `allow_tf32`, a program's own "medium" would become something that torch refuses to tell.
    has_names = hasattr(backend, "fp32_precision")  # from torch 2.9 on
    name = "fp32_precision" if has_names else "allow_tf32"
    before = getattr(backend, name)
    setattr(backend, name, precision if has_names else precision == "tf32")
    try:
        yield
    finally:
        setattr(backend, name, before)
