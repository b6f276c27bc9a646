"""`import compress` imports neither torch nor transformers, and native checkpoints load all the same."""

from pathlib import Path

import pytest
from exported import python

WRITTEN = Path(__file__).resolve().parent / "written_by_3bfa062"
NATIVE = WRITTEN / "checkpoints" / "native-complete"
EXPECTED = WRITTEN / "expected" / "native-complete.safetensors"

LOAD = """
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
expected = load_file(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
found = model(input_ids=expected["input_ids"]).logits[0].float()
torch.testing.assert_close(found, expected["logits"], rtol=0, atol=1e-5)
"""

IN_A_THREAD = """
import threading, time
def use():
    import transformers.models.auto.modeling_auto
thread = threading.Thread(target=use)
thread.start()
time.sleep({delay})
import compress
thread.join()
"""

ORDERS = {
    "the toolkit first": "import compress\n",
    "transformers first": "import transformers\nimport compress\n",
    "its classes first": "from transformers import AutoModelForCausalLM, AutoConfig\nimport compress\n",
    "quantizers first": "import compress\nimport transformers.quantizers.auto\n",
    "a submodule of the toolkit alone": "import compress.forms.loading\n",
    "a spec looked at before": "import compress, importlib.util as util\n"
    "assert util.find_spec('transformers.models.auto.configuration_auto')\n",
    "the toolkit reloaded before": "import importlib, compress\nimportlib.reload(compress)\n",
    "the toolkit reloaded after": "import importlib, compress\n"
    "from transformers import AutoConfig\nimportlib.reload(compress)\n",
    "the table reloaded and then the toolkit": "import importlib, compress\n"
    "import transformers.models.auto.configuration_auto as table\n"
    "importlib.reload(table)\nimportlib.reload(compress)\n",
    "a thread that is importing transformers": IN_A_THREAD.format(delay=0),
    "a thread that is half through importing transformers": IN_A_THREAD.format(delay=1),
}
QUICK = ("transformers first", "the toolkit first")


@pytest.mark.slow
@pytest.mark.parametrize(
    "order",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ORDERS],
)
def test_a_native_checkpoint_loads_whatever_was_imported_first(order: str, tmp_path: Path) -> None:
    ran = python(ORDERS[order] + LOAD, NATIVE, EXPECTED, cwd=tmp_path)
    assert ran.code == 0, ran.err


@pytest.mark.slow
def test_a_pipeline_loads_a_native_checkpoint_by_its_path_alone(tmp_path: Path) -> None:
    code = (
        "import compress\nfrom transformers import pipeline\n"
        "model = pipeline('text-generation', sys.argv[1]).model\n"
        "print(type(model.model.layers[0].mlp.down_proj).__module__)"
    )
    ran = python(code, NATIVE, cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert ran.out.split() == ["compress.forms.linear"]


@pytest.mark.slow
def test_a_config_alone_can_be_read_and_knows_the_forms(tmp_path: Path) -> None:
    code = (
        "import compress\nfrom transformers import AutoConfig\n"
        "config = AutoConfig.from_pretrained(sys.argv[1])\n"
        "print(config.model_type, len(config.quantization_config.layers))"
    )
    ran = python(code, NATIVE, cwd=tmp_path)
    assert ran.code == 0, ran.err
    model_type, n_layers = ran.out.split()
    assert model_type == "llama"
    assert int(n_layers) > 0


def test_importing_the_toolkit_imports_no_library(tmp_path: Path) -> None:
    code = "import compress\nprint(*{name.partition('.')[0] for name in sys.modules})"
    ran = python(code, cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert not {"torch", "transformers", "numpy", "pydantic", "rich"} & set(ran.out.split())
