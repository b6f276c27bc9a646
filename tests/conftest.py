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
    """Verification does the same in this process and nothing is drawn, except in slow tests: both take seconds."""
    if request.node.get_closest_marker("slow"):
        return
    from compress.evaluation import compare as evaluating
    from compress.exports.native import NativeExporter
    from compress.exports.verify import check
    from compress.pipeline import main as pipeline
    from eval.footprint import PeakMemory

    def in_this_process(folder, device="cpu"):
        result = check(folder, device)
        assert result.passed
        return result

    def no_pictures(_, folder):
        (folder / "pictures").mkdir()
        return []

    monkeypatch.setattr(pipeline, "verify", in_this_process)
    monkeypatch.setattr(NativeExporter, "verify_alone", lambda _: None)
    monkeypatch.setattr(pipeline, "run_page", lambda _: "<html></html>")
    monkeypatch.setattr(pipeline, "write_pictures", no_pictures)
    memory = PeakMemory(baseline_bytes=1, peak_bytes=2, device_bytes=None)
    monkeypatch.setattr(evaluating, "peak_memory", lambda *_, **__: memory)
