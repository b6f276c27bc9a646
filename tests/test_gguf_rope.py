"""Rotary scaling in GGUF files becomes what config.json says of it, or the file is refused by name."""

import json
from pathlib import Path

import pytest
import torch
from gguf_files import tiny_llama, write_gguf
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config

from compress.errors import CheckpointError
from compress.models.gguf_rope import RopeScaling, apply_rope
from compress.models.resolve import resolve_model

FAR = torch.arange(2, 202)[None]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
ODD = [1.0, 1.5, 1.25, 3.0, 2.0, 9.0, 4.0, 16.0]


def scaled(**parameters):
    return tiny_llama(rope_parameters={"rope_theta": 10000.0, **parameters})


def longrope(short, long, original=256, attention_factor=1.0):
    return scaled(
        rope_type="longrope",
        short_factor=short,
        long_factor=long,
        original_max_position_embeddings=original,
        factor=256 / original,
        attention_factor=attention_factor,
    )


def factors_of(model):
    """Those by which a model divides the frequencies of the unscaled one."""
    plain = tiny_llama().model.rotary_emb.inv_freq
    return (plain / model.model.rotary_emb.inv_freq).tolist()


def converted(tmp_path, model, **fields):
    source = resolve_model(
        str(write_gguf(tmp_path / "a.gguf", model, **fields)), tmp_path / "cache"
    )
    found = AutoModelForCausalLM.from_pretrained(source.folder)
    config = json.loads((source.folder / "config.json").read_text())
    return found, config["rope_parameters"]


def same_logits(a, b):
    with torch.no_grad():
        return torch.allclose(a(FAR).logits, b(FAR).logits, atol=1e-5)


def test_factors_of_llama_3_become_its_formula(tmp_path):
    model = scaled(**LLAMA3)
    found, parameters = converted(tmp_path, model, tensors={"rope_freqs.weight": factors_of(model)})
    assert parameters == LLAMA3 | {"rope_theta": 10000.0}
    assert same_logits(found, model)
    assert not same_logits(found, tiny_llama())


def test_factors_of_no_formula_are_written_themselves(tmp_path):
    model = longrope(ODD, ODD)
    found, parameters = converted(tmp_path, model, tensors={"rope_freqs.weight": ODD})
    assert parameters["rope_type"] == "longrope"
    assert parameters["long_factor"] == parameters["short_factor"] == ODD
    assert same_logits(found, model)


def test_factors_for_short_and_for_long_texts_are_told_apart(tmp_path):
    model = longrope([1.0] * 8, ODD, original=64, attention_factor=1.25)
    found, parameters = converted(
        tmp_path,
        model,
        tensors={"rope_factors_short.weight": [1.0] * 8, "rope_factors_long.weight": ODD},
        llama__rope__scaling__original_context_length=64,
        llama__rope__scaling__attn_factor=1.25,
    )
    assert parameters["original_max_position_embeddings"] == 64
    with torch.no_grad():
        for n in (32, 200):
            assert torch.allclose(found(FAR[:, :n]).logits, model(FAR[:, :n]).logits, atol=1e-5)


def test_factors_that_are_all_one_change_nothing(tmp_path):
    found, parameters = converted(tmp_path, tiny_llama(), tensors={"rope_freqs.weight": [1.0] * 8})
    assert parameters["rope_type"] == "default"
    assert same_logits(found, tiny_llama())


@pytest.mark.parametrize("parameters", [LINEAR, YARN, YARN | {"beta_fast": 16.0, "beta_slow": 2.0}])
def test_scaling_in_the_metadata_is_kept(tmp_path, parameters):
    names = {
        "rope_type": "type",
        "original_max_position_embeddings": "original_context_length",
        "beta_fast": "yarn_beta_fast",
        "beta_slow": "yarn_beta_slow",
    }
    fields = {
        f"llama__rope__scaling__{names.get(key, key)}": value for key, value in parameters.items()
    }
    model = scaled(**parameters)
    found, written = converted(tmp_path, model, **fields)
    assert written == parameters | {"rope_theta": 10000.0}
    assert same_logits(found, model)


def test_the_attention_factor_of_yarn_multiplies_the_usual_one(tmp_path):
    fields = {"type": "yarn", "factor": 4.0, "original_context_length": 64, "attn_factor": 0.5}
    fields = {f"llama__rope__scaling__{key}": value for key, value in fields.items()}
    usual = scaled(**YARN).model.rotary_emb.attention_scaling
    found, _ = converted(tmp_path, tiny_llama(), **fields)
    assert found.model.rotary_emb.attention_scaling == pytest.approx(0.5 * usual)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tensors": {"rope_freqs.weight": [1.0, 2.0]}}, r"rope_freqs.* hold 8 numbers above 0"),
        ({"tensors": {"rope_freqs.weight": [0.0] * 8}}, r"rope_freqs.* hold 8 numbers above 0"),
        ({"tensors": {"rope_freqs.weight": [float("nan")] * 8}}, "numbers above 0"),
        ({"llama__rope__scaling__type": "bend"}, "type bend.*linear and yarn"),
        ({"llama__rope__scaling__type": "linear"}, "type linear.*a factor above 0"),
        (
            {
                "llama__rope__scaling__type": "linear",
                "llama__rope__scaling__factor": 2.0,
                "tensors": {"rope_freqs.weight": ODD},
            },
            "no configuration has factors beside linear",
        ),
        (
            {
                "llama__rope__scaling__type": "linear",
                "llama__rope__scaling__factor": 2.0,
                "llama__rope__scaling__alpha": 2.0,
            },
            "no place for alpha",
        ),
    ],
)
def test_what_no_configuration_expresses_is_refused_by_name(tmp_path, fields, message):
    file = write_gguf(tmp_path / "a.gguf", tiny_llama(), **fields)
    with pytest.raises(CheckpointError, match=rf"a\.gguf: its rotary embeddings.*{message}"):
        resolve_model(str(file), tmp_path / "cache")


def test_layers_with_a_window_keep_their_frequencies():
    config = Gemma3TextConfig()
    apply_rope(config, RopeScaling("linear", {"factor": 8.0}), Path("a.gguf"))
    assert config.rope_parameters["full_attention"]["factor"] == 8.0
    assert config.rope_parameters["full_attention"]["rope_type"] == "linear"
    assert config.rope_parameters["sliding_attention"]["rope_type"] == "default"


def test_a_model_without_rotary_embeddings_has_no_place_for_scaling():
    with pytest.raises(CheckpointError, match="GPT2Config has no rope_parameters"):
        apply_rope(GPT2Config(), RopeScaling("linear", {"factor": 8.0}), Path("a.gguf"))
