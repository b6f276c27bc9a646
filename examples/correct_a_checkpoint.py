"""Correct an existing compressed checkpoint: the result is a PEFT adapter, the checkpoint stays as it is.

python examples/correct_a_checkpoint.py [MODEL] [OUT]
"""

import sys
from dataclasses import replace
from pathlib import Path

from compress import Recipe, run
from compress.methods.eora import EoRA
from compress.methods.gptq import GPTQ


def main(model: str = "demo", out: str = "example-corrected") -> None:
    """Make a GPTQ checkpoint, which stands for somebody else's, and correct it."""
    folder = Path(out)
    quick = Recipe(model=model, samples=16, seq_len=128, eval_windows=4, tasks=())
    gptq = GPTQ(bits=4, group_size=32)
    run(replace(quick, out=folder / "base", method=gptq, export=("gptq",)))

    eora = EoRA(rank=16)
    onto = replace(quick, base_checkpoint=str(folder / "base"), export=("adapter",))
    report = run(replace(onto, out=folder / "corrected", method=eora))
    for layer in report.layers[:5]:
        print(f"{layer.name}: error {layer.base_error:.4f} -> {layer.relative_error:.4f}")
    print(f"the adapter is {folder / 'corrected' / 'adapter'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
