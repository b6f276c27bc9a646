"""Layers that share a dictionary, where bytes are shown: those of all together beside their own."""

import pytest
from workspaces import recipe

import compress
from compress.methods.cospadi.method import CoSpaDi
from compress.report.card.card import model_card

pytestmark = pytest.mark.usefixtures("quick_verification")


@pytest.fixture
def job(workspace):
    return recipe(workspace, method=CoSpaDi(share="inputs", keep=0.9, rounds=1))


def test_a_plan_shows_what_is_shared_with_whom_and_what_it_takes_together(job):
    plan = compress.plan(job).plan
    layers = {layer.name: layer for layer in plan.layers}
    owners = {layer.name: layer.owner for layer in plan.layers if layer.owner}
    assert owners
    for name, owner in owners.items():
        assert not layers[owner].owner
        assert name.rpartition(".")[0] == owner.rpartition(".")[0]
    lines = [line for line in plan.lines() if line.startswith("shared: ")]
    assert any("q_proj stores what k_proj, v_proj reads too" in line for line in lines)
    shared = [layer for layer in plan.layers if layer.owner or layer.name in owners.values()]
    after = sum(int(line.partition("-> ")[2].split()[0].replace(",", "")) for line in lines)
    assert after == sum(layer.bytes_after for layer in shared)


def test_a_plan_without_sharing_shows_none(workspace):
    plan = compress.plan(recipe(workspace, method=CoSpaDi(share="none", keep=0.9))).plan
    assert not any(layer.owner for layer in plan.layers)
    assert not any(line.startswith("shared: ") for line in plan.lines())


def test_a_report_names_who_stores_and_counts_bits_of_all_together(job):
    report = compress.run(job)
    layers = {layer.name: layer for layer in report.layers}
    bits = report.bits_by_layer()
    readers = [layer for layer in report.layers if layer.stored_with]
    assert readers
    for layer in readers:
        owner = layers[layer.stored_with]
        group = [owner, *(one for one in readers if one.stored_with == owner.name)]
        n_bytes = sum(one.bytes_after for one in group)
        n_weights = sum(one.shape[0] * one.shape[1] for one in group)
        assert bits[layer.name] == bits[owner.name] == 8 * n_bytes / n_weights
        assert layer.bits_per_weight < bits[layer.name] < owner.bits_per_weight
    alone = [name for name, layer in layers.items() if bits[name] == layer.bits_per_weight]
    assert alone
    assert "have the bits per weight of all together" in model_card(report)
