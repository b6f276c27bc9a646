"""Models that read a sequence whole: encoders alone, and classifiers of sequences."""

import json

import pytest
import torch
from families import FAMILIES, byte_tokenizer
from slowness import slow_if
from test_backward import keeper
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
)

import compress
from calibration.errors import InputError
from calibration.heads import Head
from calibration.outputs import head_of
from calibration.statistics.fisher import Fisher
from calibration.text.data import Framing, Split, load_tokens, load_windows, parse_source
from compress.config.recipe import Recipe
from compress.errors import RecipeError
from compress.exports.load import load_export
from compress.methods.eora import EoRA
from compress.methods.fwsvd import FWSVD
from compress.methods.gptq import GPTQ
from compress.methods.svd_llm import SVDLLM
from compress.pipeline.main import no_progress
from compress.prepare.prepare import prepare
from compress.prepare.texts import DEFAULT_TASKS, settled_for
from compress.solvers.rank_allocation import Allocation
from compress.survey.gradients import gradients_of_block, with_gradients

pytestmark = pytest.mark.usefixtures("quick_verification")

SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "num_labels": 3,
}
WORDS = [
    *("brown", "fox", "jumps", "over", "lazy", "dogs", "while", "seven", "bears"),
    *("run", "away", "from", "noisy", "hungry", "crows"),
]


@pytest.fixture(params=[Head.CLASSES, Head.FEATURES], ids=["classifier", "encoder"])
def head(request):
    return request.param


@pytest.fixture
def workspace(tmp_path, monkeypatch, head):
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    kind = BertForSequenceClassification if head is Head.CLASSES else BertModel
    model = kind(BertConfig(**SMALL)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"text": " ".join(WORDS[k % 7 : k % 7 + 3 + k % 4]), "label": k % 3} for k in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def recipe(workspace, **changes):
    options = {
        "model": str(workspace / "model"),
        "out": workspace / "out",
        "calibration": (str(workspace / "rows.jsonl"),),
        "eval_text": str(workspace / "rows.jsonl"),
        "samples": 12,
        "seq_len": 40,
        "eval_windows": 0,
        "method": FWSVD(keep=0.6, rank_multiple=1),
    }
    return Recipe(**{**options, **changes})


METHODS = [
    FWSVD(keep=0.6, rank_multiple=1),
    FWSVD(
        keep=0.6,
        rank_multiple=1,
        metric="kronecker",
        allocation=Allocation.SPECTRUM,
        importance="none",
    ),
    SVDLLM(keep=0.6, rank_multiple=1, allocation=Allocation.SPECTRUM, importance="fisher"),
    EoRA(rank=4, base=GPTQ(group_size=32)),
]


@pytest.mark.parametrize(
    ("method", "export"),
    slow_if(
        lambda method, export: export == "native" and method is not METHODS[0],
        [(METHODS[0], "dense"), *((method, "native") for method in METHODS)],
    ),
    ids=["rows dense", "rows", "kronecker", "fisher", "eora"],
)
def test_it_is_compressed_evaluated_and_loads_again(workspace, head, method, export):
    job = recipe(workspace, method=method, eval_windows=4, export=(export,))
    report = compress.run(job)
    assert report.head == head
    scores = {score.task: score for score in report.scores.after.tasks}
    assert report.scores.after.fidelity is None
    assert report.scores.after.footprint.decode_tokens_per_s is None
    if head is Head.FEATURES:
        assert 0.5 < scores["cosine with the original"].value < 1
    else:
        assert set(scores) == {
            "KL divergence of the classes, nats",
            "the original's class",
            "accuracy",
        }
        assert scores["KL divergence of the classes, nats"].value > 0
    before = {score.task: score.value for score in report.scores.before.tasks}
    assert before.get("cosine with the original", 1.0) == pytest.approx(1.0)
    model = load_export(job.folder)
    assert type(model) is (BertForSequenceClassification if head is Head.CLASSES else BertModel)
    card = (job.folder / "README.md").read_text()
    assert ("AutoModelForSequenceClassification" in card) == (head is Head.CLASSES)
    assert "AutoModelForCausalLM" not in card


