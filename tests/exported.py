"""Tiny models, and exports of them whose layers are quantised with a low-rank correction."""

import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from families import byte_tokenizer, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compress.exports import EXPORTS, LayerExport, Use, formats_for
from compress.exports.verification.probe import make_probe, write_probe
from compress.forms.base import Form
from compress.forms.linear import CompressedLinear
from compress.forms.low_rank import LowRank
from compress.forms.quantised import Quantised
from compress.forms.sum import Sum
from compress.models.checkpoint import Reader
from compress.models.resolve import SourceModel

FORMATS = formats_for(Use.MODEL)
IDS = torch.tensor([[1, 5, 9, 2, 77, 31, 8, 100, 64, 3, 17, 90]])


@dataclass(frozen=True)
class Compressed:
    """A model whose layers are forms, and where its source lies."""

    source: SourceModel
    model: PreTrainedModel
    layers: Mapping[str, LayerExport]

    def logits(self) -> Tensor:
        return logits(self.model)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=IDS).logits[0].float()
    return found


def quantised(
    weight_oi: Tensor,
    *,
    bits: int = 4,
    group_size: int = 32,
    zeros: str = "symmetric",
    groups_i: Tensor | None = None,
) -> Quantised:
    """A coarse grid around a weight; some scales negative, zeros of 0 if asymmetric."""
    o, i = weight_oi.shape
    n_groups = -(-i // group_size)
    generator = torch.Generator().manual_seed(o + i)
    span = weight_oi.abs().max() / (1 << (bits - 1))
    scales = (span * (1 + torch.rand(o, n_groups, generator=generator))).bfloat16().float()
    scales[::3] *= -1 if zeros == "symmetric" else 1
    zero = torch.full((o, n_groups), 1 << (bits - 1))
    if zeros != "symmetric":
        zero = torch.randint(0, 1 << bits, (o, n_groups), generator=generator)
        zero[:, 0] = 0
    groups = torch.arange(i) // group_size if groups_i is None else groups_i
    codes = (weight_oi.float() / scales[:, groups]).round() + zero[:, groups]
    return Quantised.from_codes(
        codes.clamp(0, (1 << bits) - 1).to(torch.uint8),
        scales,
        None if zeros == "symmetric" else zero.to(torch.uint8),
        bits=bits,
        group_size=group_size,
        groups_i=groups_i,
    )


def corrected(weight_oi: Tensor, rank: int = 4, **options: object) -> Sum:
    base = quantised(weight_oi, **options)  # type: ignore[arg-type]
    u, s, v = torch.linalg.svd(weight_oi.float() - base.dense(), full_matrices=False)
    up, down = u[:, :rank] * s[:rank], v[:rank]
    return Sum([base, LowRank.from_factors(up.half(), down.half().contiguous())])


def compressed(
    folder: Path,
    family: str = "llama",
    make_form: Callable[[str, Tensor], Form] = lambda _, weight: corrected(weight),
    *,
    dtype: torch.dtype = torch.float32,
    keep: str = "lm_head",
    **config: object,
) -> Compressed:
    """A source in `folder` and the same model with every linear layer compressed but those kept."""
    # As many heads for keys as for queries: GPTQ wants every size in multiples of 32.
    heads = {} if family == "gpt2" else {"num_key_value_heads": 4}
    model = tiny_model(family, **(heads | config))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder, max_shard_size="60KB")
    byte_tokenizer().save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    layers = {}
    for name, layer in list(loaded.named_modules()):
        if type(layer) not in (nn.Linear, Conv1D) or re.search(keep, name):
            continue
        transposed = isinstance(layer, Conv1D)
        weight = layer.weight.detach().T if transposed else layer.weight.detach()
        bias = None if layer.bias is None else layer.bias.detach()
        form = make_form(name, weight)
        layers[name] = LayerExport(name, form, bias, transposed)
        parent, _, leaf = name.rpartition(".")
        setattr(loaded.get_submodule(parent), leaf, CompressedLinear(form, bias))
    source = SourceModel(str(folder), folder, None, (), None)
    return Compressed(source, loaded, layers)


def export(made: Compressed, folder: Path, name: str) -> Path:
    """Write one export of it, with its probe."""
    folder.mkdir()
    exporter = EXPORTS[name](folder, made.source)
    for layer in made.layers.values():
        exporter.add_layer(layer)
    reader = Reader(made.source.folder)
    names = set(made.model.state_dict())
    for key in reader:
        memory = key if key in names or f"transformer.{key}" not in names else f"transformer.{key}"
        if memory.rpartition(".")[0] not in made.layers:
            exporter.add_tensor(memory, reader[key])
    exporter.close()
    write_probe(folder, make_probe(IDS, made.logits()), made.model.dtype)
    return folder


def python(code: str, *arguments: object, hide_toolkit: bool = False, cwd: Path) -> "Ran":
    """Run code in a fresh process, with the toolkit importable or not."""
    root = str(Path(__file__).resolve().parent.parent)
    head = f"import sys\nsys.path.insert(0, {root!r})\n"
    if hide_toolkit:
        head = "import sys\nsys.modules['compress'] = None\n"
    ran = subprocess.run(
        [sys.executable, "-P", "-c", head + code, *map(str, arguments)],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return Ran(ran.returncode, ran.stdout, ran.stderr)


@dataclass(frozen=True)
class Ran:
    """How a process ended."""

    code: int
    out: str
    err: str
