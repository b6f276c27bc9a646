import copy

import pytest
import torch
from families import FAMILIES, tiny_ids, tiny_model

from calibration.errors import InputError
from calibration.experts.module import experts_in
from calibration.propagation import Propagate
from calibration.skeleton import PartLoader, build_skeleton, decoder_blocks
from calibration.statistics.gram import Gram
from calibration.stream import Stream
from calibration.text.data import Tokens
from calibration.walk import walk

CPU = torch.device("cpu")
GRAM = frozenset({Gram})


def walker(model, ids, mask=None, tensors=None, memory_bytes=1 << 30, batch=2):
    """A skeleton of the model, its loader, and the stream of the tokens."""
    skeleton = build_skeleton(model.config, torch.float32)
    prefix, blocks = decoder_blocks(skeleton)
    loader = PartLoader(skeleton, model.state_dict() if tensors is None else tensors)
    loader.load_outside(prefix + ".", CPU)
    batches = [
        Tokens(
            input_ids=ids[k : k + batch],
            attention_mask=None if mask is None else mask[k : k + batch],
            provenance={},
        )
        for k in range(0, len(ids), batch)
    ]
    return loader, Stream(skeleton, blocks, batches, memory_bytes)


@pytest.mark.parametrize("padded", ["full", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_walk_equals_the_plain_forward(family, padded):
    model, ids = tiny_model(family), tiny_ids()
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    mask = mask if padded == "padded" else None
    loader, stream = walker(model, ids, mask)
    for _ in walk(stream, loader, propagate=Propagate.BLOCK, device=CPU):
        pass
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
    # Products of an expert's few tokens round otherwise beside others, and with several threads.
    bound = 1e-5 if dict(experts_in(loader.model)) else 0.0
    torch.testing.assert_close(stream.predictions(0), expected, rtol=0, atol=bound)


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "qwen3_moe", "mixtral", "gpt_oss", "llama4_text"]
)
def test_a_checkpoint_on_disk_loads_block_by_block_under_its_own_names(family, tmp_path):
    from safetensors.torch import load_file

    model, ids = tiny_model(family), tiny_ids()
    model.save_pretrained(tmp_path)
    loader, stream = walker(model, ids, tensors=load_file(tmp_path / "model.safetensors"))
    for _ in walk(stream, loader, propagate=Propagate.BLOCK, device=CPU):
        pass
    # The model's own experts multiply by gate and up at once, and round otherwise.
    bound = 1e-5 if dict(experts_in(loader.model)) else 0.0
    with torch.no_grad():
        torch.testing.assert_close(stream.predictions(0), model(ids).logits, rtol=0, atol=bound)


def test_gpt2_keys_without_the_model_prefix_are_found():
    model, ids = tiny_model("gpt2"), tiny_ids()
    bare = {
        name.removeprefix("transformer."): tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("lm_head")
    }
    loader, stream = walker(model, ids, tensors=bare)
    for _ in walk(stream, loader, propagate=Propagate.BLOCK, device=CPU):
        pass
    with torch.no_grad():
        assert torch.equal(stream.predictions(0), model(ids).logits)


def test_layers_that_read_the_same_tensor_share_one_statistic():
    loader, stream = walker(tiny_model("llama"), tiny_ids())
    block = next(walk(stream, loader, propagate=Propagate.BLOCK, device=CPU))
    groups = [
        [name.rpartition(".")[2] for name in shared.names]
        for shared in block.observe(frozenset(block.layers), GRAM)
    ]
    assert groups == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


def test_padding_never_counts():
    model, ids = tiny_model("llama"), tiny_ids()
    mask = torch.ones_like(ids)
    mask[:, 10:] = 0
    grams = []
    for tokens, padding in ((ids, mask), (ids[:, :10], None)):
        loader, stream = walker(model, tokens, padding)
        block = next(walk(stream, loader, propagate=Propagate.BLOCK, device=CPU))
        grams.append(block.observe(frozenset(block.layers), GRAM)[0].stats[Gram])
    assert grams[0].n_tokens == grams[1].n_tokens == 20
    torch.testing.assert_close(grams[0].sum_ii, grams[1].sum_ii)


