"""mlx-lm, on Apple's machines and on a CPU.

It is asked to compute in fp32, whatever the model's dtype: MLX's CPU adds up products of 16-bit numbers in 16 bits,
which loses more than any codes, and its GPU does not. Weights, codes and adapter are what the folder holds either way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.engines.base import PROGRAMS, Arithmetic, Engine, Export


class Mlx(Engine, name="mlx"):
    """Loads with `mlx_lm.load`, the adapter too."""

    module = "mlx_lm"
    requirements = ("mlx[cpu]==0.32.4", "mlx-lm==0.32.2")
    program = PROGRAMS / "with_mlx.py"

    @classmethod
    def modules(cls, export: Export) -> tuple[str, ...]:
        """MLX and mlx-lm."""
        del export
        return (cls.module, "mlx")

    @classmethod
    def request(cls, export: Export) -> dict[str, Any]:
        """The folder, and its adapter's."""
        adapter = None if export.adapter is None else str(export.adapter)
        return {"model": str(export.model), "adapter": adapter}

    @classmethod
    def arithmetic(cls, export: Export, answer: Mapping[str, Any]) -> Arithmetic:
        """The dtype of its logits, in everything."""
        del export
        return Arithmetic(activations=answer["dtype"])
