"""Wheels: what is in the cache is used only if it is the pinned file."""

import os
import sys
import zipfile
from pathlib import Path

import pytest

from eval import wheels
from eval.errors import EvalError

DIST_INFO = {
    "METADATA": "Metadata-Version: 2.1\nName: a-package\nVersion: 1.0\n",
    "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "RECORD": "",
}


def make_wheel(folder: Path, text: str = "hello") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "a_package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.txt", text)
        for name, value in DIST_INFO.items():
            archive.writestr(f"a_package-1.0.dist-info/{name}", value)
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip uses as the only package index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_the_cache_is_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "here"))
    assert wheels.cache_root() == tmp_path / "here"
    monkeypatch.delenv("COMPRESS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert wheels.cache_root() == tmp_path / "compress"


def test_a_pinned_wheel_in_the_cache_needs_no_pip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = make_wheel(tmp_path / "wheels")
    monkeypatch.setattr(sys, "executable", os.devnull)
    found = wheels.fetch_wheel("a-package==1.0", wheels.file_sha256(wheel), tmp_path)
    assert found == wheel


def test_pip_brings_a_wheel_and_a_spoilt_one_is_replaced(tmp_path: Path, index: Path) -> None:
    right = make_wheel(index)
    cache = tmp_path / "cache"
    make_wheel(cache / "wheels", "something else")
    found = wheels.fetch_wheel("a-package==1.0", wheels.file_sha256(right), cache)
    assert found.parent == cache / "wheels"
    assert found.read_bytes() == right.read_bytes()
    assert [path.name for path in found.parent.iterdir()] == [right.name]


def test_another_file_than_the_pinned_one_is_refused(tmp_path: Path, index: Path) -> None:
    make_wheel(index)
    with pytest.raises(EvalError, match="expected 0000"):
        wheels.fetch_wheel("a-package==1.0", "0" * 64, tmp_path / "cache")
    assert list((tmp_path / "cache" / "wheels").iterdir()) == []


@pytest.mark.usefixtures("index")
def test_what_pip_says_is_quoted_when_it_fails(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"a-package==1\.0: pip could not download it"):
        wheels.fetch_wheel("a-package==1.0", "0" * 64, tmp_path)


def test_only_the_named_members_are_extracted(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path)
    folder = wheels.extract(wheel, {"a/data.txt": "mine.txt"}, tmp_path / "out" / "data")
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    assert (folder / "mine.txt").read_text() == "hello"
    assert [path.name for path in folder.parent.iterdir()] == ["data"]


def test_a_folder_that_lacks_a_file_is_made_again(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path)
    (tmp_path / "data").mkdir()
    folder = wheels.extract(wheel, {"a/data.txt": "mine.txt"}, tmp_path / "data")
    assert (folder / "mine.txt").read_text() == "hello"


def test_a_member_that_is_not_there_leaves_nothing_behind(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "w")
    with pytest.raises(EvalError, match="not the expected wheel"):
        wheels.extract(wheel, {"a/other.txt": "mine.txt"}, tmp_path / "out" / "data")
    assert list((tmp_path / "out").iterdir()) == []
