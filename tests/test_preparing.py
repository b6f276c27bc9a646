"""What can be known before work is refused before work."""

import json

import pytest
import torch
from families import save_tiny, tiny_model
from safetensors.torch import load_file, save_file
from torch import nn
from workspaces import recipe

import compress
from calibration.errors import InputError
from calibration.skeleton import PartLoader, build_skeleton
from compress.errors import CheckpointError, LayerError, RecipeError
from compress.methods.eora import EoRA
from compress.methods.gptq import GPTQ
from compress.methods.rtn import RTN
from compress.models.devices import settle_device
from compress.models.layers import refuse_not_finite
from compress.pipeline.main import no_progress
from compress.planning.plan import Forecast
from compress.prepare.output_folder import refuse_bad_output
from compress.prepare.prepare import prepare
from eval.errors import EvalError
from eval.footprint import Timing, measure_speed, tensor_bytes

pytestmark = pytest.mark.usefixtures("quick_verification")


def prepared(workspace, **changes):
    return prepare(recipe(workspace, **changes), no_progress)


def change_config(workspace, **changes):
    path = workspace / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(workspace, change):
    path = workspace / "model" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# Texts. --------------------------------------------------------------------------------------


def test_the_evaluation_text_is_opened_before_work(workspace):
    assert prepared(workspace).windows is None
    assert prepared(workspace, eval_windows=3).windows.input_ids.shape == (3, 32)
    with pytest.raises(RecipeError, match=r"eval_text: .*absent\.txt"):
        prepared(workspace, eval_windows=3, eval_text="absent.txt")


def test_too_little_evaluation_text_is_refused(workspace):
    with pytest.raises(RecipeError, match=r"eval_text: .*9999.*eval-windows"):
        prepared(workspace, eval_windows=9999)


def test_evaluation_rows_shorter_than_a_sequence_are_refused(workspace):
    rows = workspace / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input_ids": [5, 6, 7]}) + "\n" for _ in range(4)))
    with pytest.raises(RecipeError, match=r"eval_text: .*rows shorter than 32"):
        prepared(workspace, eval_windows=2, eval_text=str(rows))


def test_sequences_longer_than_the_models_context_are_refused(workspace):
    change_config(workspace, max_position_embeddings=31)
    with pytest.raises(RecipeError, match="seq_len: 32 tokens; the model takes at most 31"):
        prepared(workspace)


def test_a_tokenizer_larger_than_the_embeddings_is_refused(workspace):
    save_tiny(workspace / "small", vocab_size=40)
    with pytest.raises(RecipeError, match=r"calibration: .*token ids up to \d+.*40 embeddings"):
        prepared(workspace, model=str(workspace / "small"))


# The checkpoint. -----------------------------------------------------------------------------


def test_tensors_that_the_model_has_no_place_for_are_refused(workspace):
    change_tensors(workspace, lambda tensors: tensors.update({"foo.bar": torch.zeros(2)}))
    with pytest.raises(InputError, match=r"no place for the checkpoint's foo\.bar"):
        prepared(workspace)


def test_a_configuration_with_fewer_layers_than_the_file_is_refused(workspace):
    change_config(workspace, num_hidden_layers=2)
    with pytest.raises(InputError, match=r"model\.layers\.2\..* and 4 more; correct config\.json"):
        prepared(workspace)


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt2", "h.0.attn.bias"),
        ("gpt2", "lm_head.weight"),
    ],
)
def test_what_transformers_ignores_may_be_in_the_file(family, extra):
    model = tiny_model(family)
    tensors = {**model.state_dict(), extra: torch.zeros(4)}
    if extra == "lm_head.weight":
        tensors[extra] = model.get_input_embeddings().weight.detach()
    loader = PartLoader(build_skeleton(model.config, torch.float32), tensors)
    assert extra in loader.memory_names


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.layers.2.input_layernorm.weight"]
)
def test_a_shape_that_contradicts_the_configuration_is_refused(workspace, name):
    def cut(tensors):
        tensors[name] = tensors[name][:-1].clone()

    change_tensors(workspace, cut)
    with pytest.raises(CheckpointError, match=rf"{name}: its shape .* is \((63|31),.*\((64|32),"):
        prepared(workspace)


def test_a_float16_overflow_is_not_blamed_on_the_original_alone():
    layer = nn.Linear(2, 2).half()
    with torch.no_grad():
        layer.weight[0, 0] = float("inf")
    with pytest.raises(LayerError, match=r"^model\.weight: .*--dtype bfloat16.*damaged"):
        refuse_not_finite(layer, "model")
    with pytest.raises(LayerError, match=r"^weight: the checkpoint's weight holds .*damaged"):
        refuse_not_finite(layer, "", torch.float16)
    with pytest.raises(LayerError, match=r"^weight: the checkpoint's weight holds .*damaged"):
        refuse_not_finite(layer.float(), "")


