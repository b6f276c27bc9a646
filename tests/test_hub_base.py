"""Base checkpoints of the hub: found in its cache without a network, pinned, and named in the adapter by their id."""

import json

import pytest
from huggingface_hub import constants
from test_on_base import base, on_base

import compress
from compress.errors import CheckpointError
from compress.exports.peft import find_base

pytestmark = pytest.mark.usefixtures("quick_verification")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LATER = "89abcdef0123456789abcdef0123456789abcdef"


@pytest.fixture
def cached(workspace, monkeypatch):
    """The hub's cache as a download leaves it, and no hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(workspace / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = base(workspace)
    repository = workspace / "hub" / "models--some--base"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return snapshot


@pytest.mark.parametrize("spec", ["some/base", f"some/base@{COMMIT}"])
def test_a_base_of_the_hub_is_named_by_its_id_and_pinned(workspace, cached, spec):
    report = compress.run(on_base(workspace, base_checkpoint=spec))
    adapter = workspace / "out" / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"
    assert config["revision"] == COMMIT
    assert (report.base.checkpoint, report.base.revision) == (spec, COMMIT)
    assert report.recipe["base_checkpoint"] == spec
    assert find_base(adapter) == cached
    card = (adapter / "README.md").read_text()
    assert "base_model: some/base\n" in card
    assert "base_model_relation: adapter\n" in card
    assert f'from_pretrained("some/base", revision="{COMMIT}")' in card
    assert "# some/base, corrected with" in card


def test_an_adapter_keeps_to_the_commit_that_it_was_made_for(workspace, cached):
    compress.run(on_base(workspace, base_checkpoint="some/base"))
    (cached.parent / LATER).mkdir()
    (cached.parent.parent / "refs" / "main").write_text(LATER)
    assert find_base(workspace / "out" / "adapter") == cached


def test_a_base_that_is_neither_here_nor_in_reach_is_refused(workspace, cached):
    message = (
        r"base_checkpoint: 'some/other' is no file or folder here, and the Hugging Face hub cannot "
        r"be asked for it .*; name a folder with config\.json and safetensors"
    )
    with pytest.raises(CheckpointError, match=message):
        compress.plan(on_base(workspace, base_checkpoint="some/other"))
    assert cached.is_dir()


def test_an_adapter_whose_base_is_gone_from_the_cache_says_so(workspace, cached):
    compress.run(on_base(workspace, base_checkpoint="some/base"))
    cached.rename(workspace / "moved")
    with pytest.raises(CheckpointError, match=rf"base_model_name_or_path: 'some/base@{COMMIT}'"):
        find_base(workspace / "out" / "adapter")


def test_a_folder_goes_before_an_id_that_reads_the_same(workspace, cached, monkeypatch):
    monkeypatch.chdir(workspace)
    (workspace / "some").mkdir()
    cached.rename(workspace / "some" / "base")
    compress.run(on_base(workspace, base_checkpoint="some/base"))
    config = json.loads((workspace / "out/adapter/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("./some/base", None)
