"""Quantise a model to 4 bits with GPTQ, correct it with EoRA, and load the result.

python examples/quantise_and_correct.py [MODEL] [OUT]
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress import Recipe, run
from compress.methods.eora import EoRA
from compress.methods.gptq import GPTQ


def main(model: str = "demo", out: str = "example-quantised") -> None:
    """Write the checkpoint, print what it lost, and ask it for a word."""
    gptq = GPTQ(bits=4, group_size=32)
    eora = EoRA(base=gptq, rank=16)
    quick = Recipe(model=model, samples=16, seq_len=128, eval_windows=4, tasks=())
    report = run(replace(quick, out=Path(out), method=eora))
    print(f"bits per weight in these layers: {report.totals.layer_bits_per_weight:.2f}")
    assert report.scores is not None
    assert report.scores.after.fidelity is not None
    print(f"KL divergence: {report.scores.after.fidelity.kl:.4f} nats per token")

    tokenizer = AutoTokenizer.from_pretrained(out)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        likeliest = loaded(ids).logits[0, -1].argmax()
    print(f"The capital of France is{tokenizer.decode(likeliest)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
