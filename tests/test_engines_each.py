"""Each engine: which exports it is asked for, and what its program is told."""

import json

import pytest
import torch
from safetensors.torch import save_file

from compress.engines import ENGINES
from compress.engines.base import Export, Origin
from compress.exports import EXPORTS
from compress.models.checkpoint import write_json

GPTQ = {"quant_method": "gptq", "bits": 4, "sym": True, "desc_act": False}


def packed(*bits, strategy="group"):
    """The quantisation of a compressed-tensors checkpoint."""
    groups = {
        f"group_{k}": {"weights": {"num_bits": each, "strategy": strategy}}
        for k, each in enumerate(bits)
    }
    return {"quant_method": "compressed-tensors", "config_groups": groups}


def an_export(folder, quantisation=None, **changes):
    config = {} if quantisation is None else {"quantization_config": quantisation}
    options = {
        "format": "dense",
        "folder": folder,
        "traits": EXPORTS["dense"].traits,
        "model": folder,
        "adapter": None,
        "config": config,
        "origin": Origin.ANYBODY,
        "dtype": "float32",
    }
    return Export(**{**options, **changes})


@pytest.mark.parametrize(
    ("engine", "quantisation", "told"),
    [
        ("vllm", None, ""),
        ("vllm", GPTQ, ""),
        ("vllm", GPTQ | {"bits": 3}, "4 or 8 bits"),
        ("vllm", GPTQ | {"sym": False}, "symmetric"),
        ("vllm", GPTQ | {"desc_act": True}, "without act-order"),
        ("openvino", None, ""),
        ("openvino", packed(4, 4), ""),
        ("openvino", packed(4, 8), "4 bits by groups alone"),
        ("openvino", packed(4, strategy="channel"), "4 bits by groups alone"),
        ("openvino", GPTQ, "reads no gptq"),
        ("gptqmodel", GPTQ | {"bits": 3}, ""),
    ],
)
def test_an_engine_tells_which_quantisations_it_refuses(tmp_path, engine, quantisation, told):
    problem = ENGINES[engine].problem(an_export(tmp_path, quantisation))
    assert told in problem
    assert bool(problem) == bool(told)


@pytest.mark.parametrize(
    ("engine", "quantisation", "modules"),
    [
        ("transformers", None, {"transformers"}),
        ("transformers", packed(4), {"transformers", "compressed_tensors"}),
        ("gptqmodel", GPTQ, {"transformers", "gptqmodel", "optimum"}),
        ("openvino", packed(4), {"openvino", "transformers", "compressed_tensors"}),
        ("vllm", GPTQ, {"vllm"}),
    ],
)
def test_an_engine_needs_the_packages_of_the_quantisation(tmp_path, engine, quantisation, modules):
    assert set(ENGINES[engine].modules(an_export(tmp_path, quantisation))) == modules


@pytest.mark.parametrize("engine", EXPORTS["dense"].traits.engines)
def test_a_request_is_json(tmp_path, engine):
    request = ENGINES[engine].request(an_export(tmp_path))
    assert json.loads(json.dumps(request)) == request


def test_vllm_computes_packed_weights_in_sixteen_bits(tmp_path):
    vllm = ENGINES["vllm"]
    assert vllm.request(an_export(tmp_path))["dtype"] == "float32"
    assert vllm.request(an_export(tmp_path, GPTQ))["dtype"] == "bfloat16"
    assert vllm.request(an_export(tmp_path, GPTQ, dtype="float16"))["dtype"] == "float16"
    assert vllm.request(an_export(tmp_path, packed(8, 4)))["bits"] == [4, 8]


@pytest.mark.parametrize(("ranks", "asked"), [((4,), 8), ((8, 20), 32), ((600,), None)])
def test_vllm_is_told_the_least_rank_that_it_knows(tmp_path, ranks, asked):
    pattern = {f"layer{k}": rank for k, rank in enumerate(ranks[1:])}
    write_json(tmp_path / "adapter_config.json", {"r": ranks[0], "rank_pattern": pattern})
    export = an_export(tmp_path, adapter=tmp_path)
    assert bool(ENGINES["vllm"].problem(export)) == (asked is None)
    if asked is not None:
        assert ENGINES["vllm"].request(export)["rank"] == asked


def test_factors_that_vllm_rounds_widen_its_bound(tmp_path):
    answer = {"dtype": "torch.bfloat16"}
    with_adapter = an_export(tmp_path, adapter=tmp_path)
    assert ENGINES["vllm"].arithmetic(an_export(tmp_path), answer).weights == "float32"
    assert ENGINES["vllm"].arithmetic(with_adapter, answer).weights == "bfloat16"


def test_transformers_expands_codes_with_zero_points_and_below_an_adapter(tmp_path):
    engine, answer = ENGINES["transformers"], {"dtype": "float32"}
    zeros = {"config_groups": {"group_0": {"weights": {"num_bits": 4, "symmetric": False}}}}
    for export, expanded in (
        (an_export(tmp_path, packed(4)), False),
        (an_export(tmp_path, packed(4), adapter=tmp_path), True),
        (an_export(tmp_path, packed(4) | zeros), True),
        (an_export(tmp_path, GPTQ, adapter=tmp_path), False),
    ):
        assert engine.request(export)["expand"] == expanded
        weights = engine.arithmetic(export, answer).weights
        assert weights == ("float16" if expanded else "float32")


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        (("weight_packed", "weight_scale"), ""),
        (("weight",), "experts are not quantised"),
        (("weight_packed", "weight_zero_point"), "no experts with zero points"),
    ],
)
def test_transformers_refuses_experts_that_it_does_not_load(tmp_path, parts, told):
    names = [f"model.layers.0.mlp.experts.1.up_proj.{part}" for part in parts]
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
    problem = ENGINES["transformers"].problem(an_export(tmp_path, packed(4)))
    assert told in problem
    assert bool(problem) == bool(told)


def test_gptqmodel_expands_codes_in_the_dtype_of_their_scales(tmp_path):
    found = ENGINES["gptqmodel"].arithmetic(an_export(tmp_path, GPTQ), {"dtype": "float32"})
    assert (found.activations, found.weights) == ("float32", "float16")