def test_the_fisher_is_that_of_autograd_sample_by_sample(workspace, head):
    prepared = with_gradients(prepare(recipe(workspace), no_progress), no_progress)
    kind = BertForSequenceClassification if head is Head.CLASSES else BertModel
    model, tokens = kind.from_pretrained(workspace / "model").eval(), prepared.tokens
    written, fisher = {}, {}
    layers = {name: model.get_submodule(name) for name in prepared.plan.selected}
    for name, layer in layers.items():
        layer.register_forward_hook(keeper(written, name))
    for one in tokens.batches(1):
        output = model(input_ids=one.input_ids, attention_mask=one.attention_mask)
        if head is Head.CLASSES:
            loss = F.cross_entropy(output.logits, one.labels)
        else:
            generator = torch.Generator().manual_seed(int(one.input_ids.sum()))
            draw = torch.randn(32, generator=generator)
            seen = slice(None) if one.attention_mask is None else one.attention_mask[0].bool()
            loss = output.last_hidden_state[0][seen].mean(0) @ draw
        model.zero_grad()
        loss.backward()
        for name, layer in layers.items():
            fisher[name] = fisher.get(name, 0) + layer.weight.grad.double().square().sum(0)
    for block in range(3):
        for name, stats in gradients_of_block(prepared, block).items():
            ours, theirs = stats[Fisher].sum_i, fisher[name]
            assert (ours - theirs).norm() < 1e-5 * theirs.norm(), name


def test_each_document_is_a_sequence_of_its_own_with_its_class(workspace):
    tokenizer = byte_tokenizer()
    source = parse_source(str(workspace / "rows.jsonl"))
    options = {"n_sequences": 10, "seq_len": 40, "seed": 0, "split": Split.CALIBRATION}
    tokens = load_tokens([source], tokenizer, framing=Framing.EXAMPLES, **options)
    rows = [json.loads(line) for line in (workspace / "rows.jsonl").read_text().splitlines()]
    expected = {(tuple(tokenizer(row["text"])["input_ids"]), row["label"]) for row in rows}
    for k in range(10):
        ids = tuple(tokens.input_ids[k][tokens.attention_mask[k].bool()].tolist())
        assert (ids, int(tokens.labels[k])) in expected
    windows = load_windows(source, tokenizer, n_sequences=3, seq_len=40, framing=Framing.EXAMPLES)
    assert windows.labels.tolist() == [row["label"] for row in rows[:3]]


def test_long_documents_without_classes_are_read_in_pieces(tmp_path):
    (tmp_path / "long.txt").write_text(" ".join(str(k) for k in range(400)))
    source = parse_source(str(tmp_path / "long.txt"))
    options = {"n_sequences": 8, "seq_len": 16, "seed": 0, "split": Split.CALIBRATION}
    tokens = load_tokens([source], byte_tokenizer(), framing=Framing.EXAMPLES, **options)
    assert len(tokens) == 8
    assert len({tuple(row) for row in tokens.input_ids.tolist()}) == 8


@pytest.mark.parametrize("head", [Head.CLASSES], indirect=True)
def test_the_fisher_of_a_classifier_needs_classes(workspace):
    (workspace / "plain.txt").write_text(" ".join(WORDS * 50))
    job = recipe(workspace, calibration=(str(workspace / "plain.txt"),))
    with pytest.raises(InputError, match=r"the text has none; .* 'label'"):
        compress.run(job)


@pytest.mark.parametrize("head", [Head.FEATURES], indirect=True)
def test_what_only_language_models_can_do_is_refused(workspace):
    with pytest.raises(RecipeError, match=r"tasks: offline_piqa are for models that write text"):
        prepare(recipe(workspace, tasks=("offline_piqa",)), no_progress)
    method = SVDLLM(allocation=Allocation.SPECTRUM, importance="kl")
    with pytest.raises(RecipeError, match=r"method\.importance: kl compares predictions"):
        prepare(recipe(workspace, method=method), no_progress)


@pytest.mark.parametrize("label", ["null", '"x"', "1.5", str(2**70)])
def test_a_file_of_which_some_rows_have_no_class_has_none(tmp_path, label):
    (tmp_path / "rows.jsonl").write_text(
        '{"text": "a b", "label": 1}\n' + f'{{"text": "c d", "label": {label}}}\n'
    )
    options = {"n_sequences": 2, "seq_len": 8, "seed": 0, "split": Split.CALIBRATION}
    source = parse_source(str(tmp_path / "rows.jsonl"))
    tokens = load_tokens([source], byte_tokenizer(), framing=Framing.EXAMPLES, **options)
    assert tokens.labels is None


