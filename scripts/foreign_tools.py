"""Other tools that compress models, each in a virtual environment of its own: they want other versions than ours."""

import os
import subprocess
import venv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Tool:
    """What a tool needs, and how it makes a checkpoint."""

    packages: tuple[str, ...]
    program: str
    """Python: its arguments are the original, the folder to be made, bits, and JSON with `texts` and `ids` of them."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """For what runs in its environment."""


GPTQMODEL = Tool(
    (
        "gptqmodel==7.7.*",
        "torch>=2.14.1",
        "transformers==5.23.*",
        "optimum>=2.3",
        "peft>=0.21,<0.22",
    ),
    """
import json, sys
from gptqmodel import GPTQModel, QuantizeConfig
source, out, bits, calibration = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
model = GPTQModel.load(source, QuantizeConfig(bits=bits, group_size=64), device="cpu")
model.quantize(json.load(open(calibration))["texts"], batch_size=1)
model.save(out)
""",
    {"GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"},
)

AUTO_GPTQ = Tool(
    (
        "auto-gptq==0.7.1",
        *("torch==2.13.0", "transformers==4.41.2", "accelerate==0.30.1", "peft==0.11.1"),
        *("datasets==2.20.0", "pyarrow==16.1.0", "numpy<2"),
    ),
    # It asks for CUDA by name, which its own solver does not need; its transformers reads rope_theta elsewhere.
    """
import json, pathlib, shutil, sys, tempfile
import torch
import auto_gptq.modeling._base as its_own
from auto_gptq import BaseQuantizeConfig
from auto_gptq.modeling.llama import LlamaGPTQForCausalLM
from transformers import AutoModelForCausalLM
source, out, bits, calibration = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
its_own.CUDA_0, torch.cuda.synchronize = its_own.CPU, lambda *_: None
ids = [torch.tensor([each[:256]]) for each in json.load(open(calibration))["ids"] if len(each) >= 256]
with tempfile.TemporaryDirectory() as scratch:
    folder = shutil.copytree(source, pathlib.Path(scratch) / "model")
    config = json.loads((folder / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    config |= {"torch_dtype": "float32", "rope_theta": theta, "rope_scaling": None}
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
model.seqlen = 256
config = BaseQuantizeConfig(bits=bits, group_size=64, desc_act=False, sym=False)
wrapped = LlamaGPTQForCausalLM(model, False, config)
examples = [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in ids]
wrapped.quantize(examples, cache_examples_on_gpu=False, use_triton=False)
wrapped.save_quantized(out, use_safetensors=True)
""",
    {"HF_HUB_OFFLINE": "1"},
)

BITSANDBYTES = Tool(
    ("bitsandbytes==0.50.*", "torch==2.13.0", "transformers==5.23.*", "accelerate>=1.15"),
    """
import sys
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
source, out, bits = sys.argv[1], sys.argv[2], int(sys.argv[3])
assert bits == 4, "bitsandbytes has 4 bits, and 8 with quantised activations"
config = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)
model = AutoModelForCausalLM.from_pretrained(
    source, quantization_config=config, device_map="cpu", dtype=torch.float32
)
model.save_pretrained(out)
""",
    {"HF_HUB_OFFLINE": "1"},
)

TOOLS: Mapping[str, Tool] = {
    "gptqmodel": GPTQMODEL,
    "auto-gptq": AUTO_GPTQ,
    "bitsandbytes": BITSANDBYTES,
}


def make_environment(folder: Path, packages: tuple[str, ...]) -> Path:
    """The environment's Python, with the packages installed."""
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists():
        print(f"making {folder}", flush=True)
        venv.create(folder, with_pip=True)
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
    return python
