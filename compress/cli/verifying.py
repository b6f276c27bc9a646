"""verify: load an export in a fresh process."""

from __future__ import annotations

from pathlib import Path

from compress.cli.command import Command, exports
from compress.config.flags import Parser


def _verify(given: list[str]) -> None:
    parser = Parser("compress verify", VERIFY.about, "DIR [--device DEVICE]")
    parser.add_argument("folder", metavar="DIR", type=Path, help="an export, or a folder of some")
    parser.add_argument("--device", default="cpu", help="where to load it (default: cpu)")
    known = parser.parse_args(given)
    from compress.exports.verify import verify

    for folder in exports(known.folder):
        found = verify(folder, device=known.device)
        print(
            f"{folder}: loaded by {found.loader}, reproduces the compressed model; relative "
            f"difference {found.relative_difference:.1e} (tolerance {found.tolerance:.0e})"
        )


VERIFY = Command(_verify, "Load an export in a fresh process and compare its logits.")