def test_without_propagation_later_blocks_see_what_the_original_gives():
    model, ids = tiny_model("llama"), tiny_ids()
    seen = {}
    for propagate in Propagate:
        # Of its own: the loader may hand out the very tensors that it is given.
        loader, stream = walker(model, ids, tensors=copy.deepcopy(model.state_dict()))
        for block in walk(stream, loader, propagate=propagate, device=CPU):
            seen[propagate] = block.observe(frozenset(block.layers), GRAM)[0].stats[Gram].sum_ii
            for layer in block.layers.values():
                layer.weight.data.zero_()
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[2]
        normed = model.model.layers[2].input_layernorm(hidden).reshape(-1, 32).double()
    torch.testing.assert_close(seen[Propagate.NONE], normed.T @ normed, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(seen[Propagate.BLOCK], seen[Propagate.NONE])


@pytest.mark.parametrize("propagate", [Propagate.NONE, Propagate.BLOCK])
def test_blocks_that_are_loaded_together_see_what_they_see_one_by_one(propagate):
    model, ids = tiny_model("llama"), tiny_ids()
    seen, predictions = [], []
    for at_once in (1, 2):
        loader, stream = walker(model, ids)
        seen.append({})
        for block in walk(stream, loader, propagate=propagate, device=CPU, at_once=at_once):
            for shared in block.observe(frozenset(block.layers), GRAM):
                seen[-1][shared.names] = shared.stats[Gram].sum_ii
        predictions.append(stream.predictions(0))
    assert list(seen[0]) == list(seen[1])
    assert all(torch.equal(seen[0][names], seen[1][names]) for names in seen[0])
    assert torch.equal(*predictions)


def test_a_layer_of_any_of_several_blocks_can_be_replaced():
    model, ids = tiny_model("llama"), tiny_ids()
    loader, stream = walker(model, ids)
    for block in walk(stream, loader, propagate=Propagate.BLOCK, device=CPU, at_once=2):
        for name in [name for name in block.layers if name.endswith("down_proj")]:
            block.replace(name, torch.nn.Linear(64, 32, bias=False))
    replaced = [type(each.mlp.down_proj) for each in stream.blocks]
    assert replaced == [torch.nn.Linear] * 3
    assert not any(each.mlp.down_proj.weight.is_meta for each in model.model.layers)


def test_activations_beyond_the_memory_limit_go_to_disk_and_come_back_equal():
    model, ids = tiny_model("llama"), tiny_ids(n_sequences=6)
    results = []
    for memory_bytes in (1 << 30, 5000):
        loader, stream = walker(model, ids, memory_bytes=memory_bytes)
        for _ in walk(stream, loader, propagate=Propagate.BLOCK, device=CPU):
            pass
        results.append(torch.cat([stream.predictions(k) for k in range(3)]))
    assert torch.equal(*results)


def test_a_block_is_freed_when_the_walk_moves_on():
    loader, stream = walker(tiny_model("llama"), tiny_ids())
    for block in walk(stream, loader, propagate=Propagate.BLOCK, device=CPU):
        held = [k for k, b in enumerate(stream.blocks) if not next(b.parameters()).is_meta]
        assert held == [block.index]


def test_nan_in_the_inputs_is_an_error_with_the_layers_name():
    model = tiny_model("llama")
    model.model.embed_tokens.weight.data[5] = float("nan")
    loader, stream = walker(model, torch.full((2, 8), 5))
    block = next(walk(stream, loader, propagate=Propagate.BLOCK, device=CPU))
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.q_proj.*NaN"):
        block.observe(frozenset(block.layers), GRAM)


def test_a_missing_weight_is_refused_by_name():
    model = tiny_model("llama")
    tensors = dict(model.state_dict())
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        walker(model, tiny_ids(), tensors=tensors)
