"""What every form must do, whatever it stores. A new form needs an example here, and is covered."""

import copy
import itertools
import json

import pytest
import torch
from exported import IDS, compressed, export, python
from safetensors.torch import load_file, save_file

from compress.exports.load import load_export
from compress.exports.native import NativeExporter
from compress.forms.base import Form
from compress.forms.build import empty
from compress.forms.dense import Dense
from compress.forms.int8 import Int8
from compress.forms.linear import CompressedLinear
from compress.forms.low_rank import LowRank
from compress.forms.product import Product
from compress.forms.quantised import Quantised
from compress.forms.registered import FORMS
from compress.forms.shared import Common, Shared
from compress.forms.short import Short
from compress.forms.sparse import Along, Layout, Sparse
from compress.forms.sum import Sum
from compress.forms.tied import Tied

OWNER = "model.layers.0.self_attn.q_proj.form"
FLOATS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Dtypes of inputs, and the relative error that their rounding may leave in outputs."""


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantised(o, i, bits=4, size=16, kind="symmetric"):
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 1 << bits, (o, i), generator=generator)
    n_groups = -(-i // size)
    scales = torch.rand(o, n_groups, generator=generator) / 64 + 1e-3
    zeros = None
    if kind == "asymmetric":
        zeros = torch.randint(0, 1 << bits, (o, n_groups), generator=generator)
    form = Quantised.from_codes(codes, scales, zeros, bits=bits, group_size=size)
    return form.with_offsets(-8 * scales) if kind == "affine" else form


def wide(o, i):
    """Codes whose scales are bfloat16."""
    form = quantised(o, i, bits=6)
    tensors = {"qweight": form.qweight, "scales": form.scales.bfloat16()}
    return Quantised(form.shape, form.bits, form.group_size, tensors)


def low_rank(o, i, r=3):
    return LowRank.from_factors(numbers(o, r) / 8, numbers(r, i, seed=1) / 8)


def sparse(o, i, along=Along.ROWS):
    n, m = (o, i) if along is Along.ROWS else (i, o)
    mask = torch.zeros(n, m, dtype=torch.bool)
    mask.scatter_(1, numbers(n, m, seed=3).argsort(1)[:, : m // 2], value=True)
    return Sparse.from_lines(mask, Dense(numbers(n, m // 2, seed=4) / 8), along)


def fours(o, i):
    mask = numbers(o, i // 4, 4).argsort(2) < 2
    return Sparse.from_lines(
        mask.view(o, i), Short.from_values(numbers(o, i // 2) / 8, 14), Along.ROWS, Layout.FOURS
    )


EXAMPLES = {
    "common": lambda o, i: Common(low_rank(o, i, r=5), 2),
    "shared": lambda o, i: Shared((o, i), OWNER, Common(low_rank(o, i, r=5), 2)),
    "dense": lambda o, i: Dense(numbers(o, i) / 8),
    "low_rank": low_rank,
    "low_rank, shifted": lambda o, i: low_rank(o, i, r=2).shifted(numbers(o, seed=5)),
    "product": lambda o, i: Product(quantised(o, 4, bits=8), quantised(4, i)),
    "product, shifted": lambda o, i: Product(low_rank(o, 6), quantised(6, i)).shifted(numbers(o)),
    "product, a dictionary": lambda o, i: Product(low_rank(o, 8), sparse(8, i, Along.COLUMNS)),
    "quantised": quantised,
    "quantised, asymmetric": lambda o, i: quantised(o, i, kind="asymmetric"),
    "quantised, affine": lambda o, i: quantised(o, i, kind="affine"),
    "quantised, wide scales": wide,
    "short": lambda o, i: Short.from_values(numbers(o, i) / 8, 12),
    "sparse": sparse,
    "sparse, columns": lambda o, i: sparse(o, i, Along.COLUMNS),
    "sparse, fours": fours,
    "int8": lambda o, i: Int8((16 * numbers(o, i)).to(torch.int8), (numbers(o).abs() / 64).half()),
    "int8, wide scales": lambda o, i: Int8(
        (16 * numbers(o, i)).to(torch.int8), (numbers(o).abs() / 64).bfloat16()
    ),
    "tied": lambda o, i: Tied((o, i), OWNER, CompressedLinear(quantised(o, i), None)),
    "sum": lambda o, i: Sum([quantised(o, i, bits=3), low_rank(o, i, r=1)]),
}
"""Forms for a weight (o, i), the first word the name of the form."""
ALL = pytest.mark.parametrize("name", EXAMPLES)


def made(name, o=12, i=32):
    form = EXAMPLES[name](o, i)
    assert isinstance(form, Form)
    return form


def built_again(form, spec=None):
    """From its spec and its tensors, linked to what the form reads."""
    again = empty(form.spec() if spec is None else spec, form.shape, torch.float32, "cpu")
    again.load_state_dict(form.state_dict())
    owners = {part.owner: part.form for part in form.parts() if isinstance(part, Shared)}
    owners |= {
        part.owner: CompressedLinear(part.form, None)
        for part in form.parts()
        if isinstance(part, Tied)
    }
    for part in again.parts():
        part.link(owners.get)
    return again


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


def test_every_form_has_an_example():
    ours = {name for name in FORMS if FORMS[name].__module__.startswith("compress.forms.")}
    assert {name.partition(",")[0] for name in EXAMPLES} == ours


@ALL
class TestEveryForm:
    def test_is_of_the_form_that_it_is_an_example_of(self, name):
        assert type(made(name)) is FORMS[name.partition(",")[0]]
        assert made(name).kind == name.partition(",")[0]

    def test_is_built_again_from_its_spec_as_json_and_its_tensors_to_the_bit(self, name):
        form = made(name)
        spec = json.loads(json.dumps(form.spec()))
        assert spec["form"] == form.kind
        again = built_again(form, spec)
        assert type(again) is type(form)
        assert again.spec() == form.spec()
        assert torch.equal(again.dense(), form.dense())
        assert again.state_dict().keys() == form.state_dict().keys()
        for key, tensor in again.state_dict().items():
            assert tensor.dtype == form.state_dict()[key].dtype

    def test_gives_the_rows_of_its_dense_weight(self, name):
        index = torch.tensor([3, 0, 3, 11])
        torch.testing.assert_close(made(name).rows(index), made(name).dense()[index])

    def test_is_built_empty_where_there_is_no_memory(self, name):
        form = made(name)
        ghost = empty(form.spec(), form.shape, torch.float32, "meta")
        assert ghost.shape == form.shape
        for key, tensor in ghost.state_dict().items():
            assert tensor.is_meta
            assert tensor.shape == form.state_dict()[key].shape
        assert ghost.n_bytes() == form.n_bytes()
        assert ghost.describe() == form.describe()
        assert ghost.obstacle_to_correction() == form.obstacle_to_correction()

    def test_takes_the_bytes_of_its_tensors_on_disk(self, name, tmp_path):
        form = made(name)
        tensors = {key: value.contiguous() for key, value in form.state_dict().items()}
        save_file(tensors, tmp_path / "form.safetensors")
        data = (tmp_path / "form.safetensors").read_bytes()
        assert form.n_bytes() == len(data) - 8 - int.from_bytes(data[:8], "little")

    def test_says_its_weight_in_single_precision(self, name):
        dense = made(name).dense()
        assert (tuple(dense.shape), dense.dtype) == ((12, 32), torch.float32)
        assert float(dense.norm()) > 0

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("shape", [(32,), (5, 32), (2, 3, 32)])
    def test_runs_as_its_dense_weight_for_inputs_of_any_dtype_and_shape(self, name, dtype, shape):
        form, x = made(name), numbers(*shape, seed=7).to(dtype)
        before = x.clone()
        offset = form.offset()
        expected = x.double() @ form.dense().double().T + (0 if offset is None else offset.double())
        with torch.no_grad():
            y = form(x)
        assert (y.shape, y.dtype) == (expected.shape, dtype)
        assert relative(y, expected) < FLOATS[dtype]
        assert torch.equal(x, before)

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_gives_the_same_outputs_unpacked_to_the_bit(self, name, dtype):
        form, x = made(name), numbers(5, 32, seed=7).to(dtype)
        with torch.no_grad():
            assert torch.equal(form.unpacked(dtype)(x), form(x))

    def test_serves_a_layer_with_a_bias(self, name):
        form, x, bias = made(name), numbers(5, 32, seed=7), numbers(12, seed=8)
        torch.testing.assert_close(CompressedLinear(form, bias)(x), form(x) + bias)

    def test_adds_to_another_in_a_sum(self, name):
        form, more = made(name), low_rank(12, 32, r=4)
        total = Sum([form, more])
        assert torch.equal(total.dense(), form.dense() + more.dense())
        assert total.n_bytes() == form.n_bytes() + more.n_bytes()
        assert total.describe() == f"{form.describe()} + {more.describe()}"
        assert torch.equal(built_again(total).dense(), total.dense())

    def test_is_copied_whole(self, name):
        form, x = made(name), numbers(5, 32, seed=7)
        with torch.no_grad():
            assert torch.equal(copy.deepcopy(form)(x), form(x))

    def test_refuses_a_correction_where_its_offset_would_count_twice(self, name):
        form = made(name)
        if form.offset() is not None:
            assert "offset" in form.obstacle_to_correction()
        assert Sum([form]).obstacle_to_correction() == form.obstacle_to_correction()


@pytest.mark.parametrize("name", [name for name in EXAMPLES if made(name).trainable])
def test_gradients_reach_every_parameter_of_a_form_that_may_be_trained(name):
    form = made(name)
    form.requires_grad_(requires_grad=True)
    form(numbers(5, 32, seed=7)).square().sum().backward()
    assert list(form.parameters())
    assert all(float(parameter.grad.norm()) > 0 for parameter in form.parameters())


def test_every_description_is_its_own():
    texts = {name: made(name).describe() for name in EXAMPLES}
    assert all(text.strip() and text != name for name, text in texts.items())
    for (a, first), (b, second) in itertools.combinations(texts.items(), 2):
        assert first != second, f"{a} and {b}"


def test_the_labels_name_what_is_stored_and_nothing_that_only_joins():
    labels = {name: made(name).label() for name in EXAMPLES}
    assert labels["sum"] == labels["product"] == ""
    assert labels["quantised"] == "4-bit g16"
    assert labels["low_rank"] == "low rank"


class InEveryForm:
    """A model whose layers take the examples in turn, and who stores and who reads a shared one."""

    def __init__(self):
        rest = [name for name in EXAMPLES if name not in ("common", "shared", "tied")]
        self.names, self.used, self.common = itertools.cycle(rest), {}, None

    def __call__(self, layer, weight):
        o, i = weight.shape
        if f"{layer}.form" == OWNER:
            self.common = form = made("common", o, i)
        elif layer == OWNER.replace("q_proj.form", "k_proj"):
            form = Shared((o, i), OWNER, self.common)
        elif layer == "model.layers.0.mlp.up_proj":
            owner = layer.replace("up_proj", "gate_proj")
            form = Tied((o, i), owner, CompressedLinear(self.used[owner], None))
        else:
            form = made(next(self.names), o, i)
        self.used[layer] = form
        return form


LOAD = """
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.inference_mode():
    ids = torch.tensor([[int(n) for n in sys.argv[3].split(",")]])
    save_file({"logits": model(input_ids=ids).logits[0].float()}, sys.argv[2])
