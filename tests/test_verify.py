"""Verification fails for every difference, and names it."""

import json
import re

import pytest
import torch
from exported import FORMATS, IDS, compressed, export
from safetensors import safe_open
from safetensors.torch import save_file

from compress.errors import CheckpointError, PluginError, RecipeError
from compress.exports.verification import verify as verification
from compress.exports.verification.places import EARLIER_PROBE, PROBE
from compress.exports.verification.probe import digests, file_digests, make_probe, write_probe
from compress.exports.verification.verify import verify
from compress.models.checkpoint import Reader

FRESH = ("test_an_export_is_verified_in_a_fresh_process", "test_a_process_that_dies_is_a_failure")


@pytest.fixture(autouse=True)
def in_this_process(request, monkeypatch):
    """A fresh process does the same, and takes seconds to start: only where that is the point."""
    if request.function.__name__ not in FRESH:
        monkeypatch.setattr(
            verification, "_answer_of_a_fresh_process", verification.answer_of_this_process
        )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return compressed(tmp_path_factory.mktemp("source"))


@pytest.fixture
def native(made, tmp_path):
    return export(made, tmp_path / "native", "native")


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def rewrite(folder, change):
    tensors = dict(Reader(folder).items())
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "name",
    [name if name == "native" else pytest.param(name, marks=pytest.mark.slow) for name in FORMATS],
)
def test_an_export_is_verified_in_a_fresh_process(made, tmp_path, name):
    found = verify(export(made, tmp_path / name, name))
    assert found.passed
    assert found.loader == name
    assert found.tolerance == 1e-4
    assert found.relative_difference <= (1e-5 if name == "dense" else 1e-6)
    assert found.top1_agreement == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMATS)
def test_a_16_bit_export_is_verified_with_a_wider_tolerance(tmp_path, name, dtype):
    made = compressed(tmp_path / "source", dtype=dtype)
    found = verify(export(made, tmp_path / name, name))
    assert found.tolerance == 2e-2
    assert found.relative_difference <= (2e-2 if name == "dense" else 1e-6)


def test_a_flipped_bit_is_found_by_the_tensors_name(native):
    flip(native / "model.safetensors", -1)
    with pytest.raises(CheckpointError, match="have changed") as caught:
        verify(native)
    last = list(Reader(native))[-1]
    assert last in str(caught.value)


def test_a_flipped_bit_in_the_header_is_found_by_the_files_name(native):
    flip(native / "model.safetensors", 3)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        verify(native)


def test_a_flipped_bit_in_the_adapter_is_found(made, tmp_path):
    folder = export(made, tmp_path / "gptq", "gptq")
    flip(folder / "adapter" / "adapter_model.safetensors", -1)
    with pytest.raises(CheckpointError, match=r"adapter/.*lora_\w.* have changed"):
        verify(folder)