@pytest.mark.parametrize("head", [Head.CLASSES], indirect=True)
@pytest.mark.parametrize("label", [3, -1])
def test_a_class_that_the_model_does_not_have_is_refused(workspace, label):
    rows = [{"text": f"fox {k}", "label": label if k == 5 else 1} for k in range(12)]
    (workspace / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RecipeError, match=rf"calibration: it has the label {label}, .* 0 to 2"):
        prepare(recipe(workspace), no_progress)


@pytest.mark.parametrize("head", [Head.CLASSES], indirect=True)
@pytest.mark.parametrize(
    "change", [{"num_labels": 1}, {"problem_type": "multi_label_classification"}]
)
def test_heads_that_are_no_classes_are_refused(workspace, change):
    BertForSequenceClassification(BertConfig(**{**SMALL, **change})).save_pretrained(
        workspace / "model"
    )
    with pytest.raises(RecipeError, match="one class among two or more"):
        prepare(recipe(workspace), no_progress)


def test_gptq_checkpoints_are_of_language_models(workspace):
    job = recipe(workspace, method=GPTQ(group_size=32), export=("gptq",))
    with pytest.raises(RecipeError, match="export: gptq is for models that write text"):
        prepare(job, no_progress)


@pytest.mark.parametrize("head", [Head.CLASSES], indirect=True)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_fisher_of_a_decoder_that_classifies_is_that_of_autograd(workspace, family):
    config = AutoConfig.for_model(
        family, **{**FAMILIES[family], "vocab_size": 128, "num_labels": 3, "pad_token_id": 0}
    )
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(workspace / "model")
    prepared = with_gradients(prepare(recipe(workspace), no_progress), no_progress)
    fisher = {name: 0 for name in prepared.plan.selected}
    for one in prepared.tokens.batches(1):
        seen = one.attention_mask[0].bool()
        model.zero_grad()
        F.cross_entropy(model(input_ids=one.input_ids[:, seen]).logits, one.labels).backward()
        for name in fisher:
            gradient = model.get_submodule(name).weight.grad.double()
            gradient = gradient if family == "llama" else gradient.T
            fisher[name] = fisher[name] + gradient.square().sum(0)
    found = {}
    for block in range(prepared.plan.n_blocks):
        found |= gradients_of_block(prepared, block)
    for name, expected in fisher.items():
        assert (found[name][Fisher].sum_i - expected).norm() < 1e-5 * expected.norm(), name
    report = compress.run(recipe(workspace, eval_windows=4, propagate="block"))
    assert report.scores.after.tasks


def test_tasks_that_were_asked_for_are_refused_even_if_they_are_those_of_a_language_model():
    config = AutoConfig.for_model("bert", architectures=["BertModel"])
    named = Recipe(model="m", tasks=DEFAULT_TASKS)
    with pytest.raises(RecipeError, match=r"offline_hellaswag.*--tasks none"):
        settled_for(named, config)
    assert settled_for(Recipe(model="m"), config).tasks == ()
    decoder = AutoConfig.for_model("llama")
    assert settled_for(Recipe(model="m"), decoder).tasks == DEFAULT_TASKS
    assert settled_for(Recipe(model="m", tasks=()), decoder).tasks == ()


@pytest.mark.parametrize(
    ("names", "kind", "head"),
    [
        (["LlamaForCausalLM"], "llama", Head.NEXT_TOKEN),
        (["GPT2LMHeadModel"], "gpt2", Head.NEXT_TOKEN),
        (None, "llama", Head.NEXT_TOKEN),
        (None, "bert", None),
        (["BertLMHeadModel"], "bert", None),
        (["BertForMaskedLM"], "bert", None),
        (["BertModel"], "bert", Head.FEATURES),
        (["LlamaForSequenceClassification"], "llama", Head.CLASSES),
        (["T5ForConditionalGeneration"], "t5", None),
        (["T5Model"], "t5", None),
    ],
)
def test_the_head_follows_from_the_class_that_the_config_names(names, kind, head):
    assert head_of(AutoConfig.for_model(kind, architectures=names)) is head
