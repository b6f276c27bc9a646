"""Where the probe of an export lies; without torch, for the command line finds exports by it."""

from __future__ import annotations

from pathlib import Path

PROBE = Path("verification") / "probe.st"
EARLIER_PROBE = Path("probe.safetensors")
"""Where earlier versions put it: among the weights, where vLLM takes it for some."""


def probe_in(folder: Path) -> Path | None:
    """Where the probe of a folder lies; None if there is none, so that the folder is no export."""
    return next(
        (path for name in (PROBE, EARLIER_PROBE) if (path := folder / name).is_file()), None
    )