def test_a_deleted_tensor_is_named(native):
    rewrite(native, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight are missing"):
        verify(native)


def test_a_renamed_tensor_is_named(native):
    rewrite(native, lambda tensors: tensors.update(other=tensors.pop("model.norm.weight")))
    with pytest.raises(CheckpointError, match=r"norm\.weight are missing; other are not of this"):
        verify(native)


@pytest.mark.parametrize("name", ["native", "gptq"])
def test_a_tensor_lost_before_the_probe_was_written_is_an_error_too(made, tmp_path, name):
    """The digests say nothing then; the loader must."""
    folder = export(made, tmp_path / name, name)
    rewrite(folder, lambda tensors: tensors.pop("model.norm.weight"))
    write_probe(folder, make_probe(IDS, made.logits()))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        verify(folder)


FILES = ["config.json", "loading.py", "registered.py", "quantised.py", "tokenizer.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_that_loading_reads_is_named(native, name):
    path = native / name
    path.write_text(path.read_text() + "\n")
    with pytest.raises(CheckpointError, match=rf"files {re.escape(name)} have changed"):
        verify(native)


def test_a_file_that_was_added_or_lost_is_named(native):
    (native / "chat_template.jinja").write_text("{{ messages }}")
    (native / "generation_config.json").unlink()
    with pytest.raises(
        CheckpointError,
        match=r"generation_config\.json are missing; chat_template\.jinja are not of this export",
    ):
        verify(native)


def test_what_loading_does_not_read_may_change(native):
    for name in ("README.md", "report.json", "recipe.yaml", "LICENSE"):
        (native / name).write_text("new")
    assert verify(native).passed


def test_a_config_changed_before_the_probe_was_written_is_found_by_the_logits(made, native):
    config = json.loads((native / "config.json").read_text())
    config["base_config"]["rms_norm_eps"] = 0.1
    (native / "config.json").write_text(json.dumps(config))
    write_probe(native, make_probe(IDS, made.logits()))
    with pytest.raises(CheckpointError, match="relative difference"):
        verify(native)


def test_the_adapters_config_is_covered(made, tmp_path):
    found = file_digests(export(made, tmp_path / "gptq", "gptq"))
    assert {"adapter/adapter_config.json", "quantize_config.json", "tokenizer.json"} <= set(found)


@pytest.mark.parametrize("kept", [0, 5, 40, -10])
def test_a_damaged_probe_is_refused_by_name(native, kept):
    path = native / PROBE
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"probe\.st is damaged"):
        verify(native)


def test_a_probe_without_digests_is_refused(native):
    save_file(
        {name: torch.ones(1) for name in ("input_ids", "logits", "positions")}, native / PROBE
    )
    with pytest.raises(CheckpointError, match="no digests of tensors and files"):
        verify(native)


def test_a_probe_has_the_mode_of_other_files(native):
    assert (native / PROBE).stat().st_mode == (native / "config.json").stat().st_mode


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_in_a_line(native, device):
    with pytest.raises(
        RecipeError, match=rf"--device: '{device}' can't be used here .*cpu"
    ) as caught:
        verify(native, device)
    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)


def test_logits_that_are_not_numbers_never_pass(made, native):
    logits = made.logits().clone()
    logits[0, 0] = float("nan")
    write_probe(native, make_probe(IDS, logits))
    with pytest.raises(CheckpointError, match="relative difference"):
        verify(native)


def test_the_dtype_of_the_probe_is_the_dtype_of_the_verification(tmp_path):
    made = compressed(tmp_path / "source", dtype=torch.bfloat16)
    folder = export(made, tmp_path / "native", "native")
    logits = made.model.float()(IDS).logits[0].detach()
    write_probe(folder, make_probe(IDS, logits), torch.float32)
    assert verify(folder).tolerance == 1e-4


def test_a_folder_without_a_probe_is_refused(native):
    (native / PROBE).unlink()
    with pytest.raises(CheckpointError, match=r"no verification/probe\.st"):
        verify(native)


def test_an_export_of_an_earlier_version_is_verified_by_the_probe_beside_its_weights(native):
    (native / PROBE).rename(native / EARLIER_PROBE)
    assert verify(native).passed


def test_no_loader_of_safetensors_finds_the_probe(native):
    assert (native / PROBE).is_file()
    assert {path.name for path in native.rglob("*.safetensors")} == {"model.safetensors"}


def test_a_process_that_dies_is_a_failure(native, monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(CheckpointError, match="ended with 1"):
        verify(native)


def test_digests_cover_every_tensor(made, tmp_path):
    folder = export(made, tmp_path / "gptq", "gptq")
    names = set(digests(folder))
    assert set(Reader(folder)) < names
    assert {name for name in names if name.startswith("adapter/")}


def test_the_fresh_process_answers_what_a_user_can_mend_as_a_message(tmp_path, monkeypatch):
    """Anything else ends it with a traceback, of which only the last lines are told."""
    reason = "half of the distribution outside cannot be loaded"

    def fail(*_):
        raise PluginError(reason)

    monkeypatch.setattr(verification, "check", fail)
    assert verification.answer_of_this_process(tmp_path, "cpu") == {"error": reason}


@pytest.mark.parametrize(
    ("name", "text"),
    [("files", "x"), ("tensors", "[]"), ("base", "3"), ("dtype", "float33"), ("rounded", "nn")],
)
def test_metadata_that_no_export_has_are_damage_and_named(native, name, text):
    with safe_open(native / PROBE, framework="pt") as probe:
        metadata = probe.metadata()
        tensors = {key: probe.get_tensor(key) for key in probe.keys()}  # noqa: SIM118
    save_file(tensors, native / PROBE, {**metadata, name: text})
    with pytest.raises(
        CheckpointError, match=f"damaged: {name} in its metadata is '{re.escape(text)}'"
    ):
        verify(native)
