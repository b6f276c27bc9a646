"""Makes the checkpoints beside it, and what they are to load as. Runs on commit 3bfa062 only: they are its own.

    git worktree add ../old 3bfa062
    PYTHONPATH=../old HF_HUB_OFFLINE=1 python tests/written_by_3bfa062/make.py FOLDER

FOLDER must not exist; `checkpoints` and `expected` in it then take the place of those here. Nothing here is ever to be
made by a newer commit: what that writes proves nothing about what this one wrote.

Every checkpoint comes from a run of the whole pipeline on a tiny random model. What loading does not need is dropped
(card, page, probe, tokenizer, the shipped code), except from `native-complete`, which lacks only card and page.
Adapters call their base by its folder's name, so they load from within `checkpoints`.

`expected/NAME.safetensors`: `input_ids`, and the `logits` in fp32; `weight/PATH`, what a form stands for, or a factor;
`offset/PATH`, what a form adds to its layer's outputs. PATH is a module's. Of forms that multiply factors it is their
parts that are here: what takes no sums is the same to the bit on every processor.
"""

import os
import platform
import random
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

import compress
from compress import pipeline
from compress.exports.load import load_export
from compress.forms import CompressedLinear, Form, LowRank, Product
from compress.recipe import Recipe
from compress.verify import check

COMMIT = "3bfa062"
LETTERS = "abcdefghijklmnopqrstuvwxyz ."
IDS = torch.tensor([[3, 7, 12, 30, 21, 9, 5, 26]])
IDLE = ("*.md", "*.html", "*.py", "report.json", "recipe.yaml", "probe.safetensors", "tokenizer*")
SHAPE = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    **SHAPE,
    **{"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2},
    **{"num_hidden_layers": 1, "max_position_embeddings": 64},
}
SMALL = {**LLAMA, "intermediate_size": 16, "head_dim": 8, "tie_word_embeddings": True}
MODELS = {
    "small": ("llama", SMALL, torch.bfloat16),
    "full": ("llama", SMALL, torch.float32),
    "wide": ("llama", LLAMA, torch.bfloat16),
    "deep": ("llama", {**LLAMA, "num_hidden_layers": 2}, torch.bfloat16),
    "biased": (
        "gpt2",
        {**SHAPE, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64},
        torch.bfloat16,
    ),
}
"""By name: family, options, dtype. Sizes of 16 do not fill their rows of 32 packed codes; GPTQ wants them full."""


def gptq(bits: int, **options: object) -> dict[str, object]:
    return {"name": "gptq", "bits": bits, "group_size": 16, **options}


def cospadi(**options: object) -> dict[str, object]:
    return {"name": "cospadi", "rounds": 2, "atoms": 8, **options}


def eora(base: object, **options: object) -> dict[str, object]:
    return {"name": "eora", "rank": 4, "base": base, **options}


