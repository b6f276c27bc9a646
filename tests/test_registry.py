"""Registries: what is found where, that finding imports nothing, and what is refused."""

import importlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from compress.errors import PluginError
from compress.registry import Registry

BASE = """
from compress.registry import Registry

class Animal:
    def __init_subclass__(cls, *, name=""):
        if name:
            ANIMALS.register(name, cls)

ANIMALS = Registry("{package}", "animal")
"""
MEMBER = 'from {package}.base import Animal\n\nclass {cls}(Animal, name="{name}"):\n    pass\n'

Zoo = Callable[[], Registry[Any]]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that Python imports from, with a package of a name that no other test has."""
    package = tmp_path / f"zoo_{tmp_path.name}".replace("-", "_")
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "base.py").write_text(BASE.format(package=package.name), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return package


def add(place: Path, file: str, cls: str, name: str) -> None:
    path = place / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(MEMBER.format(package=place.name, cls=cls, name=name), encoding="utf-8")


def registry(place: Path) -> Registry[Any]:
    found: Registry[Any] = importlib.import_module(f"{place.name}.base").ANIMALS
    return found


def distribute(place: Path, distribution: str, point: str) -> None:
    """Put what installing leaves of a distribution with one entry point beside the package."""
    folder = place.parent / f"{distribution.replace('-', '_')}-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(f"[{place.name}]\n{point}\n")


def test_the_files_of_the_folder_name_its_members_and_nothing_is_imported(place: Path) -> None:
    add(place, "cat.py", "Cat", "cat")
    add(place, "dogs/kind.py", "Dog", "big-dog")
    found = registry(place)
    assert (list(found), len(found), "cat" in found) == (["big-dog", "cat"], 2, True)
    assert f"{place.name}.cat" not in sys.modules
    assert found["big-dog"].__name__ == "Dog"
    assert f"{place.name}.dogs.kind" in sys.modules
    assert f"{place.name}.cat" not in sys.modules


def test_another_distribution_s_member_is_found_by_its_entry_point(place: Path) -> None:
    (place.parent / "yak_shop.py").write_text(
        MEMBER.format(package=place.name, cls="Yak", name="yak"), encoding="utf-8"
    )
    distribute(place, "yak-shop", "yak = yak_shop:Yak")
    found = registry(place)
    assert list(found) == ["yak"]
    assert found["yak"].__name__ == "Yak"
    sys.modules.pop("yak_shop")


def test_a_class_of_a_running_program_is_a_member_until_it_is_forgotten(place: Path) -> None:
    found = registry(place)
    animal: Any = sys.modules[f"{place.name}.base"].Animal

    class Eel(animal, name="eel"):  # type: ignore[misc, call-arg]
        pass

    assert found["eel"] is Eel
    found.forget("eel")
    assert "eel" not in found
    with pytest.raises(KeyError):
        found["eel"]


def test_a_class_that_is_defined_again_takes_the_place_of_the_first(place: Path) -> None:
    found = registry(place)
    animal: Any = sys.modules[f"{place.name}.base"].Animal
    kinds = [type("Eel", (animal,), {"__module__": "notebook"}, name="eel") for _ in range(2)]
    assert found["eel"] is kinds[1]


@pytest.mark.parametrize("second", ["file", "distribution", "program"])
def test_two_members_of_one_name_are_refused_and_both_are_named(place: Path, second: str) -> None:
    add(place, "cat.py", "Cat", "cat")
    if second == "file":
        add(place, "lion.py", "Lion", "cat")
    if second == "distribution":
        distribute(place, "cat-shop", "cat = yak_shop:Cat")
    found = registry(place)
    with pytest.raises(PluginError, match=r"cat.*(lion|cat-shop|Other)"):
        if second == "program":
            type("Other", (sys.modules[f"{place.name}.base"].Animal,), {}, name="cat")
        list(found)


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("import no_such_module", "no_such_module"),
        ("", "Yak"),
        ("class Yak: pass", "defines no animal"),
        ("1 / 0", "ZeroDivisionError"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("class Yak(", "SyntaxError"),
    ],
)
def test_an_entry_point_that_gives_no_member_is_refused_with_its_distribution(
    place: Path, code: str, what: str
) -> None:
    (place.parent / "yak_shop.py").write_text(code, encoding="utf-8")
    distribute(place, "yak-shop", "yak = yak_shop:Yak")
    with pytest.raises(PluginError, match="yak-shop") as caught:
        registry(place)["yak"]
    assert what in str(caught.value)
    sys.modules.pop("yak_shop", None)


def test_ctrl_c_while_another_distribution_is_loaded_is_no_fault_of_it(place: Path) -> None:
    (place.parent / "yak_shop.py").write_text("raise KeyboardInterrupt", encoding="utf-8")
    distribute(place, "yak-shop", "yak = yak_shop:Yak")
    with pytest.raises(KeyboardInterrupt):
        registry(place)["yak"]


@pytest.mark.parametrize("name", ["none", "auto", "a/../b", "two words", "-dash"])
def test_a_name_that_options_and_folders_cannot_have_is_refused(place: Path, name: str) -> None:
    found = registry(place)
    with pytest.raises(PluginError, match=f"zoo.*'{name}' cannot be the name"):
        found.register(name, sys.modules[f"{place.name}.base"].Animal)


def frozen(kind: type) -> type:
    return dataclass(frozen=True, kw_only=True)(kind)


def unfit() -> dict[str, tuple[type, str]]:
    """Classes that are no methods, each with what is told of it."""
    from compress.families.base import Compressor
    from compress.methods.rtn import RTN

    own = {"compress": RTN.compress, "planned_bytes": RTN.planned_bytes}
    undefaulted = {"__annotations__": {"shots": int}}
    called = {"__annotations__": {"name": str}, "name": "x"}
    return {
        "stranger": (type("A", (), {}), "is no Compressor"),
        "abstract": (frozen(type("A", (Compressor,), {})), "lacks compress, planned_bytes"),
        "paperless": (frozen(type("A", (Compressor,), own)), "lacks its paper"),
        "undecorated": (type("A", (RTN,), {}), "is no frozen dataclass"),
        "thawed": (dataclass(type("A", (Compressor,), own)), "is no frozen dataclass"),
        "undefaulted": (frozen(type("A", (RTN,), undefaulted)), "option 'shots' without a def"),
        "named": (frozen(type("A", (RTN,), called)), "an option called 'name'"),
    }


@pytest.mark.parametrize("name", unfit())
def test_a_class_that_cannot_be_a_method_is_refused_when_it_is_looked_up(name: str) -> None:
    from compress.families.base import METHODS

    member, what = unfit()[name]
    METHODS.register(name, member)
    try:
        with pytest.raises(PluginError, match=f"method '{name}' .*{what}"):
            METHODS[name]
    finally:
        METHODS.forget(name)


def test_the_methods_names_are_known_from_their_files() -> None:
    """In a fresh process, for the classes of other tests' methods are in this one."""
    code = (
        "from compress.registry import Registry\nprint(*Registry('compress.methods', 'method'))\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert {"cospadi", "eora", "gptq", "svd_llm"} <= set(answer.stdout.split())
