"""Proof that an export on disk is the model that was compressed.

Every export folder holds a probe (`probe.py`): token ids, the compressed model's logits at some
positions, and a digest of every tensor and every file written that loading reads: configuration,
tokenizer, shipped code. A fresh process loads the export, which must hold exactly these, and must
reproduce these logits. README.md, report.json, recipe.yaml and licences may change.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from calibration.errors import OptionError
from calibration.experts.module import take_all_apart
from calibration.outputs import predictions
from compress.errors import CheckpointError, PluginError, RecipeError
from compress.exports.base import EXPORTS
from compress.exports.verification.places import PROBE, probe_in
from compress.exports.verification.probe import (
    base_digest,
    digests,
    file_digests,
    kind_of,
    read_probe,
)
from compress.forms.registered import FORMS
from compress.models.checkpoint import read_json, some

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Relative L2 difference of the logits, by the narrowest dtype on the way."""
TOLERANCE_16_BIT = 2e-2


@dataclass(frozen=True)
class Verification:
    """An export's logits beside those of the compressed model."""

    loader: str
    """The name of its format."""
    max_abs_difference: float
    relative_difference: float
    """L2 norm of the difference over that of the compressed model's logits."""
    top1_agreement: float
    """Share of the positions with the same most likely token."""
    tolerance: float
    """The largest relative difference that passes."""

    @property
    def passed(self) -> bool:
        """Whether the difference is a number within the tolerance."""
        return self.relative_difference <= self.tolerance


def verify(folder: Path, device: str = "cpu") -> Verification:
    """Load an export in a fresh process and compare it with its probe.

    Raises CheckpointError naming what differs, RecipeError for a device that is not there.
    """
    folder = Path(folder)
    _refuse_device(device)
    if probe_in(folder) is None:
        raise CheckpointError(f"{folder} has no {PROBE}, which every export has; is it an export?")
    found = _answer_of_a_fresh_process(folder, device)
    if "error" in found:
        raise CheckpointError(str(found["error"]))
    result = Verification(**found)
    if not result.passed:
        raise CheckpointError(
            f"{folder}: its logits are not those of the compressed model: relative difference "
            f"{result.relative_difference:.2e}, tolerance {result.tolerance:.0e}; its files are "
            "as they were written, so the libraries that load them compute something else"
        )
    return result


def _answer_of_a_fresh_process(folder: Path, device: str) -> dict[str, Any]:
    """The fields of its Verification, or its error. Raises CheckpointError if it dies."""
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.json"
        child = subprocess.run(
            [
                sys.executable,
                "-m",
                "compress.exports.verification.verify",
                str(folder.resolve()),
                device,
                str(answer),
                *sorted(FORMS.modules_of_the_program() | EXPORTS.modules_of_the_program()),
            ],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if child.returncode != 0 or not answer.is_file():
            last = "\n".join(child.stderr.strip().splitlines()[-5:])
            raise CheckpointError(f"{folder}: its loading ended with {child.returncode}:\n{last}")
        return read_json(answer)


def check(folder: Path, device: str) -> Verification:
    """Do in this process what `verify` does in a fresh one, apart from judging the difference."""
    probe, metadata = read_probe(folder)
    logits, positions = probe.logits, probe.positions
    refuse_changed(folder, metadata)
    _refuse_changes(folder, "its base", base_digest(folder), json.loads(metadata.get("base", "{}")))
    dtype = getattr(torch, metadata["dtype"]) if "dtype" in metadata else None
    kind = kind_of(folder)
    model = kind.load(folder, dtype, torch.device(device))
    take_all_apart(model)
    with torch.inference_mode():
        output = predictions(model(input_ids=probe.input_ids.to(device)))
    found = output[0, positions.to(device)].double().cpu()
    difference, expected = found - logits.double(), logits.double()
    stored = kind.weights_dtype(folder) or model.dtype
    rounded = getattr(torch, metadata["rounded"]) if "rounded" in metadata else model.dtype
    on_the_way = (model.dtype, stored, rounded)
    tolerances = [TOLERANCES.get(each, TOLERANCE_16_BIT) for each in on_the_way]
    return Verification(
        loader=kind.name,
        max_abs_difference=float(difference.abs().max()),
        relative_difference=float(difference.norm() / expected.norm()),
        top1_agreement=float((found.argmax(-1) == expected.argmax(-1)).double().mean()),
        tolerance=max(tolerances),
    )


def refuse_changed(folder: Path, metadata: Mapping[str, str]) -> None:
    """Raises CheckpointError if files or tensors are not those of the probe's metadata, a base elsewhere apart."""
    _refuse_changes(folder, "files", file_digests(folder), json.loads(metadata["files"]))
    _refuse_changes(folder, "tensors", digests(folder), json.loads(metadata["tensors"]))


def _refuse_device(name: str) -> None:
    try:
        usable = torch.empty(1, device=name).device.type != "meta"
        reason = "it holds no numbers"
    except (RuntimeError, AssertionError) as error:
        usable, reason = False, str(error).splitlines()[0][:100]
    if not usable:
        raise RecipeError(f"--device: {name!r} can't be used here ({reason}); cpu always can")


def _refuse_changes(
    folder: Path, what: str, found: Mapping[str, str], expected: Mapping[str, str]
) -> None:
    changed = [name for name in expected if name in found and found[name] != expected[name]]
    differences = {
        "are missing": set(expected) - set(found),
        "are not of this export": set(found) - set(expected),
        "have changed": changed,
    }
    texts = [f"{some(names)} {verb}" for verb, names in differences.items() if names]
    if texts:
        raise CheckpointError(
            f"{folder} is not what was exported: {what} {'; '.join(texts)}; download it again"
        )


def main(folder: Path, device: str, answer: Path, modules: Sequence[str]) -> None:
    """Entry of the fresh process: write the result, or the error, as JSON.

    `modules` are imported first: they define forms and export formats of the program that asks.
    """
    for module in modules:
        import_module(module)
    answer.write_text(json.dumps(answer_of_this_process(folder, device)), encoding="utf-8")


def answer_of_this_process(folder: Path, device: str) -> dict[str, Any]:
    """The fields of a Verification, or the error."""
    try:
        return asdict(check(folder, device))
    except (OptionError, PluginError) as error:
        return {"error": str(error)}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
