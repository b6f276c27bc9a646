"""What every base format must do, whatever it stores. A new one needs a tiny checkpoint in `base_checkpoints`."""

import json
import shutil

import pytest
import torch
from base_checkpoints import CHECKPOINTS
from documents import ROOT, text_of
from families import save_tiny
from safetensors.torch import load_file, save_file
from workspaces import fill, recipe

import compress
from compress.bases import BASES, AsDense, Base, CheckpointFolder, Loading, kind_of, open_base
from compress.callbacks import no_progress
from compress.errors import CheckpointError, PluginError
from compress.exports.load import load_export
from compress.inspection.checkpoint import inspect
from compress.methods.eora import EoRA

pytestmark = pytest.mark.usefixtures("quick_verification", "example")
EXAMPLE = ROOT / "docs" / "extend" / "int8_rows.py"
FORMATS = sorted({*BASES, "int8-rows"})


@pytest.fixture(scope="module")
def example():
    """The base format of the documentation, defined by a running program."""
    exec(compile(text_of(EXAMPLE), EXAMPLE, "exec"), {"__name__": "int8_rows"})
    yield
    BASES.forget("int8-rows")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, example):  # noqa: ARG001  (defined before it is written)
    """Each format's tiny checkpoint, made when it is first asked for."""
    made = {}

    def of(name):
        if name not in made:
            place = fill(tmp_path_factory.mktemp(name))
            made[name] = CHECKPOINTS[name](place / "model", place / "base")
        return made[name]

    return of


def test_every_format_has_a_tiny_checkpoint_here():
    assert set(CHECKPOINTS) == set(BASES)


