"""Fine-tuning what a low-rank compression left: the factors alone, everything else frozen.

    model = AutoModelForCausalLM.from_pretrained("out")     # a native export, after `import compress`
    factors = compress.trainable_factors(model)
    Trainer(model=model, ...).train()
    compress.save_trained(model, "out", "tuned")

Jaiswal et al. 2024 (WeLore), arXiv:2407.11239, section 4: with ranks from normalised spectra the layers that compress
well (low-rank components, LRC) are also those whose gradients are rich, so training their factors does most of what
full fine-tuning does, in a third of the parameters. Layers that the plan left dense stay as they are.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calibration.heads import Head
from calibration.outputs import head_of, predictions
from compress.errors import CheckpointError, RecipeError
from compress.exports.load import load_export, loader_name
from compress.exports.verification.places import EARLIER_PROBE
from compress.exports.verification.probe import make_probe, read_probe, write_probe
from compress.exports.verification.verify import TOLERANCE_16_BIT, TOLERANCES
from compress.forms.registered import FORMS
from compress.models.checkpoint import Reader, Writer

MADE_ANEW = (EARLIER_PROBE.name, "report.json", "README.md", "report.html")
"""Files of the export that say what the trained model no longer is."""


def trainable_factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Freeze a loaded native export but for the factors of its low-rank layers; these, by name.

    A layer's offset (LoRD's) belongs to its factors. Factors in few bits cannot be trained and stay frozen.
    Raises RecipeError if there is nothing to train, or if factors are in 16-bit floats, whose steps are too coarse for
    an optimiser: load with `dtype=torch.float32`.
    """
    model.requires_grad_(requires_grad=False)
    factors = {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if _is_trainable(module)
        for name, parameter in module.named_parameters()
    }
    if not factors:
        raise RecipeError(
            f"{type(model).__name__} has no low-rank layer to train; "
            "load a native export of svd, svd_llm, fwsvd, lord, welore or eora (factors that "
            "--factor-quantizer rounded cannot be trained)",
            option="model",
        )
    coarse = next((name for name, each in factors.items() if each.dtype.itemsize < 4), None)
    if coarse is not None:
        raise RecipeError(
            f"{coarse} is {factors[coarse].dtype}; load with dtype=torch.float32 to train",
            option="model",
        )
    for parameter in factors.values():
        parameter.requires_grad_()
    return factors


def _is_trainable(module: nn.Module) -> bool:
    """Whether a form's class says so; shipped code has a class of its own, and older one does not say."""
    form = FORMS.get(str(getattr(module, "kind", "")), type(module))
    return bool(getattr(form, "trainable", False))


def save_trained(model: PreTrainedModel, source: str | Path, out: str | Path) -> None:
    """Write the native export that the model was loaded from with the factors that it has now, in the dtype they had.

    The new folder appears whole or not at all, and `compress verify` proves it against the trained model. Report and
    card of the old one are not copied: `compress eval` measures anew. Raises RecipeError if `out` exists or the model
    is no such export's, CheckpointError if what was written computes something else; OSError.
    """
    source, out = Path(source), Path(out)
    if out.exists():
        raise RecipeError(f"{out} exists; name a new folder, or remove it", option="out")
    if loader_name(source) != "native":
        raise RecipeError(f"{source} is no native export", option="source")
    folder = out.parent / f".{out.name}.partial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        _copy_files(source, folder)
        _write_tensors(model, source, folder)
        _prove(model, source, folder)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _copy_files(source: Path, folder: Path) -> None:
    for path in source.iterdir():
        weights = path.name.startswith("model") and ".safetensors" in path.name
        if path.is_file() and not weights and path.name not in MADE_ANEW:
            shutil.copyfile(path, folder / path.name)


def _write_tensors(model: PreTrainedModel, source: Path, folder: Path) -> None:
    """Every tensor of the source; in place of the factors, the model's."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    writer, reader = Writer(folder), Reader(source)
    strange = sorted(set(trained) - set(reader))
    if strange or not trained:
        raise RecipeError(
            f"what it trains, {strange[0] if strange else 'nothing'}, is no factor of {source}; "
            "call trainable_factors on a model loaded from there",
            option="model",
        )
    for name in reader:
        tensor = reader[name]
        writer.add(name, trained[name].detach().to(tensor.dtype) if name in trained else tensor)
    writer.close()


def _prove(model: PreTrainedModel, source: Path, folder: Path) -> None:
    """Write the probe of the trained model, which the folder, loaded, must reproduce."""
    input_ids = read_probe(source)[0].input_ids
    loaded = load_export(folder, model.dtype, str(model.device))
    expected, found = (_logits(each, input_ids) for each in (model, loaded))
    stored = {reader.dtype(name) for reader in (Reader(folder),) for name in reader}
    tolerance = max(TOLERANCES.get(dtype, TOLERANCE_16_BIT) for dtype in stored)
    difference = float((found - expected).norm() / expected.norm())
    if not difference <= tolerance:
        raise CheckpointError(
            f"{folder}: the factors as they are stored change the logits by {difference:.1e}, more than {tolerance:.0e}"
        )
    head = head_of(model.config) or Head.NEXT_TOKEN
    write_probe(folder, make_probe(input_ids, found, head), model.dtype)


def _logits(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = predictions(model(input_ids=input_ids.to(model.device)))[0]
    model.train(was_training)
    return logits.float().cpu()
