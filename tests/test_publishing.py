"""Exports uploaded to a stand-in for the hub, and read back from there by the card's own commands."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from hub_stand_in import Repository, running
from huggingface_hub import HfApi, constants
from test_on_base import base, on_base
from workspaces import fill, quicken, recipe

import compress
from compress.cli.main import main
from compress.errors import CheckpointError, RecipeError
from compress.exports.verification.places import EARLIER_PROBE, PROBE
from compress.exports.verification.verify import check
from compress.methods.eora import EoRA
from compress.publishing.folders import Names, publications
from compress.publishing.upload import Visibility, publish


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A run's folder with a GPTQ checkpoint, its adapter beside it, and a native one."""
    workspace = fill(tmp_path_factory.mktemp("publishing"))
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        compress.run(recipe(workspace, export=("gptq", "native")))
    return workspace / "out"


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
        yield server


def copied(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / folder.name))


def one(folder, **names):
    (found,) = publications([folder], Names(**names))
    return found


def front(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_an_export_is_the_files_of_its_folder_in_a_private_repository(out, hub, tmp_path):
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    api = HfApi(endpoint=hub.url, token="hf_stand_in")
    publication = one(out / "gptq", repository="me/tiny-GPTQ-Int4", licence="apache-2.0")
    address = publish(publication, Visibility.PRIVATE, api)
    held = hub.repositories["me/tiny-GPTQ-Int4"]
    assert held.private
    assert address.startswith(f"{hub.url}/me/tiny-GPTQ-Int4/commit/")
    assert set(held.files) == set(publication.files)
    assert "model.safetensors" in held.files and PROBE.as_posix() in held.files
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    card = held.files["README.md"].decode()
    assert card == publication.card == hub.cards[0]
    assert front(card)["license"] == "apache-2.0"
    assert 'AutoTokenizer.from_pretrained("me/tiny-GPTQ-Int4")' in card
    config = json.loads(held.files["adapter/adapter_config.json"])
    assert config["base_model_name_or_path"] == "me/tiny-GPTQ-Int4"
    assert front(held.files["adapter/README.md"].decode())["base_model"] == "me/tiny-GPTQ-Int4"
    for name, data in held.files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert check(tmp_path, "cpu").passed


def test_several_formats_are_a_repository_each_named_after_the_format(out, hub, capsys):
    assert main(["publish", str(out), "me/tiny", "--base-model", "org/tiny", "--public"]) == 0
    assert set(hub.repositories) == {"me/tiny-GPTQ-Int4", "me/tiny-native-4bit"}
    assert not any(held.private for held in hub.repositories.values())
    told = capsys.readouterr().out
    assert "me/tiny-GPTQ-Int4: its card lacks what --license gives" in told
    assert "--base-model" not in told
    card = front(hub.repositories["me/tiny-native-4bit"].files["README.md"].decode())
    assert (card["base_model"], card["base_model_relation"]) == ("org/tiny", "quantized")
    assert {"native", "4-bit"} <= set(card["tags"])


def test_a_dry_run_prints_the_files_and_the_card_and_asks_the_hub_nothing(out, hub, capsys):
    assert main(["publish", str(out / "native"), "me/tiny", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert not hub.requests
    assert "me/tiny: would be private where it is new" in told
    size = (out / "native" / "model.safetensors").stat().st_size
    assert re.search(rf"^  model.safetensors +{size:,}$", told, flags=re.MULTILINE)
    assert one(out / "native", repository="me/tiny").card in told


def test_weights_of_an_earlier_upload_are_removed_and_other_files_stay(out, hub):
    api = HfApi(endpoint=hub.url, token="hf_stand_in")
    publication = one(out / "native", repository="me/tiny")
    publish(publication, Visibility.PRIVATE, api)
    held = hub.repositories["me/tiny"]
    held.files |= {"model-00002-of-00002.safetensors": b"old", "picture.png": b"mine"}
    publish(publication, Visibility.PRIVATE, api)
    assert set(held.files) == {*publication.files, "picture.png"}
    assert len(held.messages) == 2


def test_a_repository_that_everybody_sees_is_not_taken_for_a_private_one(out, hub):
    api = HfApi(endpoint=hub.url, token="hf_stand_in")
    publication = one(out / "native", repository="me/tiny")
    publish(publication, Visibility.PUBLIC, api)
    with pytest.raises(RecipeError, match="me/tiny is there, and everybody sees it; say --public"):
        publish(publication, Visibility.PRIVATE, api)


@pytest.mark.parametrize(
    ("status", "told"), [(401, "hf auth login"), (403, "may not write"), (418, "answered 418")]
)
def test_what_the_hub_refuses_is_told_with_what_would_be_right(out, hub, status, told):
    hub.refuses = status
    with pytest.raises(CheckpointError, match=rf"^me/tiny: .*{told}"):
        publish(
            one(out / "native", repository="me/tiny"),
            Visibility.PRIVATE,
            HfApi(endpoint=hub.url, token="hf_stand_in"),
        )


def test_a_hub_that_is_not_there_is_told(out, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    api = HfApi(endpoint="http://127.0.0.1:9", token="hf_stand_in")
    with pytest.raises(CheckpointError, match="me/tiny: the hub cannot be reached"):
        publish(one(out / "native", repository="me/tiny"), Visibility.PRIVATE, api)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="me/tiny: the hub is not asked while HF_HUB_OFFLINE"):
        publish(one(out / "native", repository="me/tiny"), Visibility.PRIVATE, api)


def test_files_that_are_not_as_they_were_exported_are_not_published(out, hub, tmp_path):
    folder = copied(out / "native", tmp_path)
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    with pytest.raises(CheckpointError, match=r"files config\.json have changed"):
        publish(
            one(folder, repository="me/tiny"),
            Visibility.PRIVATE,
            HfApi(endpoint=hub.url, token="hf_stand_in"),
        )
    assert not hub.repositories


def test_the_probe_of_an_earlier_version_is_published_where_no_loader_looks(out, tmp_path):
    folder = copied(out / "native", tmp_path)
    (folder / PROBE).rename(folder / EARLIER_PROBE)
    publication, staged = one(folder, repository="me/tiny"), tmp_path / "staged"
    staged.mkdir()
    publication.stage(staged)
    assert PROBE.as_posix() in publication.files and (staged / PROBE).is_file()
    assert EARLIER_PROBE.as_posix() not in publication.files
    assert not (staged / EARLIER_PROBE).exists()
    assert check(Path(shutil.copytree(staged, tmp_path / "uploaded")), "cpu").passed


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["out/native"], "no repository was given; write compress publish"),
        (["out/native", "tiny"], "repository: 'tiny' is no id"),
        (["out/native", "me/tiny", "--base-model", "tiny"], "--base-model: 'tiny' is no id"),
        (["text.txt", "me/tiny"], "text.txt: no such folder"),
    ],
)
def test_names_that_cannot_be_published_are_refused(out, words, told, monkeypatch, capsys):
    monkeypatch.chdir(out.parent)
    assert main(["publish", *words]) != 0
    assert told in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("quick_verification")
def test_an_adapter_is_published_with_the_repository_of_its_base(workspace, hub, capsys):
    base(workspace)
    compress.run(on_base(workspace, method=EoRA(rank=4)))
    words = ["publish", str(workspace / "out"), "me/adapter", "--license", "mit"]
    assert main(words) != 0
    assert "publish that, then give its repository: --base owner/name" in capsys.readouterr().err
    hub.repositories["me/base"] = Repository(private=True, files={"config.json": b"{}"})
    assert main([*words, "--base", "me/base"]) == 0
    held = hub.repositories["me/adapter"]
    config = json.loads(held.files["adapter_config.json"])
    commit = hub.repositories["me/base"].commit
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/base", commit)
    card = held.files["README.md"].decode()
    assert (front(card)["base_model"], front(card)["library_name"]) == ("me/base", "peft")
    assert 'PeftModel.from_pretrained(model, "me/adapter")' in card
    assert f'from_pretrained("me/base", revision="{commit}")' in card
