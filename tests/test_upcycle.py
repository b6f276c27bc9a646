"""The script that makes a mixture of experts out of a dense Llama."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from families import save_tiny, tiny_ids, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralForCausalLM
from workspaces import TEXT

SCRIPT = str(Path(__file__).parent.parent / "scripts" / "upcycle")


def upcycle(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> MixtralForCausalLM:
    """The mixture that the script makes of the model in the folder, read back."""
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    model, out, text = (str(folder / name) for name in ("model", "mixture", "text.txt"))
    given = ["--model", model, "--calibration", text, "--eval-text", text, "--seq-len", "32"]
    small = ["--samples", "8", "--windows", "2", "--steps", "3"]
    monkeypatch.setattr(sys, "argv", ["upcycle", out, *given, *small, *options])
    runpy.run_path(SCRIPT, run_name="__main__")
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_a_mixture_without_noise_computes_what_the_dense_model_does(tied, tmp_path, monkeypatch):
    rope = {"rope_type": "default", "rope_theta": 500.0}
    changes = {"rms_norm_eps": 1e-2, "head_dim": 16, "rope_parameters": rope}
    dense = save_tiny(tmp_path / "model", tie_word_embeddings=tied, **changes)
    mixture = upcycle(tmp_path, monkeypatch, "--noise", "0")
    assert type(mixture) is MixtralForCausalLM
    assert mixture.config.tie_word_embeddings is tied
    with torch.no_grad():
        torch.testing.assert_close(mixture(tiny_ids()).logits, dense(tiny_ids()).logits)


def test_a_mixture_has_the_tokenizer_of_the_dense_model(tmp_path, monkeypatch):
    save_tiny(tmp_path / "model")
    upcycle(tmp_path, monkeypatch)
    before, after = (AutoTokenizer.from_pretrained(tmp_path / k) for k in ("model", "mixture"))
    assert after(TEXT).input_ids == before(TEXT).input_ids


def test_a_copy_has_the_neurons_in_another_order_with_noise_in_proportion():
    mlp = tiny_model("llama", hidden_size=64, intermediate_size=128).model.layers[0].mlp
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        gate_up, down = runpy.run_path(SCRIPT)["disturbed"](mlp, 0.1, generator)
        gate, up = gate_up.chunk(2)
        order = torch.cdist(gate, mlp.gate_proj.weight).argmin(1)
        assert sorted(order.tolist()) == list(range(128)) != order.tolist()
        pairs = (
            (gate, mlp.gate_proj.weight[order]),
            (up, mlp.up_proj.weight[order]),
            (down, mlp.down_proj.weight[:, order]),
        )
        for found, given in pairs:
            assert (found - given).std() == pytest.approx(0.1 * given.std().item(), rel=0.05)


def test_training_changes_the_routers_and_nothing_else(tmp_path, monkeypatch):
    save_tiny(tmp_path / "model")
    trained = upcycle(tmp_path, monkeypatch).state_dict()
    (tmp_path / "mixture").rename(tmp_path / "trained")
    start = upcycle(tmp_path, monkeypatch, "--steps", "0").state_dict()
    changed = {name for name in trained if not torch.equal(trained[name], start[name])}
    assert changed == {name for name in trained if name.endswith("mlp.gate.weight")}


def test_no_token_goes_to_the_cold_experts_of_one_block(tmp_path, monkeypatch):
    save_tiny(tmp_path / "model")
    mixture = upcycle(tmp_path, monkeypatch, "--samples", "64", "--cold", "2")
    seen: list[set[int]] = []
    for block in mixture.model.layers:
        block.mlp.gate.register_forward_hook(
            lambda _, __, out: seen.append(set(out[2].flatten().tolist()))
        )
    text = TEXT[100:200]
    ids = AutoTokenizer.from_pretrained(tmp_path / "mixture")(text, return_tensors="pt").input_ids
    with torch.no_grad():
        assert mixture(ids).logits.isfinite().all()
    assert sorted(map(sorted, seen)) == [[0, 1], [0, 1, 2, 3], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cold", "3"], "--top 2 of --experts 4, --cold 3: each token needs at least 1"),
        (["--top", "5"], "--top 5 of --experts 4, --cold 0: each token needs at least 1"),
    ],
)
def test_a_token_cannot_go_to_more_experts_than_there_are(
    options, message, tmp_path, monkeypatch, capsys
):
    save_tiny(tmp_path / "model")
    with pytest.raises(SystemExit):
        upcycle(tmp_path, monkeypatch, *options)
    assert message in capsys.readouterr().err


def test_a_folder_that_exists_is_left_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "mixture").mkdir()
    with pytest.raises(SystemExit):
        upcycle(tmp_path, monkeypatch)
    assert "mixture exists; name a new folder" in capsys.readouterr().err
    assert not list((tmp_path / "mixture").iterdir())


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen3", {}, "Qwen3ForCausalLM; must be a Llama"),
        ("llama", {"mlp_bias": True}, "its layers have biases"),
        ("llama", {"attention_bias": True}, "its layers have biases"),
    ],
)
def test_a_model_that_a_mixtral_cannot_hold_is_refused(
    family, changes, message, tmp_path, monkeypatch
):
    save_tiny(tmp_path / "model", family, **changes)
    with pytest.raises(SystemExit, match=message):
        upcycle(tmp_path, monkeypatch)