print(type(model.model.layers[0].mlp.up_proj.form).__module__)
"""


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A model of all forms, and its native export."""
    folder, forms = tmp_path_factory.mktemp("forms"), InEveryForm()
    model = compressed(folder / "source", make_form=forms)
    assert {form.kind for form in forms.used.values()} == {n.partition(",")[0] for n in EXAMPLES}
    assert len(forms.used) >= len(EXAMPLES)
    return model, export(model, folder / "native", "native")


def test_a_checkpoint_of_all_forms_loads_with_the_toolkit(everything):
    model, folder = everything
    loaded = load_export(folder)
    with torch.inference_mode():
        assert torch.equal(loaded(input_ids=IDS).logits[0], model.logits())


@pytest.mark.slow
def test_a_checkpoint_of_all_forms_loads_without_the_toolkit(everything, tmp_path):
    model, folder = everything
    ids = ",".join(map(str, IDS[0].tolist()))
    ran = python(LOAD, folder, tmp_path / "logits", ids, hide_toolkit=True, cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert ran.out.startswith("transformers_modules.")
    assert torch.equal(load_file(tmp_path / "logits")["logits"], model.logits())
    NativeExporter.verify_alone(folder)


def test_a_checkpoint_brings_the_code_of_its_forms_and_no_other(everything, tmp_path):
    _, folder = everything
    config = json.loads((folder / "config.json").read_text())
    shipped = {path.name for path in folder.glob("*.py")}
    assert shipped == set(config["code"])
    assert {"loading.py", "registered.py", "base.py", "sum.py", "shared.py"} <= shipped
    plain = export(compressed(tmp_path / "source"), tmp_path / "native", "native")
    assert {path.name for path in plain.glob("*.py")} == shipped - {
        "int8.py",
        "tied.py",
        "product.py",
        "shared.py",
        "short.py",
        "sparse.py",
    }


@pytest.mark.parametrize("name", ["quantised", "int8", "low_rank", "sum"])
def test_rows_are_looked_up_without_the_whole_weight(name, monkeypatch):
    def refuse(_):
        raise AssertionError("the weight was expanded")

    form, index = made(name), torch.tensor([5, 1])
    expected = form.dense()[index]
    for part in form.parts():
        monkeypatch.setattr(type(part), "dense", refuse)
    torch.testing.assert_close(form.rows(index), expected)
