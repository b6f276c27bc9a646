"""Fine-tuning the factors of a low-rank export, and writing what came of it."""

import pytest
import torch
from slowness import slow_but
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from workspaces import recipe

import compress
from calibration.text.data import Split, TextSource, load_tokens
from compress.errors import CheckpointError, RecipeError
from compress.exports.verification.places import PROBE
from compress.exports.verification.verify import check
from compress.methods.eora import EoRA
from compress.methods.gptq import GPTQ
from compress.methods.lord import LoRD
from compress.methods.welore import WeLore
from compress.models.checkpoint import Reader

pytestmark = pytest.mark.usefixtures("quick_verification")

LOW_RANK = [
    WeLore(keep=0.8, rank_multiple=1),
    LoRD(keep=0.6, rank_multiple=1, factor_dtype="bfloat16"),
    EoRA(rank=4, base=GPTQ(group_size=32)),
]


def exported(workspace, method):
    job = recipe(workspace, method=method)
    compress.run(job)
    return job.folder


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def train(model, factors, n_steps=4):
    """A few steps on one sentence; the loss before each."""
    ids = torch.arange(3, 35)[None]
    optimiser, losses = torch.optim.Adam(factors.values(), lr=3e-3), []
    for _ in range(n_steps):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return losses


@pytest.mark.parametrize("method", LOW_RANK, ids=lambda method: method.name)
def test_training_changes_the_factors_alone_and_lowers_the_loss(workspace, method):
    model = loaded(exported(workspace, method))
    factors = compress.trainable_factors(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = train(model, factors)
    assert losses[-1] < losses[0]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in factors), name
    assert all(".up." in name or ".down." in name for name in factors)


@pytest.mark.parametrize(
    "method", slow_but(LOW_RANK, kept=LOW_RANK[-1]), ids=lambda method: method.name
)
def test_a_trained_model_is_written_verified_and_loads_again(workspace, method):
    source, out = exported(workspace, method), workspace / "tuned"
    model = loaded(source)
    factors = compress.trainable_factors(model)
    train(model, factors)
    compress.save_trained(model, source, out)
    assert check(out, "cpu").passed
    old, new = Reader(source), Reader(out)
    assert list(old) == list(new)
    for name in old:
        assert new.dtype(name) == old.dtype(name)
        assert torch.equal(new[name], old[name]) == (name not in factors), name
    again = loaded(out)
    for name, factor in factors.items():
        stored = factor.detach().to(old.dtype(name)).float()
        assert torch.equal(again.get_parameter(name), stored)
    assert not (out / "report.json").exists()


def test_a_model_without_factors_is_refused(workspace):
    with pytest.raises(RecipeError, match="no low-rank layer to train"):
        compress.trainable_factors(loaded(exported(workspace, GPTQ(group_size=32))))


def test_factors_in_16_bits_are_refused(workspace):
    folder = exported(workspace, LOW_RANK[0])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with pytest.raises(RecipeError, match=r"is torch\.bfloat16; load with dtype=torch\.float32"):
        compress.trainable_factors(model)


def test_a_folder_that_exists_or_is_another_models_is_refused(workspace):
    source = exported(workspace, LOW_RANK[0])
    model = loaded(source)
    with pytest.raises(RecipeError, match="what it trains, nothing"):
        model.requires_grad_(requires_grad=False)
        compress.save_trained(model, source, workspace / "tuned")
    compress.trainable_factors(model)
    with pytest.raises(RecipeError, match="exists"):
        compress.save_trained(model, source, source)
    assert not list(workspace.glob(".tuned*"))


def test_factors_that_their_storage_cannot_hold_are_refused_and_nothing_is_left(workspace):
    source = exported(workspace, LOW_RANK[2])
    model = loaded(source)
    factor = next(iter(compress.trainable_factors(model).values()))
    with torch.no_grad():
        factor[0] = 1e6
    with pytest.raises(CheckpointError, match="change the logits"):
        compress.save_trained(model, source, workspace / "tuned")
    assert not list(workspace.glob("*tuned*"))
    assert (source / PROBE).exists()


class Sentences(torch.utils.data.Dataset):
    """The same sentence over and over."""

    def __len__(self):
        return 32

    def __getitem__(self, index):
        ids = torch.arange(3, 35)
        return {"input_ids": ids, "labels": ids}


def arguments_in(workspace, **changes):
    settings = {"max_steps": 6, "learning_rate": 3e-3, "logging_steps": 1, "save_steps": 3}
    return TrainingArguments(
        output_dir=str(workspace / "runs"),
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **settings | changes,
    )


@pytest.mark.parametrize(
    "method", slow_but(LOW_RANK, kept=LOW_RANK[-1]), ids=lambda method: method.name
)
def test_the_trainer_of_transformers_trains_the_factors(workspace, method):
    source = exported(workspace, method)
    model = loaded(source)
    factors = compress.trainable_factors(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = Trainer(model=model, args=arguments_in(workspace), train_dataset=Sentences())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in factors), name
    compress.save_trained(model, source, workspace / "tuned")
    assert check(workspace / "tuned", "cpu").passed


@pytest.mark.slow
def test_training_resumes_from_the_trainers_own_checkpoint_which_is_no_model(workspace):
    source = exported(workspace, LOW_RANK[2])
    model = loaded(source)
    factors = compress.trainable_factors(model)
    trainer = Trainer(model=model, args=arguments_in(workspace), train_dataset=Sentences())
    trainer.train()
    end = {name: factor.detach().clone() for name, factor in factors.items()}
    saved = workspace / "runs" / "checkpoint-3"
    with pytest.raises((ValueError, KeyError, OSError)):
        AutoModelForCausalLM.from_pretrained(saved)
    again = loaded(source)
    resumed = compress.trainable_factors(again)
    trainer = Trainer(model=again, args=arguments_in(workspace), train_dataset=Sentences())
    trainer.train(resume_from_checkpoint=str(saved))
    for name, factor in resumed.items():
        torch.testing.assert_close(factor.detach(), end[name])


@pytest.mark.slow
@pytest.mark.as_run
@pytest.mark.hub
def test_the_low_rank_components_of_the_demo_are_trained_on_text_and_its_other_layers_stay(
    tmp_path,
):
    job = compress.Recipe(
        method=WeLore(keep=0.8),
        include=tuple(f"layers.{index}" for index in range(0, 30, 5)),
        out=tmp_path / "welore",
        propagate="none",
        samples=8,
        eval_windows=0,
        tasks=(),
    )
    report = compress.run(job)
    assert all(layer.form.startswith("rank ") for layer in report.layers)
    assert any(kept.reason == "left dense by the plan" for kept in report.kept)
    tokens = load_tokens(
        [TextSource("python-docs")],
        AutoTokenizer.from_pretrained(job.folder),
        n_sequences=16,
        seq_len=128,
        seed=0,
        split=Split.CALIBRATION,
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens.input_ids]
    model = loaded(job.folder)
    factors = compress.trainable_factors(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arguments = arguments_in(tmp_path, max_steps=12, learning_rate=3e-4, save_strategy="no")
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in factors), name
    compress.save_trained(model, job.folder, tmp_path / "tuned")
    assert check(tmp_path / "tuned", "cpu").passed
