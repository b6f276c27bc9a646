"""Exports for MLX, read back by a few plain lines: no test here needs MLX."""

import json
from dataclasses import replace
from math import prod

import pytest
import torch
from exported import IDS, compressed, export, logits, quantised
from families import save_tiny
from safetensors.torch import load_file
from workspaces import recipe

import compress
from compress.bases import open_base
from compress.errors import CheckpointError, RecipeError
from compress.exports.load import load_export
from compress.exports.mlx.architectures import complete
from compress.exports.mlx.tensors import mlx_tensors
from compress.exports.storage import AdapterRanks
from compress.forms.int8 import Int8
from compress.forms.low_rank import LowRank
from compress.forms.quantised import Quantised
from compress.forms.sum import Sum
from compress.methods.eora import EoRA
from compress.methods.gptq import GPTQ
from compress.methods.rtn import RTN

HALF = torch.float16.itemsize
KINDS = ("symmetric", "asymmetric", "affine")


def form_of(kind, bits=4, group_size=32, shape=(8, 128)):
    """Scales of few digits, as the solvers choose them; every third negative."""
    torch.manual_seed(bits)
    o, n_groups = shape[0], -(-shape[1] // group_size)
    scales = torch.randint(33, 64, (o, n_groups)) / 4096
    scales[::3] *= -1
    codes = torch.randint(0, 1 << bits, shape)
    zeros = None if kind == "symmetric" else torch.randint(0, 1 << bits, (o, n_groups))
    grid = {"bits": bits, "group_size": group_size}
    if kind != "affine":
        return Quantised.from_codes(codes, scales, zeros, **grid)
    return Quantised.from_codes(codes, scales, None, **grid).with_offsets(
        torch.randint(-127, 128, (o, n_groups)) / 512
    )


def plain(tensors, bits):
    """The weight, number by number: scales * code + biases, each row's codes one stream of bits."""
    words, scales, biases = (tensors[part] for part in ("weight", "scales", "biases"))
    rows = []
    for word_row, scale_row, bias_row in zip(words, scales.double(), biases.double(), strict=True):
        number = sum(int(word) << (32 * k) for k, word in enumerate(word_row.tolist()))
        n = len(word_row) * 32 // bits
        size = n // len(scale_row)
        codes = [number >> (bits * k) & ((1 << bits) - 1) for k in range(n)]
        rows.append(
            [scale_row[k // size] * code + bias_row[k // size] for k, code in enumerate(codes)]
        )
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_the_three_tensors_mean_the_weight_to_an_independent_reader(bits, kind):
    form = form_of(kind, bits)
    tensors = mlx_tensors("up", form, torch.bfloat16, 4)
    assert tensors["weight"].dtype == torch.uint32
    assert torch.equal(plain(tensors, bits).float(), form.dense())


@pytest.mark.parametrize(("group_size", "stored"), [(32, 32), (64, 64), (96, 32), (256, 128)])
def test_scales_of_groups_that_mlx_lacks_are_repeated(group_size, stored):
    form = form_of("symmetric", group_size=group_size, shape=(8, 3 * 256))
    tensors = mlx_tensors("up", form, torch.float16, HALF)
    assert 3 * 256 // tensors["scales"].shape[1] == stored
    assert torch.equal(plain(tensors, 4).float(), form.dense())


def test_rows_of_8_bits_are_a_grid_too():
    codes = torch.arange(-128, 128).repeat(2, 1).to(torch.int8)
    form = Int8(codes, torch.tensor([0.25, 2.0]).half())
    tensors = mlx_tensors("model.embed_tokens", form, torch.bfloat16, HALF)
    assert tensors["scales"].shape == (2, 2)
    assert torch.equal(plain(tensors, 8).float(), form.dense())


@pytest.mark.parametrize(
    ("kind", "bits", "dtypes"),
    [
        ("symmetric", 8, {torch.bfloat16}),
        ("affine", 8, {torch.bfloat16}),
        ("asymmetric", 4, {torch.float16}),
        ("asymmetric", 8, {torch.bfloat16, torch.float32}),
    ],
)
def test_numbers_have_the_models_dtype_unless_it_would_change_them(kind, bits, dtypes):
    tensors = mlx_tensors("up", form_of(kind, bits), torch.bfloat16, 4)
    assert {tensors[part].dtype for part in ("scales", "biases")} == dtypes


def test_numbers_that_nothing_planned_holds_are_refused_by_the_layers_name():
    with pytest.raises(
        CheckpointError, match=r"blocks\.7\.up: neither bf16 nor fp16 holds its scales"
    ):
        mlx_tensors("blocks.7.up", form_of("asymmetric", 8), torch.bfloat16, HALF)


def with_ranks(*ranks):
    """Forms with a correction of one rank after the other, and 3 bits beside 4."""
    turn = iter(range(1000))

    def make(name, weight):
        k = next(turn)
        base = quantised(weight, bits=3 if "down_proj" in name else 4)
        rank = ranks[k % len(ranks)]
        if not rank:
            return base
        torch.manual_seed(k)
        up, down = torch.randn(weight.shape[0], rank) / 8, torch.randn(rank, weight.shape[1]) / 8
        return Sum([base, LowRank.from_factors(up.half(), down.half())])

    return make


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    made = compressed(folder / "source", make_form=with_ranks(0, 2, 5))
    return made, export(made, folder / "out", "mlx")


def test_the_grid_of_every_layer_that_differs_stands_in_the_config(mixed):
    _, folder = mixed
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    own = {name: grid for name, grid in config["quantization"].items() if isinstance(grid, dict)}
    assert config["quantization"]["bits"] == 4
    assert {name.rpartition(".")[2] for name in own} == {"down_proj"}
    assert len(own) == config["num_hidden_layers"]
    assert all(grid == {"group_size": 32, "bits": 3, "mode": "affine"} for grid in own.values())


def test_an_adapter_has_one_rank_and_adds_what_the_corrections_do(mixed):
    made, folder = mixed
    parameters = json.loads((folder / "adapters" / "adapter_config.json").read_text())[
        "lora_parameters"
    ]
    factors = load_file(folder / "adapters" / "adapters.safetensors")
    assert parameters["rank"] == 5
    assert parameters["scale"] == 1.0
    assert {
        value.shape[1 if name.endswith("lora_a") else 0] for name, value in factors.items()
    } == {5}
    found = {name.rpartition(".")[0] for name in factors}
    assert {name.split(".", 3)[3] for name in found} == set(parameters["keys"])
    for name, layer in made.layers.items():
        assert (name in found) == isinstance(layer.form, Sum)
        if name in found:
            product = factors[f"{name}.lora_a"].float() @ factors[f"{name}.lora_b"].float()
            assert torch.allclose(product.T, layer.form.terms[1].dense(), atol=1e-6)


def test_what_is_read_back_gives_the_logits_of_mixed_bits_and_ranks(mixed):
    made, folder = mixed
    assert torch.allclose(logits(load_export(folder)), made.logits(), atol=1e-5)


def test_nothing_but_the_model_lies_beside_the_config_as_safetensors(mixed):
    _, folder = mixed
    assert all(path.name.startswith("model") for path in folder.glob("*.safetensors"))


def test_transformers_refuses_the_folder_without_the_toolkit(mixed):
    from transformers import AutoModelForCausalLM

    with pytest.raises((ValueError, RuntimeError)):
        AutoModelForCausalLM.from_pretrained(mixed[1])


def test_the_config_says_what_mlx_lm_would_fill_in_otherwise(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    save_tiny(tmp_path, "llama", rope_parameters=rope, tie_word_embeddings=False)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = complete(config, tmp_path)
    assert found["tie_word_embeddings"] is False
    assert found["rope_theta"] == 5e5
    assert found["rope_scaling"]["type"] == "llama3"
    assert found["rope_scaling"]["factor"] == 8.0


def replaced(workspace, family, **sizes):
    for path in (workspace / "model").iterdir():
        path.unlink()
    save_tiny(workspace / "model", family, **sizes)
    return workspace


def test_an_architecture_that_mlx_lm_was_not_seen_to_run_is_refused_by_name(workspace):
    job = recipe(replaced(workspace, "opt"), method=GPTQ(group_size=32), export=("mlx",))
    with pytest.raises(RecipeError, match=r"mlx cannot hold .*its architecture, opt, is none"):
        compress.plan(job)


def test_a_window_that_mlx_lm_does_not_have_is_told_at_plan(workspace):
    job = recipe(replaced(workspace, "mistral"), method=GPTQ(group_size=16), export=("mlx",))
    with pytest.raises(RecipeError, match="groups of 16; MLX has groups of 32, 64 and 128"):
        compress.plan(job)
    job = recipe(workspace, method=GPTQ(group_size=32), export=("mlx",))
    assert "attention sees the last 8 tokens" in " ".join(compress.plan(job).plan.warnings)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("method", [RTN(group_size=32), EoRA(rank=3, base=RTN(group_size=32))])
@pytest.mark.usefixtures("quick_verification")
def test_experts_lie_in_stacks_and_are_read_back_from_them(workspace, family, method):
    sizes = {"hidden_size": 32, "moe_intermediate_size": 32, "num_key_value_heads": 4}
    job = recipe(replaced(workspace, family, **sizes), method=method, export=("mlx",))
    planned = compress.plan(job).plan.written_bytes("mlx")
    compress.run(job)
    tensors = load_file(workspace / "out" / "model.safetensors")
    stacks = {name for name in tensors if name.endswith(".switch_mlp.gate_proj.scales")}
    assert len(stacks) == 3
    assert all(tensors[name].shape[0] == 4 for name in stacks)
    assert not any(".experts." in name for name in tensors)
    factors = workspace / "out" / "adapters" / "adapters.safetensors"
    if factors.is_file():
        tensors |= load_file(factors)
        assert {value.ndim for name, value in tensors.items() if ".switch_mlp." in name} == {3}
    assert planned == sum(prod(value.shape) * value.dtype.itemsize for value in tensors.values())


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.usefixtures("quick_verification")
def test_embeddings_are_packed_and_a_tied_head_reads_them(workspace, tied):
    replaced(workspace, "llama", tie_word_embeddings=tied, num_key_value_heads=4)
    options = {"embeddings": "8", "head": "8", "method": RTN(group_size=32), "export": ("mlx",)}
    job = recipe(workspace, **options)
    planned = compress.plan(job).plan.written_bytes("mlx")
    compress.run(job)
    tensors = load_file(workspace / "out" / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == torch.uint32
    assert (
        tensors["model.embed_tokens.scales"].dtype == torch.float32
    )  # the model's: lookups have it
    assert ("lm_head.scales" in tensors) != tied
    assert planned == sum(prod(value.shape) * value.dtype.itemsize for value in tensors.values())
    model = load_export(workspace / "out")
    assert model.get_output_embeddings().form.describe().startswith("tied" if tied else "8-bit")
    assert torch.isfinite(model(input_ids=IDS).logits).all()


def test_an_adapter_is_planned_alike_whatever_rank_others_are_padded_to(workspace):
    job = recipe(workspace, export=("gptq", "mlx"))
    plans = [compress.plan(replace(job, adapter_ranks=ranks)).plan for ranks in AdapterRanks]
    assert plans[0].written_bytes("mlx") == plans[1].written_bytes("mlx")
    assert plans[0].written_bytes("gptq") != plans[1].written_bytes("gptq")


def test_a_head_with_a_correction_of_its_own_is_refused_with_what_would_be_right(workspace):
    job = recipe(workspace, head="4", export=("mlx",))
    with pytest.raises(
        RecipeError, match="adapters hold no correction of embeddings or heads; take 8"
    ):
        compress.plan(job)


def test_a_config_that_does_not_fit_the_words_is_refused_by_the_tensors_name(mixed, tmp_path):
    made, _ = mixed
    folder = export(made, tmp_path / "out", "mlx")
    config = json.loads((folder / "config.json").read_text())
    config["quantization"]["bits"] = 8
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"q_proj.weight has 4 words a row .* says 8 bits"):
        open_base(folder).form("model.layers.0.self_attn.q_proj")
