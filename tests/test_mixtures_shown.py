"""What plans and inspections show of mixtures of experts: kinds of weights, experts of a layer together."""

import pytest
import yaml
from families import save_tiny
from workspaces import recipe

import compress
from calibration.experts.routing import Routing
from compress.callbacks import no_progress
from compress.cli.main import main
from compress.exports.base import EXPORTS
from compress.inspection.checkpoint import inspect
from compress.inspection.tables import kind_cells, layer_cells, mixture_line
from compress.methods.gptq import GPTQ
from compress.methods.svd_llm import SVDLLM
from compress.models.kinds import Kind, expert_of, has_experts, kind_of, leaf_of
from compress.planning.mixtures import STATISTICS, mixture_lines
from compress.planning.rows import Rows, spread

N_EXPERTS, N_BLOCKS = 4, 3
INNER = 32
EXPERT = INNER * 32
"""Weights of one projection of an expert."""


@pytest.fixture
def mixture(workspace):
    """A tiny mixture whose first block has a dense MLP, in the place of the workspace's model."""
    save_tiny(workspace / "moe", "qwen3_moe", mlp_only_layers=[0], moe_intermediate_size=INNER)
    return workspace


def planned(workspace, **changes):
    options = {"model": str(workspace / "moe"), "method": GPTQ(group_size=32), **changes}
    return compress.plan(recipe(workspace, **options))


KINDS = {
    "model.layers.3.self_attn.q_proj": Kind.ATTENTION,
    "model.layers.3.linear_attn.in_proj.weight": Kind.ATTENTION,
    "transformer.h.0.attn.c_attn": Kind.ATTENTION,
    "model.layers.0.mlp.gate_proj": Kind.MLP,
    "model.layers.0.feed_forward.w1": Kind.MLP,
    "model.layers.3.mlp.shared_experts.gate_proj": Kind.SHARED,
    "model.layers.3.feed_forward.shared_expert.up_proj": Kind.SHARED,
    "model.layers.3.shared_mlp.input_linear": Kind.SHARED,
    "model.layers.3.mlp.experts.17.gate_proj": Kind.EXPERTS,
    "model.layers.3.block_sparse_moe.experts.0.w1.weight": Kind.EXPERTS,
    "model.layers.3.mlp.experts.gate_up_proj": Kind.EXPERTS,
    "model.layers.3.mlp.gate.weight": Kind.ROUTERS,
    "model.layers.3.mlp.gate.e_score_correction_bias": Kind.ROUTERS,
    "model.layers.3.mlp.router.weight": Kind.ROUTERS,
    "model.layers.3.mlp.shared_expert_gate": Kind.ROUTERS,
    "model.embed_tokens.weight": Kind.TABLES,
    "lm_head.weight": Kind.TABLES,
    "model.layers.3.post_attention_layernorm.weight": Kind.OTHER,
    "model.layers.3.self_attn.q_norm.weight": Kind.OTHER,
    "model.layers.3.mamba.in_proj.weight": Kind.OTHER,
}


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_a_name_tells_what_a_weight_is_for(name, kind):
    assert kind_of(name) is kind


def test_a_name_tells_whose_layer_it_is():
    found = expert_of("model.layers.3.mlp.experts.17.gate_proj")
    assert (found.module, found.number, found.layer) == (
        "model.layers.3.mlp.experts",
        17,
        "gate_proj",
    )
    assert found.block == 3
    assert found.pattern == "model.layers.3.mlp.experts.*.gate_proj"
    for name in ("model.layers.3.mlp.shared_experts.up_proj", "model.layers.3.mlp.up_proj"):
        assert expert_of(name) is None
    assert not has_experts(["model.layers.3.mlp.up_proj"])


def test_leaves_of_experts_shared_experts_and_dense_layers_are_three():
    names = ("mlp.experts.1.up_proj", "mlp.shared_experts.up_proj", "mlp.up_proj")
    leaves = [leaf_of(f"model.layers.3.{name}") for name in names]
    assert leaves == ["experts.up_proj", "shared_experts.up_proj", "up_proj"]


def test_experts_of_all_layers_are_one_line_of_a_plan_apart_from_dense_layers(mixture):
    lines = planned(mixture).lines()
    n_layers = (N_BLOCKS - 1) * N_EXPERTS
    (experts,) = [line for line in lines if " x experts.gate_proj" in line]
    n_bytes = f"{n_layers * EXPERT * 4:,}"
    assert experts.split()[:7] == [
        str(n_layers),
        "x",
        "experts.gate_proj",
        "32",
        "x",
        "32",
        n_bytes,
    ]
    (dense,) = [line for line in lines if " x gate_proj" in line]
    assert dense.split()[:6] == ["1", "x", "gate_proj", "64", "x", "32"]


def test_bytes_by_kind_are_those_of_the_whole_checkpoint(mixture):
    plan = planned(mixture, embeddings="8", head="8").plan
    kinds = plan.bytes_by_kind()
    assert sum(before for before, _ in kinds.values()) == plan.bytes_before
    assert sum(after for _, after in kinds.values()) == plan.export_bytes("native")
    layers = [layer for layer in plan.layers if ".experts." in layer.name]
    assert kinds[Kind.EXPERTS] == (
        sum(layer.bytes_before for layer in layers),
        sum(layer.bytes_after for layer in layers),
    )
    assert kinds[Kind.ROUTERS] == (2 * N_EXPERTS * 32 * 4,) * 2
    assert kinds[Kind.MLP][0] == 3 * 64 * 32 * 4
    assert any(line.startswith("bytes by kind ") for line in plan.lines())


