"""A head of its own in a checkpoint whose config.json ties the head to the embeddings."""

import json

import pytest
import torch
from families import save_tiny, tiny_ids, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from workspaces import recipe

import compress
from calibration.errors import InputError
from calibration.skeleton import PartLoader, build_skeleton, open_parts
from compress.exports import EXPORTS
from compress.exports.load import load_export
from compress.methods.rtn import RTN
from compress.models.resolve import SourceModel

pytestmark = pytest.mark.usefixtures("quick_verification")
CPU = torch.device("cpu")
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def tied_config(**changes):
    return tiny_model("llama", tie_word_embeddings=True, **changes).config


def tensors(head=1.5):
    """Those of a tied model, and a head that is so many times the embeddings."""
    found = dict(tiny_model("llama", tie_word_embeddings=True).state_dict())
    return found | {HEAD: found[EMBEDDINGS] * head}


def loaded(loader):
    loader.load([""], CPU)
    loader.load_outside("model.layers.", CPU)
    with torch.no_grad():
        return loader.model(tiny_ids()).logits


@pytest.mark.parametrize("text", [HEAD, EMBEDDINGS])
def test_a_loader_keeps_a_head_that_is_not_the_embeddings(text):
    loader = open_parts(tied_config(), torch.float32, tensors())
    assert loader.model.config.tie_word_embeddings is False
    logits = loaded(loader)
    assert torch.equal(loader.model.get_parameter(text), tensors()[text])
    same = tiny_model("llama", tie_word_embeddings=False)
    same.load_state_dict(tensors())
    torch.testing.assert_close(logits, same(tiny_ids()).logits)


def test_a_loader_of_another_checkpoint_into_a_tied_model_keeps_its_head():
    skeleton = build_skeleton(tied_config(), torch.float32)
    tied = {name: tensor for name, tensor in tensors().items() if name != HEAD}
    own, original = PartLoader(skeleton, tensors()), PartLoader(skeleton, tied)
    for loader, factor in ((original, 1.0), (own, 1.5), (original, 1.0)):
        loader.load_outside("model.layers.", CPU)
        assert torch.equal(skeleton.lm_head.weight, tied[EMBEDDINGS] * factor)
        loader.unload_outside("model.layers.")


def test_a_head_that_is_the_embeddings_written_twice_stays_tied():
    loader = open_parts(tied_config(), torch.float32, tensors(head=1.0))
    assert loader.model.config.tie_word_embeddings is True
    loaded(loader)
    assert loader.model.lm_head.weight is loader.model.model.embed_tokens.weight


def test_ties_of_which_some_hold_are_refused_by_name(monkeypatch):
    ties = {HEAD: EMBEDDINGS, "model.norm.weight": "model.layers.0.input_layernorm.weight"}
    monkeypatch.setattr(LlamaForCausalLM, "_tied_weights_keys", ties)
    found = {name: tensor for name, tensor in tensors().items() if name != "model.norm.weight"}
    with pytest.raises(
        InputError, match=r"ties lm_head\.weight, model\.norm.*stores lm_head\.weight"
    ):
        open_parts(tied_config(), torch.float32, found)


@pytest.mark.parametrize("export", ["dense", "native"])
def test_a_compressed_model_has_the_head_of_its_original(workspace, export):
    save_tiny(workspace / "model", num_key_value_heads=4, tie_word_embeddings=False)
    path = workspace / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    report = compress.run(recipe(workspace, method=RTN(bits=8, group_size=32), export=(export,)))
    assert report.exports[0].relative_difference < 1e-5
    assert any("a head that is not" in note for note in report.notes)
    original = AutoModelForCausalLM.from_pretrained(workspace / "model")
    found = load_export(workspace / "out")
    head = load_file(workspace / "model" / "model.safetensors")[HEAD]
    assert torch.equal(found.lm_head.weight, head)
    a, b = found(tiny_ids()).logits, original(tiny_ids()).logits
    assert (a - b).norm() / b.norm() < 0.05
    config = json.loads((workspace / "out" / "config.json").read_text())
    assert config.get("base_config", config)["tie_word_embeddings"] is False


def test_the_config_of_a_tower_is_told_too(workspace):
    path = workspace / "model" / "config.json"
    text = {"tie_word_embeddings": True, "hidden_size": 8}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"text_config": text}))
    source = SourceModel("model", workspace / "model", None, (), None).with_own_head()
    (workspace / "out").mkdir()
    config = EXPORTS["dense"](workspace / "out", source).base_config()
    assert config["tie_word_embeddings"] is False
    assert config["text_config"] == {"tie_word_embeddings": False, "hidden_size": 8}


def test_a_tied_checkpoint_that_keeps_the_head_alone_is_compressed(workspace):
    save_tiny(workspace / "model", num_key_value_heads=4, tie_word_embeddings=True)
    path = workspace / "model" / "model.safetensors"
    found = load_file(path)
    found[HEAD] = found.pop(EMBEDDINGS)
    save_file(found, path, {"format": "pt"})
    report = compress.run(recipe(workspace, method=RTN(bits=8, group_size=32), export=("dense",)))
    assert report.exports[0].relative_difference < 1e-5
    written = load_file(workspace / "out" / "model.safetensors")
    assert HEAD not in written
    assert torch.equal(written[EMBEDDINGS], found[HEAD])
