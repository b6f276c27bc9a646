"""Layers that a format does not store in codes, and what a plan says of formats that no server reads."""

import re
from pathlib import Path

import pytest
import torch
from families import save_tiny
from workspaces import TEXT, recipe

import compress
from compress.cli.main import main
from compress.errors import RecipeError
from compress.exports.base import EXPORTS
from compress.exports.load import load_export
from compress.families.base import Compressor
from compress.methods.eora import EoRA
from compress.methods.gptq import GPTQ
from compress.methods.magnitude import Magnitude
from compress.methods.rtn import RTN
from compress.models.checkpoint import Reader

IDS = torch.tensor([[5, 9, 2, 77, 31]])
NARROW = [f"model.layers.{n}.self_attn.{kind}_proj" for n in range(3) for kind in "kv"]
"""Layers of 16 outputs, which GPTQ's words of 32 codes do not hold."""


@pytest.fixture
def narrow(tmp_path: Path, quick_verification: None) -> Path:
    """A workspace whose model has two heads of 8 for keys and values."""
    del quick_verification
    save_tiny(tmp_path / "model", num_key_value_heads=2)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_a_layer_that_no_format_of_the_run_stores_in_codes_is_not_compressed(narrow: Path) -> None:
    report = compress.run(recipe(narrow, export=("gptq",)))
    kept = {tensor.name: tensor.reason for tensor in report.kept}
    assert {f"{name}.weight" for name in NARROW} <= set(kept)
    assert kept[f"{NARROW[0]}.weight"].endswith("its shape (16, 32) is not in multiples of 32")
    assert not {layer.name for layer in report.layers} & set(NARROW)
    stored, source = Reader(narrow / "out"), Reader(narrow / "model")
    for name in NARROW:
        assert torch.equal(stored[f"{name}.weight"], source[f"{name}.weight"])


@pytest.mark.slow
def test_a_layer_that_one_format_stores_in_codes_is_dense_in_the_other(narrow: Path) -> None:
    plan = compress.plan(job := recipe(narrow, export=("native", "gptq"))).plan
    report = compress.run(job)
    assert {layer.name for layer in report.layers} >= set(NARROW)
    folders = {name: narrow / "out" / name for name in job.export}
    for export in report.exports:
        assert plan.export_bytes(export.format) == export.tensor_bytes
    native, gptq = (load_export(folder) for folder in folders.values())
    with torch.inference_mode():
        torch.testing.assert_close(native(IDS).logits, gptq(IDS).logits, rtol=0, atol=1e-4)
    weight = Reader(folders["gptq"])[f"{NARROW[0]}.weight"]
    assert torch.equal(weight, native.get_submodule(NARROW[0]).form.dense())
    factors = Reader(folders["gptq"] / "adapter", "adapter_model")
    assert not any(NARROW[0] in name for name in factors)
    note = "gptq stores 6 of 21 compressed layers as dense weights, model.layers.0.self_attn.k_proj the first"
    assert any(text.startswith(note) for text in report.notes)


def test_ordinary_weights_have_no_say_in_what_is_stored_in_codes(narrow: Path) -> None:
    plan = compress.plan(recipe(narrow, export=("gptq", "dense"))).plan
    assert not {layer.name for layer in plan.layers} & set(NARROW)


def test_a_format_that_would_hold_no_layer_in_codes_is_refused(narrow: Path) -> None:
    for exports in (("gptq",), ("native", "gptq")):
        job = recipe(narrow, export=exports, include=("k_proj", "v_proj"))
        with pytest.raises(
            RecipeError, match=r"gptq cannot hold .*k_proj: .* for all chosen layers"
        ):
            compress.plan(job)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (GPTQ(bits=3, group_size=32), "3 bits .*--export compressed-tensors"),
        (RTN(bits=4, group_size=32, symmetry="asymmetric"), "zero points .*--export compressed"),
        (EoRA(base=GPTQ(group_size=32, act_order="desc_act")), "desc_act; .*--act-order none"),
        (GPTQ(bits=8, group_size=16), "no kernel for groups of 16"),
    ],
)
def test_what_no_server_reads_in_gptq_is_said_with_what_they_read(
    method: Compressor, words: str
) -> None:
    shapes = {"a": (64, 64), "b": (32, 64)}
    warnings = EXPORTS["gptq"].warnings(dict.fromkeys(shapes, method), shapes)
    assert len(warnings) == 1
    assert re.search(words, warnings[0])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [32, 64, -1])
def test_what_servers_read_in_gptq_gets_no_warning(bits: int, size: int) -> None:
    method, shapes = EoRA(base=GPTQ(bits=bits, group_size=size)), {"a": (64, 64)}
    assert EXPORTS["gptq"].warnings({"a": method}, shapes) == ()
    for name, kind in EXPORTS.items():
        if kind.traits.ordinary or name == "native":
            assert kind.warnings({"a": Magnitude()}, shapes) == ()


@pytest.mark.slow
def test_plan_run_report_and_card_say_what_no_server_reads(
    narrow: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = narrow / "recipe.yaml"
    job = recipe(narrow, export=("gptq",), method=GPTQ(bits=3, group_size=32))
    path.write_text(job.to_yaml(), encoding="utf-8")
    warning = "gptq: no server reads GPTQ of 3 bits"
    assert main(["plan", str(path)]) == 0
    assert f"warning: {warning}" in capsys.readouterr().out
    assert main(["run", str(path)]) == 0
    told = capsys.readouterr()
    assert f"warning: {warning}" in told.err
    assert f"note: {warning}" in told.out
    assert f"- {warning}" in (narrow / "out" / "README.md").read_text(encoding="utf-8")
