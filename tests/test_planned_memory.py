"""What a plan says of memory is what a run takes, seen in a process that has done nothing else."""

import json
import subprocess
import sys

import pytest
import torch
from families import byte_tokenizer
from transformers import MixtralConfig, MixtralForCausalLM
from workspaces import TEXT

RUN = """
import json, sys, threading, time
from pathlib import Path
import psutil
import compress
from compress import Recipe
from compress.methods.gptq import GPTQ
from compress.pipeline import main

folder, text = map(Path, sys.argv[1:])
recipe = Recipe(model=str(folder / "model"), method=GPTQ(), calibration=(str(text),), samples=16, seq_len=256,
                eval_windows=0, tasks=(), out=folder / "out", statistics="off")
(planned,) = [line for line in compress.plan(recipe).text if line.startswith("memory")]
seen, process = [], psutil.Process()

def watch():
    while True:
        seen.append(process.memory_info().rss)
        time.sleep(0.01)

class Written(Exception):
    pass

def stop(*_, **__):
    raise Written

main._verified = stop  # verification is another process's, and comes after
threading.Thread(target=watch, daemon=True).start()
try:
    compress.run(recipe)
except Written:
    print(json.dumps([planned, max(seen)]))
"""


@pytest.mark.slow
def test_a_layer_of_128_experts_takes_the_memory_that_the_plan_says(tmp_path):
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_local_experts=128,
        num_experts_per_tok=4,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 40, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path), str(text)],
        capture_output=True,
        text=True,
        check=True,
    )
    planned, peak = json.loads(done.stdout.splitlines()[-1])
    told = float(planned.partition("about ")[2].split()[0]) * 1e9
    assert peak <= 1.2 * told
    assert told <= 2 * peak
