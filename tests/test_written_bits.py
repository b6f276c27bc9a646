"""What paths of few bits take where they are written, and what is said of those that save nothing."""

import pytest
from test_on_base import base, on_base
from workspaces import recipe

import compress
from compress.methods.eora import EoRA
from compress.methods.gptq import GPTQ

pytestmark = pytest.mark.usefixtures("quick_verification")


def in_16_bits(layers, rank):
    return sum(2 * rank * sum(layer.shape) for layer in layers)


def test_corrections_that_only_an_adapter_holds_count_with_its_16_bits(workspace):
    base(workspace)
    job = on_base(workspace, method=EoRA(rank=8, adapter_bits="4"))
    report = compress.run(job)
    plain = compress.run(on_base(workspace, method=EoRA(rank=8), out=workspace / "plain"))
    for layer, wide in zip(report.layers, plain.layers, strict=True):
        assert layer.bytes_after == wide.bytes_after
        assert layer.bits_per_weight == wide.bits_per_weight
        assert layer.form.endswith("+ rank 8 rounded to 4-bit g64")
    [adapter] = report.exports
    assert adapter.tensor_bytes - report.base.tensor_bytes == in_16_bits(report.layers, 8)
    assert report.totals.layer_bits_per_weight == plain.totals.layer_bits_per_weight
    text = f"{plain.totals.layer_bits_per_weight:.2f} bits per weight in these layers, base and correction together. "
    for place in ("README.md", "adapter/README.md"):
        assert text in (workspace / "out" / place).read_text()
    assert any("written in 16 all the same" in note for note in report.notes)
    assert not any("16 all the same" in note for note in plain.notes)


def test_a_plan_counts_the_corrections_as_they_are_written(workspace):
    base(workspace)
    few, wide = (
        compress.plan(on_base(workspace, method=EoRA(rank=8, adapter_bits=bits))).plan
        for bits in ("4", "16")
    )
    rows = [[line for line in plan.lines() if " x q_proj" in line] for plan in (few, wide)]
    assert rows[0] == rows[1] != []


def test_packed_figures_are_said_to_be_those_of_the_native_export(workspace):
    base(workspace)
    method = EoRA(rank=8, adapter_bits="4")
    report = compress.run(on_base(workspace, method=method, export=("adapter", "native")))
    assert all(layer.form.endswith("+ rank 8 in 4-bit g64") for layer in report.layers)
    figures = f"{report.totals.layer_bits_per_weight:.2f} bits per weight in these layers, base and correction together"
    cards = {name: (workspace / "out" / name / "README.md").read_text() for name in ("", "adapter")}
    for card in cards.values():
        assert f"{figures} in the native export." in card
    assert f"{figures}. " in (workspace / "out" / "native" / "README.md").read_text()


def test_a_gptq_export_alone_counts_its_adapter_too(workspace):
    method = EoRA(rank=8, adapter_bits="4", base=GPTQ(bits=4, group_size=32))
    report = compress.run(recipe(workspace, method=method, export=("gptq",)))
    bare = sum(method.base.planned_bytes(layer.shape) for layer in report.layers)
    assert report.totals.layer_bytes_after == bare + in_16_bits(report.layers, 8)


def test_few_bits_that_take_more_bytes_than_16_are_told_with_what_would_save_some(workspace):
    base(workspace)
    method = EoRA(rank=4, adapter_bits="4")
    plan = compress.plan(on_base(workspace, method=method, export=("native",))).plan
    larger = [
        layer.name
        for layer in plan.layers
        if method.correction_bytes(layer.shape, 4, 4) > method.correction_bytes(layer.shape, 4, 16)
    ]
    [note] = plan.notes
    assert 0 < len(larger) < len(plan.layers)
    text = f"the corrections of {len(larger)} layers, {larger[0]} the first, take more bytes in few bits"
    assert text in note
    rank = int(note.partition("a rank of ")[2].split()[0])
    for layer in plan.layers:
        few, wide = (method.correction_bytes(layer.shape, rank, bits) for bits in (4, 16))
        assert few < wide
    assert any(
        method.correction_bytes(layer.shape, rank - 1, 4)
        >= method.correction_bytes(layer.shape, rank - 1, 16)
        for layer in plan.layers
    )
    assert f"note: {note}" in plan.lines()
    wider = EoRA(rank=rank, adapter_bits="4")
    assert not compress.plan(on_base(workspace, method=wider, export=("native",))).plan.notes
