"""A statistic in a method's file: collected, saved, found again, and told from other versions of itself."""

import importlib.util
import json
import sys

import pytest
import torch
from documents import ROOT, text_of
from outside import announce
from workspaces import recipe

import compress
from calibration.errors import InputError, PluginError
from calibration.statistics import load_statistics
from calibration.statistics.base import STATISTICS
from calibration.statistics.collection import Statistics
from calibration.statistics.gram import Gram
from calibration.store import Store
from calibration.walk import SharedInput
from compress.families.base import METHODS
from compress.methods.eora import EoRA
from compress.methods.gptq import GPTQ

pytestmark = pytest.mark.usefixtures("quick_verification")

METHOD = text_of(ROOT / "docs" / "extend" / "fourth_moment.py")


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """Write the text as a module of this name and import it; what it registers goes with the test."""

    def load(text, name="outside_method"):
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        path = tmp_path / f"{name}.py"
        path.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    known = set(load_statistics()), set(METHODS)
    yield load
    for name in set(STATISTICS) - known[0]:
        del STATISTICS[name]
    for name in set(METHODS) - known[1]:
        METHODS.forget(name)


def statistics_folders(workspace):
    return sorted(path.name for path in (workspace / "cache" / "statistics").iterdir())


@pytest.mark.parametrize("propagate", ["none", "block"])
def test_a_second_equal_run_finds_what_the_first_saved(workspace, outside, propagate):
    method = outside(METHOD).ByFourthMoment(sparsity=0.5)
    options = {"method": method, "propagate": propagate}
    first = compress.run(recipe(workspace, **options))
    second = compress.run(recipe(workspace, **options, out=workspace / "again"))
    assert not first.notes
    assert any("used again" in note for note in second.notes)
    assert [layer.relative_error for layer in first.layers] == [
        layer.relative_error for layer in second.layers
    ]
    digests = [(workspace / out / "model.safetensors").read_bytes() for out in ("out", "again")]
    assert digests[0] == digests[1]


def test_a_changed_file_is_another_statistic(workspace, outside):
    for power in (4, 6):
        module = outside(METHOD.replace("POWER = 4", f"POWER = {power}"))
        method = module.ByFourthMoment(sparsity=0.5)
        compress.calibrate(recipe(workspace, method=method, propagate="none"))
    assert len(statistics_folders(workspace)) == 2


def test_statistics_of_this_package_are_known_by_their_names_alone():
    ours = {n: k for n, k in STATISTICS.items() if k.__module__.startswith("calibration.")}
    assert {"gram", "fisher", "held_out", "cross_gram"} <= set(ours)
    assert all(kind.identity() == name for name, kind in ours.items())


def test_planning_counts_the_bytes_that_an_outside_statistic_takes(workspace, outside):
    module = outside(METHOD)
    assert module.FourthMoment.n_numbers((6, 10)) == 10
    methods = module.ByFourthMoment(), EoRA(rank=4, base=GPTQ(group_size=32))
    ours, without = (
        compress.plan(recipe(workspace, method=method, propagate="none")).plan for method in methods
    )
    inputs = sum(layer.shape[1] for layer in ours.layers)
    assert ours.input_statistics_bytes == without.input_statistics_bytes + 8 * inputs


def test_two_statistics_of_one_name_are_refused_naming_both(outside):
    outside(METHOD)
    with pytest.raises(TypeError, match=r"other\.FourthMoment: outside_method\.FourthMoment has"):
        outside(METHOD, "other")


def test_a_subclass_without_a_name_of_its_own_is_not_taken_for_its_parent(tmp_path):
    class Doubled(Gram):
        pass

    stats = Statistics.of(torch.randn(9, 4), 1, frozenset({Doubled}))
    with pytest.raises(TypeError, match="Doubled is not registered"):
        Store(tmp_path, {}).save(0, [SharedInput(("a",), stats)])


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("sum_hh: torch.Tensor", "the name of the field sum_hh does not tell its size"),
        ("total: torch.Tensor", "the name of the field total does not tell its size"),
    ],
)
def test_a_field_whose_name_does_not_tell_its_size_is_refused(outside, field, message):
    kind = outside(METHOD.replace("sum_i: Tensor", field)).FourthMoment
    with pytest.raises(TypeError, match=message):
        kind.n_numbers((2, 3))


def test_a_matrix_that_is_not_symmetric_as_its_name_says_is_not_saved(outside, tmp_path):
    text = METHOD.replace("sum_i", "sum_ii").replace(
        "pow(POWER).sum(0)", "T @ x_ti.sign().double()"
    )
    kind = outside(text).FourthMoment
    stats = Statistics({kind: kind.of(torch.randn(9, 4), 1)})
    with pytest.raises(TypeError, match=r"fourth_moment\.sum_ii is not symmetric"):
        Store(tmp_path, {}).save(0, [SharedInput(("a",), stats)])


def test_saved_sums_that_no_statistic_is_called_are_refused_by_name(outside, tmp_path):
    kind = outside(METHOD).FourthMoment
    store = Store(tmp_path, {})
    store.save(0, [SharedInput(("a",), Statistics({kind: kind.of(torch.randn(9, 4), 1)}))])
    store.finish()
    del STATISTICS["fourth_moment"]
    with pytest.raises(
        InputError, match="'fourth_moment', and no statistic is; there are abs_mean"
    ):
        store.load(0, torch.device("cpu"))


def test_a_statistic_that_no_file_defines_cannot_be_saved():
    space = {}
    code = "from calibration.statistics.base import InputStatistic\n"
    exec(code + 'class Typed(InputStatistic, name="typed"): pass', space)
    try:
        with pytest.raises(InputError, match="'typed' is defined in no file"):
            space["Typed"].identity()
    finally:
        del STATISTICS["typed"]


def test_the_manifest_of_saved_statistics_says_which_they_are(workspace, outside):
    method = outside(METHOD).ByFourthMoment(sparsity=0.5)
    compress.calibrate(recipe(workspace, method=method, propagate="none"))
    [folder] = statistics_folders(workspace)
    manifest = json.loads(
        (workspace / "cache" / "statistics" / folder / "manifest.json").read_text()
    )
    names = [name.split()[0] for name in manifest["settings"]["statistics"]]
    assert names == ["abs_mean", "fourth_moment", "gram", "mean"]


def test_a_distribution_announces_its_statistics_by_an_entry_point(tmp_path, monkeypatch):
    text = METHOD.replace("fourth_moment", "announced").partition("@dataclass(frozen=True, kw_only")
    (tmp_path / "announcing.py").write_text(text[0], encoding="utf-8")
    folder = tmp_path / "announcing-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: announcing\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[compress.statistics]\nannounced = announcing\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "announced" not in STATISTICS
    try:
        assert load_statistics()["announced"].__module__ == "announcing"
    finally:
        STATISTICS.pop("announced", None)
        sys.modules.pop("announcing", None)


def test_an_announced_module_that_is_not_there_is_an_error_that_names_the_entry(
    tmp_path, monkeypatch
):
    folder = tmp_path / "gone-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: gone\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[compress.statistics]\nx = not_there_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError, match="not_there_at_all of the distribution gone cannot be"):
        load_statistics()


@pytest.mark.parametrize("name", ["nothing", "gram"])
def test_an_announced_module_without_the_statistic_is_refused(tmp_path, monkeypatch, name):
    """Also where ours has the name: the module's own could not be told from it."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "bare_module.py").touch()
    announce(tmp_path, "bare", "compress.statistics", {name: "bare_module"})
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError, match=f"bare defines no statistic of the name '{name}'"):
        load_statistics()
    sys.modules.pop("bare_module")
