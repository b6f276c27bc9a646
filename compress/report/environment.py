"""Environment of a run: versions, machine, threads, commit. Every report has it."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from pydantic.dataclasses import dataclass

from compress.extras import DISTRIBUTION
from compress.report.strict import STRICT

_RECORDED = (
    "torch",
    "transformers",
    "datasets",
    "safetensors",
    "lm_eval",
    "peft",
    "accelerate",
    "tokenizers",
    "numpy",
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Environment:
    """Software and hardware of a run; times compare only between equal environments."""

    toolkit: str
    """Version of this toolkit."""
    commit: str | None
    """Commit of the toolkit's source, with + if it was changed; None for an installed copy."""
    python: str
    platform: str
    processor: str
    n_cores: int
    n_threads: int
    """Threads that torch computes with."""
    memory_bytes: int
    device: str
    versions: dict[str, str]
    """Versions of the libraries that numbers depend on."""


def toolkit_version() -> str:
    """Version of the installed distribution; "unknown" for source that was never installed."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "unknown"


def describe_environment(device: str) -> Environment:
    """This process's environment, computing on `device` ("cpu", "cuda:0")."""
    # Here, for who reads a report needs neither.
    import psutil
    import torch

    return Environment(
        toolkit=toolkit_version(),
        commit=_commit(Path(__file__).resolve().parent.parent),
        python=platform.python_version(),
        platform=platform.platform(),
        processor=_processor(device),
        n_cores=os.cpu_count() or 1,
        n_threads=torch.get_num_threads(),
        memory_bytes=int(psutil.virtual_memory().total),
        device=device,
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    versions = {}
    for name in _RECORDED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _processor(device: str) -> str:
    if device.startswith("cuda"):
        import torch

        return str(torch.cuda.get_device_name(device))
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit(root: Path) -> str | None:
    """Commit of the checkout at `root` itself: copies may be installed inside another one."""
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (
        OSError,
        subprocess.CalledProcessError,
    ):  # no git here, or a repository without a commit
        return None
    return commit + ("+" if changed else "")


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