FEW, ATTENTION, MLP, ALL = ("k_proj", "down_proj"), ("self_attn",), ("gate_proj", "down_proj"), ()
APART = ("layers.0.mlp.down_proj", "layers.1.self_attn.k_proj")
GATED, BIASED = ("gate_proj", "up_proj"), ("c_attn", "attn.c_proj")
ASYMMETRIC = {"symmetry": "asymmetric"}
NATIVE: dict[str, tuple[str, object, tuple[str, ...]]] = {
    "complete": ("small", eora(gptq(4)), FEW),
    "2-bit-asymmetric": ("small", gptq(2, **ASYMMETRIC), FEW),
    "3-bit-asymmetric": ("wide", gptq(3, **ASYMMETRIC), FEW),
    "4-bit": ("small", {"name": "rtn", "bits": 4, "group_size": 16}, FEW),
    "4-bit-activation-order": ("small", gptq(4, order="activation", **ASYMMETRIC), FEW),
    "5-bit-asymmetric": ("wide", gptq(5, **ASYMMETRIC), FEW),
    "6-bit-whole-rows": ("small", {"name": "gptq", "bits": 6, "group_size": -1}, FEW),
    "8-bit-asymmetric": ("full", {"name": "rtn", "bits": 8, "group_size": 16, **ASYMMETRIC}, FEW),
    "2-bit-biased": ("biased", gptq(2), BIASED),
    "low-rank": ("small", {"name": "svd_llm", "rank": 8}, FEW),
    "low-rank-float32": ("small", {"name": "svd", "rank": 4, "factor_dtype": "float32"}, FEW),
    "low-rank-offset": ("small", {"name": "lord", "rank": 8, "factor_dtype": "float16"}, FEW),
    "product": ("small", {"name": "svd_llm", "rank": 8, "then": gptq(3)}, FEW),
    "product-offset": ("wide", {"name": "lord", "rank": 8, "then": gptq(8, **ASYMMETRIC)}, FEW),
    "repaired-bfloat16": (
        "small",
        {"name": "lqer", "rank": 4, "factor_dtype": "bfloat16", "base": gptq(3)},
        FEW,
    ),
    "repaired-4-bit": ("wide", eora(gptq(3), adapter_bits="4"), FEW),
    "repaired-low-rank-offset": ("small", eora({"name": "lord", "rank": 4}), FEW),
    "repaired-sparse": ("small", eora({"name": "wanda", "sparsity": 0.75}), FEW),
    "sparse": ("small", {"name": "wanda"}, FEW),
    "sparse-2-of-4": ("small", {"name": "magnitude", "pattern": "2:4"}, FEW),
    "sparse-float32": (
        "small",
        {"name": "magnitude", "sparsity": 0.75, "value_dtype": "float32"},
        FEW,
    ),
    "sparse-float16": (
        "small",
        {"name": "dsnot", "base": {"name": "wanda", "value_dtype": "float16"}},
        FEW,
    ),
    "sparse-2-of-4-in-4-bits": (
        "small",
        {"name": "sparsegpt", "pattern": "2:4", "value_bits": "4"},
        FEW,
    ),
    "sparse-in-8-bits": ("wide", {"name": "sparsegpt", "value_bits": "8"}, FEW),
    "sparse-in-14-bits": ("small", {"name": "wanda", "value_bits": "14"}, FEW),
    "sparse-in-13-bits": ("small", {"name": "admm", "value_bits": "13"}, FEW),
    "dictionary": ("small", cospadi(), ATTENTION),
    "dictionary-of-inputs-in-int8": (
        "wide",
        cospadi(share="none", coded="inputs", dictionary_dtype="int8", code_bits="8"),
        MLP,
    ),
    "dictionary-across-depth": ("deep", cospadi(share="depth"), ("k_proj", "v_proj")),
    "dictionary-float32": (
        "small",
        cospadi(share="none", atoms=4, dictionary_dtype="float32"),
        MLP,
    ),
    "dictionary-2-of-4-in-14-bits": (
        "small",
        cospadi(pattern="2:4", code_bits="14", dictionary_dtype="float16"),
        ATTENTION,
    ),
    "dictionary-in-13-bits": ("small", cospadi(share="none", atoms=4, code_bits="13"), MLP),
    "dictionary-int8-in-4-bits": ("wide", cospadi(dictionary_dtype="int8", code_bits="4"), GATED),
    "dictionary-repaired": ("small", eora(cospadi(), rank=2), ATTENTION),
}
"""By name: model, method, layers."""

GPTQ: dict[str, tuple[str, object, tuple[str, ...]]] = {
    "2-bit": ("wide", gptq(2), FEW),
    "3-bit-of-all-layers": ("wide", gptq(3, group_size=32), ALL),
    "4-bit-with-adapter": ("deep", eora(gptq(4, group_size=32)), APART),
    "4-bit-activation-order-with-adapter": (
        "wide",
        eora(gptq(4, order="activation"), adapter_bits="8", rank=3),
        FEW,
    ),
    "4-bit-asymmetric": ("wide", gptq(4, **ASYMMETRIC), FEW),
    "3-bit-asymmetric-with-adapter": (
        "wide",
        {"name": "lqer", "rank": 2, "factor_dtype": "bfloat16", "base": gptq(3, **ASYMMETRIC)},
        FEW,
    ),
    "8-bit-whole-rows": ("wide", {"name": "rtn", "bits": 8, "group_size": -1}, FEW),
}
DENSE: dict[str, tuple[str, object, tuple[str, ...]]] = {
    "repaired": ("wide", eora(gptq(2)), FEW),
    "float32": ("full", {"name": "svd", "rank": 4}, FEW),
    "biased": ("biased", {"name": "wanda"}, BIASED),
}
ON_BASE: dict[str, tuple[str, str, dict[str, object]]] = {
    "adapter-on-gptq": ("wide", "gptq-2-bit", {"rank": 4}),
    "adapter-on-gptq-of-several-ranks": (
        "wide",
        "gptq-3-bit-of-all-layers",
        {"adapter_budget": "40%", "factor_dtype": "bfloat16"},
    ),
    "adapter-on-native": ("wide", "native-3-bit-asymmetric", {"rank": 4, "adapter_bits": "4"}),
    "adapter-on-dense": ("full", "dense-float32", {"rank": 4}),
    "native-on-dense": ("full", "dense-float32", {"rank": 4}),
    "native-on-native": ("small", "native-sparse-in-14-bits", {"rank": 4}),
}
"""By name: model, base checkpoint, options of EoRA."""