# Plans. --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [RTN(bits=8, group_size=4), GPTQ(bits=8, group_size=4)])
def test_a_method_that_saves_nothing_is_refused(workspace, method):
    save_tiny(workspace / "half", num_key_value_heads=4)
    tensors = load_file(workspace / "half" / "model.safetensors")
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    save_file(halves, workspace / "half" / "model.safetensors", metadata={"format": "pt"})
    assert method.planned_bytes((32, 32)) < 32 * 32 * 2  # 12 bits a weight
    prepared(workspace, model=str(workspace / "half"), method=method)
    small = type(method)(bits=8, group_size=2)
    with pytest.raises(RecipeError, match=r"would not get smaller.*lower the bits \(8\)"):
        prepared(workspace, model=str(workspace / "half"), method=small)


@pytest.mark.slow
@pytest.mark.as_run
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(
    "method",
    [
        EoRA(rank=4, base=GPTQ(group_size=32)),
        GPTQ(group_size=32, act_order="desc_act", symmetry="asymmetric"),
    ],
)
def test_every_exports_planned_bytes_are_those_on_disk(workspace, method, family, dtype):
    save_tiny(workspace / "other", family, num_key_value_heads=4)
    job = recipe(
        workspace,
        model=str(workspace / "other"),
        method=method,
        export=("native", "gptq", "dense"),
        dtype=dtype,
    )
    plan = compress.plan(job).plan
    compress.run(job)
    for name in job.export:
        assert plan.export_bytes(name) == tensor_bytes(workspace / "out" / name)
        assert any(f"whole checkpoint, {name}: " in line for line in plan.lines())


def test_a_plan_of_a_dense_export_is_as_large_as_the_source(workspace):
    plan = prepared(workspace, export=("dense",)).plan
    assert plan.export_bytes("dense") == plan.bytes_before
    assert plan.export_bytes("native") == plan.bytes_after < plan.export_bytes("gptq")
    assert any("dense" in line and "100.0 %" in line for line in plan.lines())


def test_a_forecast_of_next_to_no_time_says_so(workspace):
    plan = prepared(workspace).plan
    assert "about" not in Forecast(plan, 0.01).lines()[-1]
    assert Forecast(plan, 0.01).lines()[-1].count("under a second") == 2
    assert "20 to 60 s" in Forecast(plan, 10).lines()[-1]


# The rest. -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nonsense", "meta", "cuda:99", "xla"])
def test_a_device_that_is_not_there_is_refused_in_one_short_sentence(name):
    with pytest.raises(RecipeError) as caught:
        settle_device(name)
    assert str(caught.value).startswith(f"device: {name!r} can't be used here; there is cpu")
    assert len(str(caught.value)) < 200


def test_preparing_does_not_look_at_the_output_folder(workspace):
    (workspace / "out").mkdir()
    prepared(workspace)
    with pytest.raises(RecipeError, match=r"out: .* exists"):
        refuse_bad_output(recipe(workspace))


@pytest.mark.parametrize("place", ["text.txt/out", "/proc/out"])
def test_an_output_that_cannot_be_made_is_refused_before_anything_is_read(workspace, place):
    out = workspace / place
    if not out.parent.exists():
        pytest.skip(f"there is no {out.parent} here")
    for work in (compress.plan, compress.run):
        with pytest.raises(
            RecipeError, match=rf"out: {out} cannot be created, because {out.parent} "
        ):
            work(recipe(workspace, out=out, model="no/such/model/at all"))


def test_saved_statistics_are_told_apart_by_versions_and_read_the_source_once(workspace):
    ready = prepared(workspace)
    assert ready.store().settings.keys() >= {"toolkit", "transformers", "torch", "model"}
    assert ready.store().settings["model"] == ready.reader.fingerprint
    (workspace / "model" / "model.safetensors").unlink()
    ready.store()


def test_speed_is_measured_on_what_fits_in_a_short_context():
    model = tiny_model("gpt2", n_positions=24)
    fitting = Timing().fitting(model)
    assert fitting.prompt_tokens + fitting.new_tokens == 24
    assert measure_speed(model, Timing(repeats=1)).decode_tokens_per_s > 0
    assert Timing(prompt_tokens=8, new_tokens=3).fitting(model).prompt_tokens == 8
    model.config.n_positions = 1
    with pytest.raises(EvalError, match="at most 1 tokens"):
        measure_speed(model)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"vocab_size": -3}, InputError),
        ({"head_dim": -3}, InputError),
        ({"hidden_act": "x"}, InputError),
        ({"architectures": 3}, CheckpointError),
        ({"model_type": ["llama"]}, CheckpointError),
        ({"dtype": []}, CheckpointError),
    ],
)
def test_a_configuration_that_describes_no_model_is_refused(workspace, change, error):
    change_config(workspace, **change)
    with pytest.raises(error, match=r"config\.json"):
        prepare(recipe(workspace), no_progress)