def test_no_two_formats_describe_their_checkpoints_alike(folders):
    described = [open_base(folders(name)).description for name in FORMATS]
    assert len(set(described)) == len(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
class TestEveryBase:
    def test_is_recognised_by_its_own_class_alone(self, name, folders):
        folder = CheckpointFolder(folders(name))
        takers = [kind for kind in BASES.values() if kind.recognises(folder)]
        assert [kind.format for kind in takers if not kind.ordinary or len(takers) == 1] == [name]
        assert kind_of(folder) is BASES[name]

    def test_says_what_it_is_and_how_others_load_it(self, name, folders):
        base = open_base(folders(name))
        assert base.format == name
        assert base.description
        assert base.description.startswith(name) or base.ordinary
        assert isinstance(base.loading, Loading)
        for statement in base.loading.imports:
            compile(statement, name, "exec")
        for value in base.loading.arguments.values():
            compile(value, name, "eval")

    def test_reads_a_form_of_each_layers_shape(self, name, folders):
        base = open_base(folders(name))
        assert base.layers or base.stacks or base.ordinary
        for layer in base.layers:
            form = base.form(layer)
            assert form.shape == base.shape(layer) == tuple(form.dense().shape)
            assert bool(torch.isfinite(form.dense()).all())
        for stack in base.stacks:
            assert tuple(base.stack(stack).shape) == base.stack_shape(stack)

    def test_divides_the_tensors_between_layers_and_the_rest(self, name, folders):
        base = open_base(folders(name))
        of_layers = [tensor for layer in base.layers for tensor in base.tensors_of(layer)]
        stacked = [tensor for parts in base.stacks.values() for tensor in parts]
        others = [*stacked, *base.plain, *base.idle]
        assert sorted([*of_layers, *others]) == sorted(base.reader)
        in_layers = sum(map(base.stored_bytes, base.layers))
        rest = sum(base.reader.nbytes(tensor) for tensor in others)
        assert in_layers + rest == base.reader.total_bytes

    def test_stands_for_an_ordinary_checkpoint_of_the_model(self, name, folders):
        folder = folders(name)
        model = load_export(folder.parent / "model")
        view = AsDense(open_base(folder), model)
        state = model.state_dict()
        assert set(view) == set(CheckpointFolder(folder.parent / "model").reader)
        assert all(view.shape(key) == tuple(state[key].shape) for key in view if key in state)

    def test_is_loaded_with_the_weights_of_its_forms(self, name, folders):
        folder = folders(name)
        model = load_export(folder)
        view = AsDense(open_base(folder), load_export(folder.parent / "model"))
        for layer in view.base.layers:
            found = model.get_submodule(layer).form.dense()
            torch.testing.assert_close(found, view.base.form(layer).dense())

    def test_is_told_by_inspect(self, name, folders):
        found = inspect(str(folders(name)), progress=no_progress)
        base = open_base(folders(name))
        assert base.description.startswith(found.format)
        assert found.n_bytes == base.reader.total_bytes

    def test_gets_a_correction_that_lowers_every_layers_error(self, name, folders, tmp_path):
        folder = folders(name)
        report = compress.run(
            recipe(
                folder.parent,
                base_checkpoint=str(folder),
                method=EoRA(rank=2),
                out=tmp_path / "out",
            )
        )
        assert len(report.layers) == (24 if name == "mxfp4" else 21)
        assert all(layer.relative_error < layer.base_error for layer in report.layers)
        assert (report.base.kind, report.base.format) == (name, open_base(folder).description)
        card = (tmp_path / "out" / "adapter" / "README.md").read_text()
        assert report.base.format in card
        loading = BASES[name].loading
        assert all(package in card for package in loading.packages if loading.peft)
        assert all(statement in card for statement in loading.imports)
        assert ("PeftModel.from_pretrained" in card) == loading.peft
        is_served = loading.vllm is not None and not open_base(folder).unserved
        assert ("vllm serve" in card) == is_served

    def test_refuses_a_checkpoint_that_lacks_a_tensor_by_its_name(self, name, folders, tmp_path):
        if BASES[name].ordinary:
            pytest.skip("an ordinary checkpoint has no parts; the loader finds what is missing")
        folder, layer = cut(folders(name), tmp_path / "cut")
        with pytest.raises(CheckpointError, match=str(folder)):
            open_base(folder).form(layer)


def cut(folder, target):
    """A copy without the second tensor of a layer, or of stacked experts, and the name of these."""
    shutil.copytree(folder, target)
    base = open_base(folder)
    layer = next(iter((*base.layers, *base.stacks)))
    tensors = load_file(target / "model.safetensors")
    del tensors[(base.tensors_of(layer) if base.layers else base.stacks[layer])[1]]
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target, layer


def test_a_format_that_does_not_say_how_it_is_loaded_cannot_be_defined():
    with pytest.raises(PluginError, match=r"Silent: a base format needs `loading`"):

        class Silent(Base, name="silent"):
            pass

    assert "silent" not in BASES


def test_a_format_that_does_not_describe_its_grid_cannot_be_opened(folders):
    class Nameless(Base, name="nameless"):
        loading = Loading(packages=(), imports=(), arguments={}, peft=True, vllm=None)
        shape = form = None

    try:
        with pytest.raises(TypeError, match="grid"):
            Nameless(CheckpointFolder(folders("plain")))
    finally:
        BASES.forget("nameless")


def test_a_folder_that_two_formats_take_for_theirs_is_refused_by_both_names(folders):
    class Grasping(BASES["gptq"], name="grasping"):
        @classmethod
        def recognises(cls, folder):
            return folder.quant_method == "gptq"

    try:
        with pytest.raises(CheckpointError, match=r"gptq and grasping"):
            open_base(folders("gptq"))
    finally:
        BASES.forget("grasping")


def test_a_format_with_a_test_of_its_own_goes_before_ordinary_weights(tmp_path):
    class Marked(BASES["plain"], name="marked"):
        ordinary = False

        @classmethod
        def recognises(cls, folder):
            return bool(folder.config.get("marked"))

    try:
        save_tiny(tmp_path / "model")
        assert kind_of(CheckpointFolder(tmp_path / "model")).format == "plain"
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "marked": True}))
        assert kind_of(CheckpointFolder(tmp_path / "model")).format == "marked"
    finally:
        BASES.forget("marked")
