"""What inspection tells of models and of compressed checkpoints, from headers and plans."""

import math
import shutil

import pytest
import torch
from exported import compressed, export
from families import save_tiny
from test_on_base import base, on_base
from test_pages import Read, drawn
from workspaces import recipe

import compress
from compress.cli.main import main
from compress.errors import LayerError
from compress.inspection.checkpoint import Inspection, inspect
from compress.inspection.page import inspection_page
from compress.inspection.possibilities import dividing_groups, possibilities, saving_rank
from compress.inspection.spectra import effective_ranks, weight_spectra
from compress.inspection.tables import layer_cells, other_cells, refused_lines, spectra_cells
from compress.methods.cospadi.method import CoSpaDi
from compress.methods.gptq import GPTQ
from compress.methods.svd import SVD
from compress.models.checkpoint import Reader
from compress.pipeline.main import no_progress


def inspected(folder) -> Inspection:
    return inspect(str(folder), progress=no_progress)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "mamba"])
def test_every_tensor_of_a_model_is_told_once(family, workspace):
    shutil.rmtree(workspace / "model")
    save_tiny(workspace / "model", family)
    found = inspected(workspace / "model")
    reader = Reader(workspace / "model")
    assert found.n_bytes == reader.total_bytes
    assert len(found.tensors) == len(reader)
    planned = compress.plan(recipe(workspace, method=GPTQ(group_size=-1), export=("native",))).plan
    assert [layer.name for layer in found.layers] == [layer.name for layer in planned.layers]
    assert {(it.name, it.reason) for it in found.others} == {
        (it.name, it.reason) for it in planned.kept
    }


def test_inspecting_a_model_reads_no_tensor(workspace, monkeypatch):
    def refuse(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(Reader, "__getitem__", refuse)
    found = inspected(workspace / "model")
    assert len(possibilities(found.ordinary)) > 5


def test_layers_of_a_kind_are_one_row(workspace):
    found = inspected(workspace / "model")
    rows = layer_cells(found, found.layers)
    assert [row[:4] for row in rows[:2]] == [
        ("self_attn.q_proj", "3", "32 x 32", "float32"),
        ("self_attn.k_proj", "3", "32 x 32", "float32"),
    ]
    assert len(rows) == 7
    assert [reason for reason, _ in other_cells(found)] == [
        "outside the decoder blocks",
        "not a linear layer",
    ]


def test_what_methods_would_make_is_what_a_run_would_plan(workspace):
    found = possibilities(inspected(workspace / "model").ordinary)
    by_setting = {(one.methods, one.setting): one for one in found}
    one = (("gptq", "rtn"), "bits 4")
    planned = compress.plan(recipe(workspace, method=GPTQ(bits=4))).plan
    assert by_setting[one].n_bytes == planned.bytes_after
    assert by_setting[one].layer_bytes == sum(layer.bytes_after for layer in planned.layers)
    refused = [one for one in found if one.refusal]
    assert all(one.n_bytes is None for one in refused)
    assert any("eora" in one.methods and "rank" in one.refusal for one in refused)


def test_group_sizes_are_those_that_quantisers_take(workspace):
    counts = dividing_groups(inspected(workspace / "model").ordinary)
    # Three blocks: six layers read 32 features, down_proj reads 64.
    assert counts == {256: 0, 128: 0, 64: 3, 32: 21, 16: 21}


def test_a_rank_that_saves_is_the_last_that_a_plan_takes(workspace):
    found = inspected(workspace / "model").ordinary
    rank = min(saving_rank(layer) for layer in found.linears.shapes.values())
    compress.plan(recipe(workspace, method=SVD(rank=rank)))
    with pytest.raises(compress.RecipeError, match="would not get smaller"):
        compress.plan(recipe(workspace, method=SVD(rank=rank + 1)))


@pytest.mark.parametrize("name", ["native", "gptq", "dense"])
def test_our_exports_are_told_by_their_forms(name, tmp_path):
    folder = export(compressed(tmp_path / "source"), tmp_path / "out", name)
    found = inspected(folder)
    expected = {"native": "native", "gptq": "gptq, 4 bits, groups of 32, with an adapter"}
    assert found.format == expected.get(name, "ordinary weights")
    stored = {layer.stored for layer in found.layers}
    assert stored == ({"float32"} if name == "dense" else {"4-bit g32 + rank 4"})
    assert len(found.layers) == 21
    headers = Reader(folder).total_bytes
    if name == "gptq":
        headers += Reader(folder / "adapter", "adapter_model").total_bytes
    assert found.n_bytes == headers


@pytest.mark.usefixtures("quick_verification")
def test_layers_that_share_a_dictionary_are_told_too(workspace):
    compress.run(recipe(workspace, method=CoSpaDi(share="inputs", keep=0.9)))
    found = inspected(workspace / "out")
    assert any("atoms, shared" in layer.stored for layer in found.layers)
    assert found.n_bytes == Reader(workspace / "out").total_bytes


def test_effective_ranks_are_those_of_a_spectrum_that_is_known():
    torch.manual_seed(0)
    values = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.0])
    left, right = (torch.linalg.qr(torch.randn(n, 5))[0] for n in (8, 6))
    ranks = effective_ranks(left @ values.diag() @ right.T)
    energy = 9 + 4 + 1 + 0.25
    assert (ranks.full, ranks.numerical) == (6, 4)
    assert math.isclose(ranks.stable, energy / 9, rel_tol=1e-5)
    assert 13 / energy >= 0.9 > 9 / energy
    assert ranks.holds_90 == 2
    assert 14 / energy < 0.99
    assert ranks.holds_99 == 4


