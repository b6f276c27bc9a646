"""The process whose memory is measured: loads a checkpoint, reads a prompt, writes a few tokens.

Run by `eval.footprint.peak_memory`, which sends a JSON object on standard input and reads one from
the last line of standard output.
"""

import importlib
import json
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any


def high_water_mark() -> int:
    """Most memory this process has held since it began, or since the mark was started again, in bytes.

    Linux's ru_maxrss outlives exec: a child of a large process inherits its parent's figure. So
    there the kernel's count for this program alone is read.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text(encoding="ascii").splitlines() if "VmHWM" in x)
        return int(line.split()[1]) * 1024
    # Bytes on macOS, which has no /proc.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def restart_high_water_mark() -> None:
    """Count from what is held now; where the system cannot (macOS, some sandboxes), the mark stays the process's."""
    with suppress(OSError):
        # Of all that a process can write there, 5 touches nothing but the mark (proc(5)).
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def measured(request: dict[str, Any]) -> dict[str, int | None]:
    """Loads and runs what `request` names; returns the marks before and after."""
    import torch

    from eval.footprint import Timing, measure_speed

    for name in request["imports"]:
        importlib.import_module(name)
    module, _, function = request["loader"].partition(":")
    load = getattr(importlib.import_module(module), function)
    baseline = high_water_mark()
    model = load(
        Path(request["folder"]), getattr(torch, request["dtype"]), torch.device(request["device"])
    )
    measure_speed(model, Timing(**request["timing"], repeats=1))
    on_device = model.device.type == "cuda"
    return {
        "baseline_bytes": baseline,
        "peak_bytes": high_water_mark(),
        "device_bytes": torch.cuda.max_memory_allocated(model.device) if on_device else None,
    }


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    sys.path[:] = asked["path"]
    sys.stdout.write("\n" + json.dumps(measured(asked)) + "\n")
