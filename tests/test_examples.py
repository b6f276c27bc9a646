"""Every example runs as it is, in a process of its own, on a tiny model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from documents import ROOT
from families import save_tiny

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MOST_LINES = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tiny model that reads any text and is wide enough for the examples' ranks."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_tiny(folder, hidden_size=64, intermediate_size=128, num_key_value_heads=4)
    return folder


def test_there_are_five_examples():
    assert len(EXAMPLES) == 5


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short_and_says_how_it_is_run(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    assert f"\npython examples/{path.name} [MODEL] [OUT]\n" in text


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs(path, model, tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, str(path), str(model), str(out)],
        cwd=tmp_path,
        env={**os.environ, "COMPRESS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
    assert list(Path(out).rglob("config.json"))