def test_a_weight_of_zeros_has_no_rank():
    ranks = effective_ranks(torch.zeros(3, 4))
    assert (ranks.numerical, ranks.stable, ranks.holds_90) == (0, 0.0, 0)


def test_a_layer_that_is_not_finite_is_named(workspace, monkeypatch):
    found = inspected(workspace / "model").ordinary
    bad = torch.full((32, 32), float("nan"))
    monkeypatch.setattr(Reader, "__getitem__", lambda *_: bad)
    with pytest.raises(LayerError, match=r"layer model\.layers\.0\.\S+: it holds NaN"):
        list(weight_spectra(found, progress=no_progress))


def test_the_command_shows_kinds_or_every_layer(workspace, capsys):
    assert main(["inspect", str(workspace / "model"), "--spectra"]) == 0
    printed = capsys.readouterr().out.partition("what methods")[0]
    assert "21 layers that methods compress in 3 blocks" in printed
    assert "self_attn.q_proj" in printed
    assert "model.layers.0" not in printed
    assert "effective ranks, medians over the layers" in printed
    assert main(["inspect", str(workspace / "model"), "--layers"]) == 0
    printed = capsys.readouterr().out.partition("what methods")[0]
    assert printed.count("q_proj") == 3


def test_spectra_of_codes_are_refused(tmp_path, capsys):
    folder = export(compressed(tmp_path / "source"), tmp_path / "out", "native")
    assert main(["inspect", str(folder), "--spectra"]) == 2
    assert "is compressed (native); spectra are of ordinary weights" in capsys.readouterr().err


@pytest.mark.slow
def test_the_page_of_a_model_shows_what_the_terminal_does(workspace, tmp_path, capsys):
    out = tmp_path / "model.html"
    assert main(["inspect", str(workspace / "model"), "--spectra", "--html", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith(f"the picture is {out}\n")
    page = out.read_text(encoding="utf-8")
    charts, text = drawn(page), Read(page).text
    assert [title(chart) for chart in charts] == [
        "Where the bytes are",
        "Directions that hold 90 % of the energy",
        "Stable rank",
    ]
    found = inspected(workspace / "model")
    ranks = dict(weight_spectra(found.ordinary, progress=no_progress))
    cells = {it["layer"]: it["value"] for it in charts[1]["data"]["values"]}
    assert cells == {name: float(f"{one.holds_90 / one.full:.5g}") for name, one in ranks.items()}
    bars = charts[0]["data"]["values"]
    assert sum(bar["value"] for bar in bars) == pytest.approx(found.n_bytes / 1e6)
    for rows in (layer_cells(found, found.layers), spectra_cells(ranks)):
        assert all(" ".join(row) in text for row in rows)
    possible = possibilities(found.ordinary)
    settings = [one for one in possible if not one.refusal]
    assert page.count('class="bar"') == len(settings) > 5
    assert all(f"{one.setting} {', '.join(one.methods)} " in text for one in settings)
    assert all(line in text for line in refused_lines(possible))


def title(chart) -> str:
    return chart["description"].partition(".")[0]


def test_the_page_of_an_export_has_the_bits_and_no_methods(tmp_path):
    folder = export(compressed(tmp_path / "source"), tmp_path / "out", "native")
    found = inspected(folder)
    page = inspection_page(str(folder), found, [], {})
    assert [title(chart) for chart in drawn(page)] == [
        "Where the bytes are",
        "Bits per weight of each layer",
    ]
    text = Read(page).text
    assert "native, written by compress-llm: 21 layers in 3 blocks" in text
    assert "4-bit g32 + rank 4" in text
    assert not any(word in text for word in ("--spectra", "What methods", "break-even rank"))


def test_a_page_is_written_only_where_there_is_nothing_of_others(workspace, tmp_path, capsys):
    arguments = ["inspect", str(workspace / "model"), "--html"]
    mine, other = tmp_path / "mine.html", tmp_path / "other.html"
    for _ in range(2):
        assert main([*arguments, str(mine)]) == 0
    assert (
        "Not measured: run with --spectra , which reads every weight."
        in Read(mine.read_text()).text
    )
    other.write_text("a thesis")
    capsys.readouterr()
    for place, message in (
        (other, "is there and is no page that `compress inspect` wrote"),
        (tmp_path, "is there and is no page"),
        (tmp_path / "nix" / "x.html", "is no folder; make it first"),
    ):
        assert main([*arguments, str(place)]) == 2
        printed = capsys.readouterr()
        assert message in printed.err and printed.out == ""
    assert other.read_text() == "a thesis"


@pytest.mark.usefixtures("quick_verification")
def test_a_folder_of_exports_is_refused_with_those_that_are_in_it(workspace, capsys):
    base(workspace)
    compress.run(on_base(workspace))
    out = workspace / "out"
    assert main(["inspect", str(out)]) == 2
    message = (
        f"{out}: it holds no checkpoint itself, but {out / 'adapter'}; inspect {out / 'adapter'}"
    )
    assert message in capsys.readouterr().err
    assert main(["inspect", str(out / "adapter")]) == 0
