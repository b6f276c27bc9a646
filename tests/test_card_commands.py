"""The code in the cards of real exports runs, on a copy of the folder and on a repository of the hub."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_stand_in import running
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file
from test_on_base import on_base
from workspaces import fill, quicken, recipe

import compress
from compress.exports.load import load_export
from compress.methods.eora import EoRA
from compress.publishing.folders import Names, publications
from compress.publishing.upload import Visibility, publish

pytestmark = [pytest.mark.slow, pytest.mark.as_run]
ROOT = Path(__file__).resolve().parent.parent
FOREIGN = ("gptq", "compressed-tensors")
"""Formats that transformers loads with packages which environments for tests may lack."""
IDS = list(range(3, 19))
SCRIPT = """
import importlib.util, json, sys
sys.path.insert(0, {root!r})
import torch, transformers
from safetensors.torch import save_file
real = transformers.AutoModelForCausalLM.from_pretrained
found = {{}}
for name, codes in json.load(open({codes!r})).items():
    needed = {{"gptq": "gptqmodel"}}.get(name.split()[0], name.replace("-", "_"))
    if name.startswith(("gptq", "compressed-tensors")) and not importlib.util.find_spec(needed):
        # A model of the same layers takes the place of what the package would load. transformers is looked up: it
        # puts another module into its own place while it loads models.
        transformers.AutoModelForCausalLM.from_pretrained = lambda *_, **__: real({model!r})
        sys.modules["transformers"].CompressedTensorsConfig = dict
    else:
        transformers.AutoModelForCausalLM.from_pretrained = real
    scope = {{}}
    for code in codes:
        exec(code, scope)
    with torch.inference_mode():
        found[name] = scope["model"](input_ids=torch.tensor([{ids}])).logits[0].float().clone()
save_file(found, {out!r})
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Runs with every format, and an adapter on a base that is an ordinary checkpoint."""
    folder = fill(tmp_path_factory.mktemp("cards"))
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        compress.run(recipe(folder, export=("native", "dense", *FOREIGN, "gguf")))
        shutil.copytree(folder / "out" / "dense", folder / "base")
        compress.run(on_base(folder, method=EoRA(rank=4), out=folder / "corrected"))
    return folder


def blocks(card):
    return re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)


def results(codes, workspace, place, **variables):
    """The logits of the model that each card's code leaves behind, run in a process of its own."""
    (place / "codes.json").write_text(json.dumps(codes))
    script = SCRIPT.format(
        root=str(ROOT),
        codes=str(place / "codes.json"),
        model=str(workspace / "model"),
        ids=IDS,
        out=str(place / "found.safetensors"),
    )
    ran = subprocess.run(
        [sys.executable, "-P", "-c", script],
        cwd=place,
        env=os.environ | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return load_file(place / "found.safetensors")


def expected(folder):
    with torch.inference_mode():
        return load_export(folder)(input_ids=torch.tensor([IDS])).logits[0].float()


def test_the_code_of_every_card_runs_on_a_copy_of_its_folder_elsewhere(workspace, tmp_path):
    shutil.copytree(workspace / "base", tmp_path / "base")
    folders = [workspace / "out" / name for name in ("native", "dense", *FOREIGN, "gguf")]
    folders.append(workspace / "corrected" / "adapter")
    codes = {}
    for folder in folders:
        copy = shutil.copytree(folder, tmp_path / "elsewhere" / f"my {folder.name}")
        card = (copy / "README.md").read_text()
        codes[folder.name] = [code.replace("THIS_FOLDER", str(copy)) for code in blocks(card)]
    beside = (tmp_path / "elsewhere" / "my gptq" / "adapter" / "README.md").read_text()
    codes["gptq adapter"] = [
        code.replace("CHECKPOINT_FOLDER", str(tmp_path / "elsewhere" / "my gptq"))
        for code in blocks(beside)
    ]
    assert all(codes.values())
    root = (
        (workspace / "out" / "README.md").read_text().replace("THIS_FOLDER", str(workspace / "out"))
    )
    codes["native of the root"] = blocks(root)[:1]
    found = results(codes, workspace, tmp_path)
    for folder in folders:
        if folder.name not in FOREIGN:
            torch.testing.assert_close(found[folder.name], expected(folder), rtol=0, atol=1e-4)
    assert torch.equal(found["native of the root"], found["native"])
    assert torch.equal(found["gptq adapter"], found["gptq"])
    with torch.inference_mode():
        bare = load_export(workspace / "model")(input_ids=torch.tensor([IDS])).logits[0]
    assert not torch.allclose(found["gptq"], bare, atol=1e-4)  # the adapter is on it


def test_the_code_of_every_card_runs_from_a_repository_of_the_hub(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with running() as server:
        api = HfApi(endpoint=server.url, token="hf_stand_in")
        codes = {}
        base = ("me/tiny-dense", "")
        for folder in (
            "out/native",
            "out/dense",
            *(f"out/{name}" for name in FOREIGN),
            "out/gguf",
            "corrected/adapter",
        ):
            name = Path(folder).name
            if name == "adapter":
                base = ("me/tiny-dense", server.repositories["me/tiny-dense"].commit)
            names = Names(repository=f"me/tiny-{name}", base=base)
            (publication,) = publications([workspace / folder], names)
            publish(publication, Visibility.PUBLIC, api)
            codes[name] = blocks(publication.card)
            if name == "gguf":  # a file: nothing but the card's own command fetches it
                downloads = re.findall(r"`(hf download [^`]+)`", publication.card)
            else:
                assert f'"me/tiny-{name}"' in codes[name][0]
        variables = {
            "HF_ENDPOINT": server.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
        }
        (download,) = downloads
        hf = Path(sys.executable).parent / "hf"
        words = [hf, *download.split()[1:]]
        subprocess.run(words, cwd=tmp_path, env=os.environ | variables, check=True)
        found = results(codes, workspace, tmp_path, **variables)
    for name, folder in (
        ("native", "out/native"),
        ("dense", "out/dense"),
        ("gguf", "out/gguf"),
        ("adapter", "corrected/adapter"),
    ):
        torch.testing.assert_close(found[name], expected(workspace / folder), rtol=0, atol=1e-4)
