"""A virtual environment of its own for gptqmodel, which wants a newer torch than constraints.txt has."""

import os
import subprocess
import venv
from pathlib import Path

PACKAGES = (
    "gptqmodel==7.7.*",
    "torch>=2.14.1",
    "transformers==5.23.*",
    "optimum>=2.3",
    "peft>=0.21,<0.22",
)
VARIABLES = {"GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"}
"""For what runs in it."""


def make_environment(folder: Path) -> Path:
    """The environment's Python, with the packages installed."""
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists():
        print(f"making {folder}", flush=True)
        venv.create(folder, with_pip=True)
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return python
