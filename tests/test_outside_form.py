"""Forms that are not ours: a run with one, its checkpoint without the toolkit, and what a checkpoint cannot ship."""

import json
import re
from dataclasses import replace

import pytest
import torch
from documents import ROOT, text_of
from exported import IDS, compressed, export, python
from outside import announce, imported
from safetensors.torch import load_file
from test_forms_contract import LOAD
from workspaces import recipe

import compress
from compress.cli.main import main
from compress.errors import CheckpointError
from compress.exports import shipping
from compress.exports.load import load_export
from compress.exports.native import NativeExporter
from compress.exports.shipping import shipped
from compress.exports.verification.verify import check
from compress.forms.base import REGISTERED
from compress.forms.build import empty
from compress.forms.dense import Dense
from compress.forms.registered import FORMS

FORM = text_of(ROOT / "docs" / "extend" / "ternary_form.py")
METHOD = text_of(ROOT / "docs" / "extend" / "ternary_method.py")
STATISTIC = text_of(ROOT / "docs" / "extend" / "fourth_moment.py")
READS_STATISTIC = '''

from fourth_moment import FourthMoment


@dataclass(frozen=True, kw_only=True)
class Guarded(Ternarise, name="guarded_ternary"):
    """The same, where every layer has inputs."""

    @property
    def needs(self):
        return super().needs | {FourthMoment}

    def compress(self, weights, stats):
        assert float(stats[FourthMoment].sum_i.min()) > 0
        return super().compress(weights, stats)
'''


@pytest.fixture
def ternary(tmp_path):
    with imported(tmp_path, {"ternary_form": FORM}) as [module]:
        yield module.Ternary


def ternary_everywhere(folder, kind):
    """A tiny model whose layers are all of the form."""
    return compressed(folder, make_form=lambda _, weight: kind.of(weight))


@pytest.mark.slow
def test_a_form_and_a_statistic_of_other_modules_pass_a_run_and_load_without_the_toolkit(
    workspace, tmp_path, capsys
):
    method = {"fourth_moment": STATISTIC, "guarded_ternary": METHOD + READS_STATISTIC}
    with imported(tmp_path, {"ternary_form": FORM, **method}) as [*_, module]:
        job = recipe(workspace, method=module.Guarded(), export=("native",), eval_windows=2)
        planned = compress.plan(job).plan
        report = compress.run(job)
        assert not any("used again" in note for note in report.notes)
        again = compress.run(replace(job, out=workspace / "again"))
        assert any("used again" in note for note in again.notes)
        assert {layer.form for layer in report.layers} == {"ternary"}
        assert planned.bytes_after == report.totals.tensor_bytes_after
        assert main(["inspect", str(job.folder)]) == 0
        assert re.search(r"ternary", capsys.readouterr().out)
        assert main(["report", str(job.folder)]) == 0
        assert "ternary" in (job.folder / "README.md").read_text()
        expected = load_export(job.folder)(input_ids=IDS).logits[0]
    assert "ternary" not in FORMS
    assert "ternary_form.py" in json.loads((job.folder / "config.json").read_text())["code"]
    ids, out = ",".join(map(str, IDS[0].tolist())), tmp_path / "logits"
    ran = python(LOAD, job.folder, out, ids, hide_toolkit=True, cwd=tmp_path / "cache")
    assert ran.code == 0, ran.err
    torch.testing.assert_close(load_file(out)["logits"], expected.detach(), rtol=0, atol=1e-5)
    with pytest.raises(CheckpointError, match="form 'ternary' is unknown here; known: common"):
        load_export(job.folder)


def test_a_form_of_another_module_is_shipped_with_relative_imports(ternary, tmp_path):
    made = ternary_everywhere(tmp_path / "source", ternary)
    folder = export(made, tmp_path / "native", "native")
    text = (folder / "ternary_form.py").read_text()
    assert "from .base import Builder, Form, Spec\n" in text
    assert "compress.forms" not in text
    assert check(folder, "cpu").passed


