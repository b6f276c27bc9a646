"""Factorise a model, train its factors for a few steps, and save a checkpoint that loads like the first.

python examples/fine_tune_factors.py [MODEL] [OUT]
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress import Recipe, run, save_trained, trainable_factors
from compress.methods.svd_llm import SVDLLM

TEXT = "A low-rank model has few parameters to train. " * 8


def main(model: str = "demo", out: str = "example-tuned") -> None:
    """Four steps of AdamW on the factors alone."""
    folder = Path(out)
    method = SVDLLM(keep=0.8, rank_multiple=1)
    quick = Recipe(model=model, samples=16, seq_len=128, eval_windows=0, tasks=())
    run(replace(quick, out=folder / "factorised", method=method))

    tokenizer = AutoTokenizer.from_pretrained(folder / "factorised")
    loaded = AutoModelForCausalLM.from_pretrained(folder / "factorised", dtype=torch.float32)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    optimiser = torch.optim.AdamW(trainable_factors(loaded).values(), lr=1e-4)
    for step in range(4):
        loss = loaded(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}")
    save_trained(loaded, folder / "factorised", folder / "tuned")


if __name__ == "__main__":
    main(*sys.argv[1:])