def main(folder: Path) -> None:
    refuse_other_commits()
    torch.set_num_threads(1)
    folder.mkdir()
    (folder / "checkpoints").mkdir()
    (folder / "expected").mkdir()
    os.environ["COMPRESS_CACHE"] = str((folder / "cache").resolve())
    os.chdir(folder / "checkpoints")  # so that no file names a folder of this machine
    for name in MODELS:
        write_model(Path("../models") / name, *MODELS[name])
    write_text(Path("../text.txt"))
    for export, table in (("native", NATIVE), ("gptq", GPTQ), ("dense", DENSE)):
        for name, (model, method, layers) in table.items():
            write_checkpoint(f"{export}-{name}", model, export, method=method, include=list(layers))
    for name, (model, base, options) in ON_BASE.items():
        method = {"name": "eora", **options}
        write_checkpoint(name, model, name.partition("-")[0], method=method, base_checkpoint=base)


def refuse_other_commits() -> None:
    root = Path(compress.__file__).parent.parent
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if not found.startswith(COMMIT):
        raise SystemExit(f"{root} is at {found.strip()}; this runs on {COMMIT} only")


def write_model(folder: Path, family: str, options: dict[str, object], dtype: torch.dtype) -> None:
    """A random model with every bias and norm away from its trivial start, and a tokenizer of letters."""
    torch.manual_seed(len(str(folder)))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    special = ["<pad>", "<bos>", "<eos>"]
    vocabulary = {token: k for k, token in enumerate([*special, *LETTERS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)


def write_text(path: Path) -> None:
    generator = random.Random(0)
    words = ["".join(generator.choices(LETTERS[:26], k=generator.randint(1, 7))) for _ in range(90)]
    path.write_text(". ".join(" ".join(generator.choices(words, k=9)) for _ in range(80)))


def write_checkpoint(name: str, model: str, export: str, **options: object) -> None:
    job = {
        "model": f"../models/{model}",
        "out": name,
        "export": [export],
        "calibration": ["../text.txt"],
        "samples": 16,
        "seq_len": 32,
        "dtype": "float32",
        "statistics": "off",
        "eval_windows": 0,
        "tasks": [],
        **options,
    }
    report = compress.run(Recipe.from_mapping(job))
    layers = [layer.name for layer in report.layers]
    folder = Path(name)
    if export == "adapter":
        (folder / "adapter").rename(f"{name}.adapter")
        shutil.rmtree(folder)
        Path(f"{name}.adapter").rename(folder)
    drop_idle(folder, () if name == "native-complete" else IDLE)
    made = expected(load_export(folder, torch.float32), layers)
    save_file(made, f"../expected/{name}.safetensors")


def drop_idle(folder: Path, patterns: tuple[str, ...]) -> None:
    shutil.rmtree(folder / "pictures", ignore_errors=True)
    for pattern in ("*.html", "*.md", *patterns):
        for path in folder.glob(pattern):
            path.unlink()


def expected(model: nn.Module, layers: list[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {"input_ids": IDS}
    with torch.inference_mode():
        found["logits"] = model(input_ids=IDS).logits[0]
    for name in layers:
        layer = model.get_submodule(name)
        if isinstance(layer, CompressedLinear):
            record(f"{name}.form", layer.form, found)
        else:
            assert isinstance(layer, nn.Linear | Conv1D)
            found[f"weight/{name}"] = layer.weight
    return {key: tensor.detach().clone().contiguous() for key, tensor in found.items()}


def record(path: str, form: nn.Module, found: dict[str, Tensor]) -> None:
    """The dense weight of each form without a product, the outermost ones; factors and offsets."""
    if isinstance(form, Form) and form.offset() is not None:
        found[f"offset/{path}"] = form.offset()
    if isinstance(form, Form) and not multiplies(form):
        found[f"weight/{path}"] = form.dense()
    elif isinstance(form, nn.Linear):
        found[f"weight/{path}"] = form.weight.float()
    else:
        for name, part in form.named_children():
            record(f"{path}.{name}", part, found)


def multiplies(form: nn.Module) -> bool:
    return any(isinstance(part, LowRank | Product) for part in form.modules())


def no_pictures(_: object, folder: Path) -> list[Path]:
    (folder / "pictures").mkdir()
    return []


# Exports are verified in this process, and nothing is drawn: both take seconds and change no checkpoint.
pipeline.verify = lambda folder, device: check(folder, device)
pipeline.run_page = lambda _: ""
pipeline.write_pictures = no_pictures
# Of the machine the report is to say no more than this.
platform.platform = lambda: "Linux"

if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