def test_a_distribution_announces_its_forms_by_entry_points(tmp_path, monkeypatch):
    (tmp_path / "announced_form.py").write_text(FORM.replace('name="ternary"', 'name="announced"'))
    announce(tmp_path, "ternaries", "compress.forms", {"announced": "announced_form"})
    monkeypatch.syspath_prepend(tmp_path)
    assert "announced" in FORMS
    assert FORMS.modules_of_the_program() == frozenset()
    try:
        form = empty({"form": "announced"}, (4, 8), torch.float32, "meta")
        assert type(form).__module__ == "announced_form"
    finally:
        del REGISTERED["announced"]


def test_only_what_other_processes_cannot_find_is_named_to_them(ternary):
    assert FORMS["ternary"] is ternary
    assert FORMS.modules_of_the_program() == {"ternary_form"}


REFUSED = {
    "import numpy": r"ternary_form\.py imports numpy \(line 7\), which a checkpoint cannot bring along",
    "from transformers import AutoConfig": "imports transformers",
    "from compress.errors import LayerError": r"imports compress\.errors",
    "from calibration.precision import cuda_products": r"imports calibration\.precision",
    "from .sibling import x": r"imports \.sibling",
    "import compress.forms.sparse": r"write `from compress\.forms\.sparse import \.\.\.` on a line of its own",
    "from compress.forms import sparse": r"write `from compress\.forms\.sparse import \.\.\.`",
    "x = 1; from compress.forms.sum import Sum": r"line 7 of ternary_form\.py cannot be made a relative import",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_a_checkpoint_cannot_bring_along_is_refused_naming_the_import(ternary, tmp_path, line):
    text = FORM.replace("from torch import Tensor\n", f"from torch import Tensor\n{line}\n")
    (tmp_path / "ternary_form.py").write_text(text)
    with pytest.raises(CheckpointError, match=REFUSED[line]):
        shipped({ternary})


def test_a_form_that_cannot_be_shipped_is_refused_at_its_first_layer(ternary, tmp_path):
    made = ternary_everywhere(tmp_path / "source", ternary)
    (tmp_path / "ternary_form.py").write_text("import numpy\n" + FORM)
    (tmp_path / "native").mkdir()
    exporter = NativeExporter(tmp_path / "native", made.source)
    with pytest.raises(CheckpointError, match="imports numpy"):
        exporter.add_layer(next(iter(made.layers.values())))


def test_imports_of_torch_and_the_standard_library_are_shipped_as_they_are(ternary, tmp_path):
    line = "import math, functools\nimport torch.nn.functional as F\nfrom collections import abc\n"
    (tmp_path / "ternary_form.py").write_text(line + FORM)
    assert shipped({ternary})["ternary_form.py"].startswith(line)


def test_imports_that_go_over_several_lines_become_relative_too(ternary, tmp_path):
    several = "from compress.forms.base import (\n    Builder,\n    Form,\n    Spec,\n)\n"
    text = FORM.replace("from compress.forms.base import Builder, Form, Spec\n", several)
    (tmp_path / "ternary_form.py").write_text(text)
    files = shipped({ternary})
    assert "from .base import (\n    Builder," in files["ternary_form.py"]
    assert {"base.py", "dense.py", "packing.py", "loading.py", "registered.py"} < set(files)


def test_a_subclass_without_a_name_would_be_read_as_its_parent_and_is_refused():
    class Noted(Dense):
        pass

    with pytest.raises(CheckpointError, match="Noted is not registered"):
        shipped({Noted})


@pytest.mark.usefixtures("ternary")
def test_two_forms_of_one_name_are_refused_naming_both(tmp_path):
    message = r"'ternary' of other_form\.Ternary: ternary_form\.Ternary has that name"
    with pytest.raises(TypeError, match=message), imported(tmp_path, {"other_form": FORM}):
        pass


@pytest.mark.slow
def test_a_file_that_was_not_shipped_is_named_when_the_export_is_verified(workspace, monkeypatch):
    whole = shipping.shipped
    monkeypatch.setattr(
        "compress.exports.native.shipped",
        lambda forms: {name: text for name, text in whole(forms).items() if name != "packing.py"},
    )
    with pytest.raises(CheckpointError, match=r"(?s)without the toolkit .*packing\.py"):
        compress.run(recipe(workspace, export=("native",)))