def test_a_plan_of_a_model_without_experts_says_nothing_of_them(workspace):
    text = "\n".join(compress.plan(recipe(workspace)).lines())
    assert "experts" not in text
    assert "bytes by kind" not in text


def test_a_plan_says_how_statistics_of_experts_are_collected_and_how_exports_hold_them(mixture):
    names = [layer.name for layer in planned(mixture).plan.layers]
    lines = planned(mixture, moe="all", export=("native", "dense")).lines()
    told = mixture_lines(names, Routing.ALL, ("native", "dense"))
    assert lines[lines.index(told[0]) :][: len(told)] == told


@pytest.mark.parametrize("routing", Routing)
def test_the_lines_on_experts_name_the_option_and_each_export(routing):
    names = [f"model.layers.{b}.mlp.experts.{e}.up_proj" for b in range(3) for e in range(500)]
    assert mixture_lines(names, routing, ("native", "gptq")) == [
        "experts: 1,500 in 3 layers",
        f"statistics of experts (--moe {routing}): {STATISTICS[routing]}",
        f"experts in native: {EXPORTS['native'].experts_text()}",
        f"experts in gptq: {EXPORTS['gptq'].experts_text()}",
    ]
    assert mixture_lines(["model.layers.0.mlp.up_proj"], routing, ("native",)) == []


def test_ranks_of_a_layers_experts_are_one_row_unless_every_layer_is_asked_for(mixture):
    method = SVDLLM(keep=0.6, rank_multiple=1, allocation="spectrum")
    plan = planned(mixture, method=method).plan
    ranks = {layer.name: layer.rank for layer in plan.layers}
    experts = [n for n in ranks if n.startswith("model.layers.1.mlp.experts.") and "gate" in n]
    folded, each = plan.lines(), plan.lines(Rows.EACH)
    row = next(
        line for line in folded if line.startswith("model.layers.1.mlp.experts.*.gate_proj ")
    )
    assert spread([ranks[name] for name in experts]) in row
    assert not any(line.startswith("model.layers.1.mlp.experts.0") for line in folded)
    given = yaml.safe_load(
        "\n".join(each[each.index("method:") : each.index("method:") + 2 + len(ranks)])
    )
    assert given["method"]["ranks"] == [f"{name}={rank}" for name, rank in ranks.items()]


def test_what_the_folded_recipe_leaves_out_is_counted_and_the_rest_repeats_the_plan(mixture):
    method = SVDLLM(keep=0.6, rank_multiple=1, allocation="spectrum")
    plan = planned(mixture, method=method).plan
    lines = plan.lines()
    entries = [line.removeprefix("  - ") for line in lines if line.startswith("  - ")]
    again = planned(mixture, method=SVDLLM(keep=0.6, rank_multiple=1, ranks=tuple(entries))).plan
    given = {entry.rpartition("=")[0] for entry in entries}
    ranks = dict.fromkeys(plan.selected) | {layer.name: layer.rank for layer in plan.layers}
    told = {n for n in ranks if n in given or ((e := expert_of(n)) and e.pattern in given)}
    repeated = {layer.name: layer.rank for layer in again.layers}
    assert {name: ranks[name] for name in told} == {name: repeated.get(name) for name in told}
    n_left_out = len(ranks) - len(told)
    assert n_left_out > 0
    assert any(line.startswith(f"{n_left_out:,} layers of experts have ranks") for line in lines)


def test_the_command_lists_every_expert_where_asked(mixture, capsys):
    words = ["plan", "--model", str(mixture / "moe"), "--method", "svd", "--keep", "0.6"]
    words += ["--rank-multiple", "1", "--allocation", "spectrum", "--calibration"]
    words += [str(mixture / "text.txt"), "--samples", "4", "--seq-len", "32", "--eval-windows", "0"]
    assert main([*words, "--tasks"]) == 0
    assert "experts.2.up_proj" not in capsys.readouterr().out
    assert main([*words, "--tasks", "--layers"]) == 0
    assert "model.layers.1.mlp.experts.2.up_proj=" in capsys.readouterr().out


def test_one_rank_is_told_as_it_is_and_several_by_their_ends_and_mean():
    assert spread([8, 8]) == "8"
    assert spread([8, 16, 12]) == "8-16, mean 12.0"
    assert spread([None]) == "-"


def test_an_inspection_shows_experts_of_a_kind_together_and_bytes_by_kind(mixture, capsys):
    found = inspect(str(mixture / "moe"), progress=no_progress)
    rows = {row[0]: row for row in layer_cells(found, found.layers)}
    assert rows["mlp.experts.up_proj"][1:3] == ("8", "32 x 32")
    assert rows["mlp.up_proj"][1:3] == ("1", "64 x 32")
    assert mixture_line(found) == "8 experts in 2 layers"
    kinds = {row[0]: row[2] for row in kind_cells(found)}
    assert kinds["experts"] == f"{8 * 3 * EXPERT * 4 / 1e3:.1f} kB"
    assert main(["inspect", str(mixture / "moe")]) == 0
    printed = capsys.readouterr().out
    assert "8 experts in 2 layers" in printed
    assert "not compressed: a router, which no server quantises" in printed


def test_an_inspection_of_a_model_without_experts_has_no_kinds(workspace):
    assert kind_cells(inspect(str(workspace / "model"), progress=no_progress)) == []
