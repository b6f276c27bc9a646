"""Checkpoints of mixtures that are damaged, or of another configuration: refused by the name of what is wrong."""

import pytest
import torch
from families import tiny_model
from safetensors.torch import load_file
from test_walk import CPU

from calibration.errors import InputError
from calibration.skeleton import open_parts

OWN = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
LAYER = "model.layers.1.mlp.experts.2.gate_proj.weight"
STACK = "model.layers.1.mlp.experts.gate_up_proj"


def on_disk(folder, family):
    model = tiny_model(family)
    model.save_pretrained(folder)
    return model.config, load_file(folder / "model.safetensors")


def refusal(config, tensors):
    with pytest.raises(InputError) as raised:
        open_parts(config, torch.float32, tensors).load([""], CPU)
    return str(raised.value)


def test_a_checkpoint_that_lacks_an_experts_tensor_is_refused_with_the_layer(tmp_path):
    config, tensors = on_disk(tmp_path, "mixtral")
    del tensors[OWN]
    assert refusal(config, tensors) == f"model: the checkpoint lacks the weights {LAYER}"


@pytest.mark.parametrize("change", [lambda w: w[1:], lambda w: w.T, lambda w: w[None]])
def test_a_tensor_of_one_expert_in_another_shape_is_refused_with_both_shapes(tmp_path, change):
    config, tensors = on_disk(tmp_path, "mixtral")
    tensors[OWN] = change(tensors[OWN])
    said = refusal(config, tensors)
    assert OWN in said
    assert f"{tuple(tensors[OWN].shape)}, but config.json makes it (64, 32)" in said


def test_more_experts_than_the_configuration_has_are_refused(tmp_path):
    config, tensors = on_disk(tmp_path, "mixtral")
    config.num_local_experts = 3
    assert "has no place for the checkpoint's" in refusal(config, tensors)
    assert ".experts.3." in refusal(config, tensors)


def test_fewer_experts_than_the_configuration_has_are_refused(tmp_path):
    config, tensors = on_disk(tmp_path, "mixtral")
    config.num_local_experts = 5
    assert "lacks the weights" in refusal(config, tensors)
    assert ".experts.4." in refusal(config, tensors)


@pytest.mark.parametrize("change", [lambda w: w[:3], lambda w: w.mT, lambda w: w[:, 0]])
def test_a_stack_in_another_shape_is_refused_with_both_shapes(tmp_path, change):
    config, tensors = on_disk(tmp_path, "gpt_oss")
    tensors[STACK] = change(tensors[STACK])
    said = refusal(config, tensors)
    assert f"{STACK}: its shape" in said
    assert f"{tuple(tensors[STACK].shape)}, but config.json makes it (4, 32, 128)" in said


def test_a_stack_of_biases_in_another_shape_is_refused_with_both_shapes(tmp_path):
    config, tensors = on_disk(tmp_path, "gpt_oss")
    tensors[f"{STACK}_bias"] = tensors[f"{STACK}_bias"][:, 1:]
    said = refusal(config, tensors)
    assert f"{STACK}_bias: its shape" in said
    assert "(4, 127), but config.json makes it (4, 128)" in said


def test_a_stack_that_is_missing_is_refused_with_the_layers_that_it_holds(tmp_path):
    config, tensors = on_disk(tmp_path, "gpt_oss")
    del tensors[STACK]
    assert f"lacks the weights {LAYER}".replace(".2.", ".0.") in refusal(config, tensors)
