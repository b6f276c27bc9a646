"""Checkpoints that commit 3bfa062 wrote, before the package was rearranged, load as they did then.

`written_by_3bfa062/make.py` made them and says what they are.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import python
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from compress.bases import AsDense, open_base
from compress.exports.load import load_export, load_unpacked
from compress.exports.verification.verify import check
from compress.forms.base import Form
from compress.forms.sparse import Along, Layout

WRITTEN = Path(__file__).resolve().parent / "written_by_3bfa062"
CHECKPOINTS, EXPECTED = WRITTEN / "checkpoints", WRITTEN / "expected"
NAMES = sorted(path.name for path in CHECKPOINTS.iterdir())
BASES = [name for name in NAMES if name.startswith("gptq-")]
STOCK = [name for name in NAMES if name.startswith(("native-", "dense-"))]
ADAPTERS = {
    name: folder
    for name in NAMES
    for folder in (name, f"{name}/adapter")
    if (CHECKPOINTS / folder / "adapter_config.json").is_file()
}
COMPLETE = "native-complete"
CAME_LATER = frozenset({"int8", "tied"})
"""Forms that 3bfa062 did not know, so that no checkpoint of its holds one."""

pytestmark = pytest.mark.usefixtures("among_the_checkpoints")


@pytest.fixture
def among_the_checkpoints(monkeypatch):
    """Adapters call their base by its folder's name alone."""
    monkeypatch.chdir(CHECKPOINTS)


def expected(name: str, kind: str) -> dict[str, Tensor]:
    """What was recorded of a checkpoint, by the path of a module."""
    tensors = load_file(EXPECTED / f"{name}.safetensors")
    head = f"{kind}/"
    return {key.removeprefix(head): value for key, value in tensors.items() if key.startswith(head)}


def logits(model: nn.Module, name: str) -> Tensor:
    ids = load_file(EXPECTED / f"{name}.safetensors")["input_ids"]
    with torch.inference_mode():
        found: Tensor = model(input_ids=ids).logits[0].float()
    return found


def assert_same_logits(model: nn.Module, name: str) -> None:
    recorded = load_file(EXPECTED / f"{name}.safetensors")["logits"]
    torch.testing.assert_close(logits(model, name), recorded, rtol=0, atol=1e-5)


def weight_of(module: nn.Module) -> Tensor:
    """What a form stands for; of anything else, its weight."""
    weight: Any = module.dense() if isinstance(module, Form) else module.weight
    return weight.detach().float()


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_written_before_the_move_has_the_same_dense_weights(name):
    model = load_export(name, torch.float32)
    weights = expected(name, "weight")
    assert weights
    for path, weight in weights.items():
        assert torch.equal(weight_of(model.get_submodule(path)), weight), path
    for path, offset in expected(name, "offset").items():
        assert torch.equal(model.get_submodule(path).offset(), offset), path


@pytest.mark.parametrize("name", NAMES)
def test_forms_that_multiply_stand_for_the_product_of_their_parts(name):
    """Sums of products differ in the last digits from one processor to the next: the oracle sums in fp64."""
    model, weights = load_export(name, torch.float32), expected(name, "weight")
    for layer in {path.partition(".form")[0] for path in weights}:
        if f"{layer}.form" in weights or layer in weights:
            continue
        found = model.get_submodule(layer).form.dense().double()
        torch.testing.assert_close(found, plain(f"{layer}.form", weights), rtol=0, atol=1e-6)


def plain(path: str, weights: Mapping[str, Tensor]) -> Tensor:
    """The dense weight of a form from what was recorded of its parts, in fp64."""
    if path in weights:
        return weights[path].double()
    if any(key.startswith(f"{path}.up") for key in weights):
        return plain(f"{path}.up", weights) @ plain(f"{path}.down", weights)
    n_terms = 1 + max(int(key[len(path) :].split(".")[2]) for key in weights if path in key)
    return torch.stack([plain(f"{path}.terms.{k}", weights) for k in range(n_terms)]).sum(0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("load", [load_export, load_unpacked])
def test_a_checkpoint_written_before_the_move_gives_the_same_logits(name, load):
    assert_same_logits(load(name, torch.float32), name)


@pytest.mark.parametrize("name", STOCK)
def test_transformers_loads_what_was_written_before_the_move(name):
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name, dtype=torch.float32)
    assert_same_logits(model.eval(), name)


@pytest.mark.parametrize("name", BASES)
def test_a_base_written_before_the_move_is_read_to_the_bit(name):
    base, weights = open_base(CHECKPOINTS / name), expected(name, "weight")
    assert base.layers
    for layer in base.layers:
        recorded = weights.get(f"{layer}.form", weights.get(f"{layer}.form.terms.0"))
        assert torch.equal(base.form(layer).dense(), recorded), layer


@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_puts_an_adapter_written_before_the_move_on_its_base(name):
    folder = CHECKPOINTS / ADAPTERS[name]
    named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    base = CHECKPOINTS / (named if ADAPTERS[name] == name else name)
    adapted = PeftModel.from_pretrained(dense_model(base), folder, torch_dtype=torch.float32)
    assert_same_logits(adapted.float(), name)


def dense_model(folder: Path) -> PreTrainedModel:
    """An ordinary model with the weights that a compressed checkpoint stands for."""
    base = open_base(folder)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**base.config)).float().eval()
    missing, unexpected = model.load_state_dict(dict(AsDense(base, model)), strict=False)
    assert not unexpected
    assert missing in ([], ["lm_head.weight"])
    model.tie_weights()
    return model


