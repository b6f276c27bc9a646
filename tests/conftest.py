"""Makes the helpers beside the tests importable under pytest's importlib mode; fixtures that several files use."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A folder with a tiny model and a text, and a cache of its own."""
    from workspaces import fill

    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    return fill(tmp_path)


@pytest.fixture
def quick_verification(request, monkeypatch):
    """Verify in this process, draw nothing and write little, except in tests marked `as_run`: it takes seconds."""
    if not request.node.get_closest_marker("as_run"):
        from workspaces import quicken

        quicken(monkeypatch)
