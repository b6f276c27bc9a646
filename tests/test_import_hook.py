"""A call that waits for a module: whatever the order, it comes once the module has run, and nothing else changes."""

import importlib
import importlib.util
import inspect
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from compress.forms.import_hook import after_import


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package whose module `awaited.inside` takes a moment to run."""
    (tmp_path / "awaited").mkdir()
    (tmp_path / "awaited" / "__init__.py").write_text("")
    (tmp_path / "awaited" / "inside.py").write_text("import time\ntime.sleep(0.05)\nREADY = 1\n")
    (tmp_path / "awaited" / "broken.py").write_text("raise RuntimeError('broken')\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = list(sys.meta_path)
    yield "awaited"
    sys.meta_path[:] = before
    for name in [name for name in sys.modules if name.partition(".")[0] == "awaited"]:
        del sys.modules[name]


class Calls:
    """Counts its calls, each of which must find the module ready."""

    def __init__(self, name: str = "awaited.inside") -> None:
        self.name, self.n = name, 0

    def __call__(self) -> None:
        assert sys.modules[self.name].READY == 1
        self.n += 1


def test_nothing_is_imported_and_called_until_the_module_is(package: str) -> None:
    calls = Calls()
    after_import("awaited.inside", calls)
    assert package not in sys.modules
    importlib.import_module(package)
    assert calls.n == 0
    importlib.import_module("awaited.inside")
    assert calls.n == 1


def test_a_package_that_is_there_is_not_waited_for(package: str) -> None:
    importlib.import_module(package)
    calls = Calls()
    finders = list(sys.meta_path)
    after_import("awaited.inside", calls)
    assert calls.n >= 1
    assert sys.meta_path == finders


@pytest.mark.usefixtures("package")
def test_a_module_that_is_there_is_not_waited_for() -> None:
    importlib.import_module("awaited.inside")
    calls = Calls()
    after_import("awaited.inside", calls)
    assert calls.n == 1


@pytest.mark.usefixtures("package")
def test_when_it_has_called_no_trace_is_left() -> None:
    finders = list(sys.meta_path)
    after_import("awaited.inside", Calls())
    assert len(sys.meta_path) == len(finders) + 1
    module = importlib.import_module("awaited.inside")
    assert sys.meta_path == finders
    ordinary = type(importlib.import_module("awaited").__loader__)
    assert type(module.__loader__) is type(module.__spec__.loader) is ordinary
    assert "READY = 1" in inspect.getsource(module)


@pytest.mark.usefixtures("package")
def test_a_spec_that_is_only_looked_at_calls_nothing_and_reads_as_ever() -> None:
    calls = Calls()
    after_import("awaited.inside", calls)
    spec = importlib.util.find_spec("awaited.inside")
    assert spec is not None
    assert "READY = 1" in spec.loader.get_source("awaited.inside")  # type: ignore[union-attr]
    assert spec.origin == str(Path(spec.origin or "").resolve())
    assert calls.n == 0
    importlib.import_module("awaited.inside")
    assert calls.n == 1


@pytest.mark.usefixtures("package")
def test_a_module_imported_again_or_reloaded_calls_no_more() -> None:
    calls = Calls()
    after_import("awaited.inside", calls)
    module = importlib.import_module("awaited.inside")
    importlib.reload(module)
    importlib.import_module("awaited.inside")
    assert calls.n == 1


@pytest.mark.usefixtures("package")
def test_other_modules_are_found_as_ever_and_a_missing_one_is_missing() -> None:
    after_import("awaited.nowhere", Calls())
    assert importlib.import_module("awaited.inside").READY == 1
    with pytest.raises(ModuleNotFoundError, match=r"awaited\.nowhere"):
        importlib.import_module("awaited.nowhere")


@pytest.mark.usefixtures("package")
def test_a_module_that_fails_fails_as_ever_and_is_waited_for_on() -> None:
    calls = Calls("awaited.broken")
    after_import("awaited.broken", calls)
    with pytest.raises(RuntimeError, match="broken"):
        importlib.import_module("awaited.broken")
    assert calls.n == 0
    path = Path(str(importlib.import_module("awaited").__path__[0])) / "broken.py"
    path.write_text("READY = 1\n")
    importlib.invalidate_caches()
    importlib.import_module("awaited.broken")
    assert calls.n == 1


@pytest.mark.usefixtures("package")
def test_two_that_wait_for_one_module_are_both_called() -> None:
    first, second = Calls(), Calls()
    finders = list(sys.meta_path)
    after_import("awaited.inside", first)
    after_import("awaited.inside", second)
    importlib.import_module("awaited.inside")
    assert (first.n, second.n) == (1, 1)
    assert sys.meta_path == finders


@pytest.mark.usefixtures("package")
def test_threads_that_import_the_module_find_it_called_for() -> None:
    calls, seen = Calls(), []
    after_import("awaited.inside", calls)

    def use() -> None:
        importlib.import_module("awaited.inside")
        seen.append(calls.n)

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1] * 8


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("delay", [0.0, 0.01, 0.03, 0.06])
def test_an_import_under_way_in_another_thread_is_waited_for(delay: float) -> None:
    calls = Calls()
    thread = threading.Thread(target=importlib.import_module, args=("awaited.inside",))
    thread.start()
    time.sleep(delay)
    after_import("awaited.inside", calls)
    thread.join()
    assert calls.n >= 1