def test_what_goes_with_a_checkpoint_written_before_the_move_verifies_it():
    assert check(CHECKPOINTS / COMPLETE, "cpu").passed


@pytest.mark.slow
@pytest.mark.parametrize("toolkit", ["absent", "present"])
def test_the_code_shipped_with_a_checkpoint_still_reads_it(toolkit, tmp_path, monkeypatch):
    """In a process that has the toolkit of today, and in one that has none."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = shutil.copytree(CHECKPOINTS / COMPLETE, tmp_path / "checkpoint")
    ran = python(
        ("import compress\n" if toolkit == "present" else "")
        + "import json, torch\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)\n"
        "with torch.no_grad():\n"
        "    print(json.dumps(model(torch.tensor(json.loads(sys.argv[2]))).logits[0].tolist()))\n",
        folder,
        load_file(EXPECTED / f"{COMPLETE}.safetensors")["input_ids"].tolist(),
        hide_toolkit=toolkit == "absent",
        cwd=tmp_path,
    )
    assert ran.code == 0, ran.err
    found = torch.tensor(json.loads(ran.out.splitlines()[-1]))
    recorded = load_file(EXPECTED / f"{COMPLETE}.safetensors")["logits"]
    torch.testing.assert_close(found, recorded, rtol=0, atol=1e-5)


# What the checkpoints cover


def test_every_form_is_in_a_checkpoint_written_before_the_move():
    assert {spec["form"] for spec in specs()} == {form.kind for form in forms(Form)} - CAME_LATER


def forms(kind: type[Form]) -> Iterator[type[Form]]:
    """Ours that have a name, and not those of tests or of code shipped with a checkpoint."""
    package = Form.__module__.partition(".")[0]
    for form in kind.__subclasses__():
        if form.__module__.partition(".")[0] == package and hasattr(form, "kind"):
            yield form
        yield from forms(form)


def test_every_way_to_store_a_form_is_in_a_checkpoint_written_before_the_move():
    by_form: dict[str, list[Mapping[str, Any]]] = {}
    for spec in specs():
        by_form.setdefault(spec["form"], []).append(spec)
    quantised, sparse = by_form["quantised"], by_form["sparse"]
    assert {spec["bits"] for spec in quantised if spec["symmetric"]} >= {2, 3, 4, 6, 8}
    assert {spec["bits"] for spec in quantised if not spec["symmetric"]} >= {2, 3, 4, 5, 8}
    assert {spec["ordered"] for spec in quantised} == {True, False}
    assert {spec["along"] for spec in sparse} == set(Along)
    assert {spec["layout"] for spec in sparse} == set(Layout)
    values = {(spec["values"]["form"], spec["values"].get("bits")) for spec in sparse}
    integers = {("quantised", 4), ("quantised", 8)}
    assert values == {("dense", None), ("short", 13), ("short", 14), *integers}
    for form in ("low_rank", "product"):
        assert {bool(spec.get("offset")) for spec in by_form[form]} == {True, False}, form
    assert {spec["of"]["form"] for spec in by_form["common"]} == {"dense", "quantised"}
    bases = {spec["terms"][0]["form"] for spec in by_form["sum"]}
    assert bases == {"quantised", "low_rank", "sparse", "product", "dense"}
    paths = {spec["terms"][1]["form"] for spec in by_form["sum"]}
    assert paths == {"low_rank", "product"}


def test_every_dtype_of_values_and_factors_is_in_a_checkpoint_written_before_the_move():
    floats = {torch.float32, torch.bfloat16, torch.float16}
    found: dict[str, set[torch.dtype]] = {}
    for name in NAMES:
        for path, module in stored_floats(name):
            found.setdefault(path, set()).add(module)
    assert all(found[part] >= floats for part in ("values.weight", "up.weight", "down.weight"))


def stored_floats(name: str) -> Iterator[tuple[str, torch.dtype]]:
    """The last two words of the name of each tensor of a native checkpoint's forms, and its dtype."""
    if (CHECKPOINTS / name / "model.safetensors").is_file():
        for key, tensor in load_file(CHECKPOINTS / name / "model.safetensors").items():
            if ".form." in key:
                yield ".".join(key.rsplit(".", 2)[-2:]), tensor.dtype


def specs() -> Iterator[Mapping[str, Any]]:
    """Of every form in a native checkpoint, and of those within it."""
    for name in NAMES:
        config = CHECKPOINTS / name / "config.json"
        layers = json.loads(config.read_text()).get("layers", {}) if config.is_file() else {}
        for layer in layers.values():
            yield from within(layer["form"])


def within(spec: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield spec
    for value in spec.values():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, Mapping):
                yield from within(part)


def test_gptq_checkpoints_written_before_the_move_are_of_every_kind():
    configs = [
        json.loads((CHECKPOINTS / name / "quantize_config.json").read_text()) for name in BASES
    ]
    assert {config["bits"] for config in configs} >= {2, 3, 4, 8}
    assert {config["sym"] for config in configs} == {True, False}
    assert {config["desc_act"] for config in configs} == {True, False}
    assert -1 in {config["group_size"] for config in configs}
    assert {"dynamic" in config for config in configs} == {True, False}
