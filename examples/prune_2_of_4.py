"""Prune to two of every four weights with SparseGPT, and add a low-rank correction.

python examples/prune_2_of_4.py [MODEL] [OUT]
"""

import sys
from pathlib import Path

from compress import Recipe, load_export, run


def main(model: str = "demo", out: str = "example-pruned") -> None:
    """Prune without and with a correction, and compare the errors of the layers."""
    folder = Path(out)
    quick = {"model": model, "samples": 16, "seq_len": 128, "eval_windows": 0, "tasks": []}
    pruned = {"name": "sparsegpt", "pattern": "2:4", "value_dtype": "bfloat16"}
    corrected = {"name": "eora", "base": pruned, "rank": 16}
    first, second = (
        run(Recipe.from_mapping({**quick, "out": folder / name, "method": method}))
        for name, method in {"pruned": pruned, "corrected": corrected}.items()
    )
    for before, after in zip(first.layers, second.layers, strict=True):
        print(f"{before.name}: error {before.relative_error:.3f} -> {after.relative_error:.3f}")
    loaded = load_export(folder / "corrected")
    print(f"{second.totals.tensor_bytes_after} bytes; loads as {type(loaded).__name__}")


if __name__ == "__main__":
    main(*sys.argv[1:])
