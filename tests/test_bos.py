"""The tokens that windows begin with, from recipe to report; perplexity beside that of lm-eval and of plain code."""

import json
import math
from dataclasses import replace

import pytest
import torch
from families import tiny_model
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers_with_specials import BOS, EOS, adding
from workspaces import recipe

import compress
from calibration.backward import next_token_loss
from calibration.bos import Bos
from calibration.text.data import TextSource, Tokens, load_windows
from compress.errors import ComparisonError, RecipeError
from compress.methods.rtn import RTN
from compress.report.comparable import differences_between
from compress.report.comparison import Differences, Run, compare_runs
from eval.errors import EvalError
from eval.fidelity import compare
from eval.samples import PROMPTS, sample

pytestmark = pytest.mark.usefixtures("quick_verification")


@pytest.fixture
def beginning(workspace):
    """The workspace, with a tokenizer that puts <bos> in front of every text, and one text of several documents."""
    adding("<bos> $A <eos>").save_pretrained(workspace / "model")
    text = (workspace / "text.txt").read_text()
    rows = [{"text": text[n : n + 400]} for n in range(0, len(text), 400)]
    (workspace / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return workspace


def quick(workspace, **changes):
    """A recipe that rounds, on the rows."""
    source = str(workspace / "rows.jsonl")
    options = {"method": RTN(group_size=32), "calibration": (source,), "eval_text": source}
    return recipe(workspace, **{**options, **changes})


# Perplexity. ---------------------------------------------------------------------------------


def one_document(tmp_path, n_windows=3, seq_len=24):
    """Windows of one document, with a tokenizer that adds <bos>."""
    path = tmp_path / "a.txt"
    path.write_text("the quick brown fox jumps over the lazy dog, and 42 bears run away. " * 9)
    tokenizer = adding("<bos> $A")
    options = {"n_sequences": n_windows, "seq_len": seq_len}
    return load_windows(TextSource(str(path)), tokenizer, **options), tokenizer


def fidelity(model, windows):
    return compare(model, model, [windows.input_ids], ignored=[windows.inserted])[0]


def test_perplexity_is_lm_evals_rolling_perplexity_with_the_prefix_token(tmp_path):
    model = tiny_model("llama")
    windows, tokenizer = one_document(tmp_path)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, add_bos_token=False, max_length=24)
    assert harness.prefix_token_id == BOS
    texts = [tokenizer.decode(row[1:]) for row in windows.input_ids]
    requests = [
        Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=k)
        for k, text in enumerate(texts)
    ]
    log_likelihoods = harness.loglikelihood_rolling(requests, disable_tqdm=True)
    found = fidelity(model, windows)
    assert [window.nll for window in found.windows] == pytest.approx(
        [-each for each in log_likelihoods], rel=1e-5
    )
    assert found.n_tokens == 3 * 23
    assert found.perplexity == pytest.approx(math.exp(-sum(log_likelihoods) / 69), rel=1e-5)


@torch.inference_mode()
def test_special_tokens_are_read_and_not_judged(tmp_path):
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "a quick fox " * n}) + "\n" for n in range(1, 9)))
    windows = load_windows(TextSource(str(path)), adding("<bos> $A"), n_sequences=None, seq_len=24)
    nlls, kls, same = [], [], []
    for row in windows.input_ids:
        log_p, log_q = (
            each(input_ids=row[None]).logits[0].double().log_softmax(-1) for each in (model, other)
        )
        for k, target in enumerate(row[1:].tolist()):
            if target not in (BOS, EOS):
                nlls.append(-log_q[k, target].item())
                kls.append((log_p[k].exp() * (log_p[k] - log_q[k])).sum().item())
                same.append(float(log_p[k].argmax() == log_q[k].argmax()))
    batches = list(windows.batches(2))
    _, found = compare(
        model,
        other,
        [batch.input_ids for batch in batches],
        ignored=[batch.inserted for batch in batches],
    )
    assert found.n_tokens == len(nlls) < windows.input_ids[:, 1:].numel()
    assert found.perplexity == pytest.approx(math.exp(sum(nlls) / len(nlls)), rel=1e-5)
    assert found.kl == pytest.approx(sum(kls) / len(kls), rel=1e-4)
    assert found.top1_agreement == pytest.approx(sum(same) / len(same))
    assert sum(window.n_tokens for window in found.windows) == found.n_tokens


def test_windows_without_a_token_to_judge_are_refused():
    model = tiny_model("llama")
    ids = torch.full((1, 4), EOS)
    with pytest.raises(EvalError, match="eval_text: every token of the windows is a special one"):
        compare(model, model, [ids], ignored=[torch.ones_like(ids).bool()])
    with pytest.raises(EvalError, match="not one bool for each token"):
        compare(model, model, [ids], ignored=[torch.ones(1, 3).bool()])


def test_the_loss_of_gradients_leaves_special_tokens_out_too():
    model = tiny_model("llama")
    ids = torch.tensor([[BOS, 7, 8, EOS, BOS, 9, 10]])
    inserted = (ids == BOS) | (ids == EOS)
    output = model(input_ids=ids)
    expected = -sum(output.logits[0, k - 1].log_softmax(-1)[ids[0, k]].item() for k in (1, 2, 5, 6))
    found = next_token_loss(output, Tokens(ids, None, {}, inserted=inserted))
    assert found.item() == pytest.approx(expected, rel=1e-5)


# Recipe, plan, statistics, report. -----------------------------------------------------------


def test_a_plan_prints_the_first_tokens_of_its_windows(beginning):
    lines = compress.plan(quick(beginning, eval_windows=2)).lines()
    assert [line for line in lines if "first window" in line] == [
        "calibration text: 8 x 32 tokens; the first window begins '<bos>' 'a' 'n' 'd' ' ' 'r'",
        "evaluation text: 2 x 32 tokens; the first window begins '<bos>' 't' 'h' 'e' ' ' 'q'",
    ]
    lines = compress.plan(quick(beginning, eval_windows=2, bos="never")).lines()
    assert any(line.endswith("begins 't' 'h' 'e' ' ' 'q' 'u'") for line in lines)


@pytest.mark.slow
def test_statistics_of_windows_that_begin_otherwise_are_not_used_again(beginning):
    def run(name, bos):
        report = compress.run(quick(beginning, bos=bos, out=beginning / name))
        return any("used again" in note for note in report.notes)

    assert [run("a", "auto"), run("b", "never"), run("c", "auto")] == [False, False, True]
    # The same tokens by another word.
    assert run("d", "always")


def test_the_report_says_what_windows_begin_with_and_runs_that_differ_in_it_are_not_compared(
    beginning,
):
    reports = {
        bos: compress.run(quick(beginning, bos=bos, eval_windows=2, out=beginning / bos))
        for bos in ("auto", "never")
    }
    assert [it.scores.prefix for it in reports.values()] == ["<bos>", ""]
    assert [it.recipe["bos"] for it in reports.values()] == ["auto", "never"]
    assert reports["auto"].calibration["sources"][0]["prefix"] == "<bos>"
    counts = [it.scores.after.fidelity.n_tokens for it in reports.values()]
    assert counts[0] <= 62
    told = [each.text for each in differences_between(reports)]
    expected = "bos: windows begin with <bos> in auto, windows begin with no special token in never"
    assert expected in told and not any(text.startswith("eval_text") for text in told)
    with pytest.raises(ComparisonError, match="bos: windows begin with <bos> in auto"):
        compare_runs(
            [Run(label=label, folder=beginning, report=it) for label, it in reports.items()],
            Differences.REFUSE,
        )
    # A report that did not record it is none with another beginning.
    old = replace(reports["never"], scores=replace(reports["never"].scores, prefix=None))
    fields = [each.field for each in differences_between({"a": reports["auto"], "b": old})]
    assert "bos" not in fields and "eval_text" in fields


def test_always_without_a_bos_token_is_refused_by_the_option(workspace):
    path = workspace / "model" / "tokenizer_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({key: values[key] for key in values if key != "bos_token"}))
    for wanted in (compress.plan, compress.run):
        with pytest.raises(RecipeError, match="no bos_token; use auto or never") as caught:
            wanted(quick_text(workspace, bos=Bos.ALWAYS))
        assert caught.value.option == "bos"


def quick_text(workspace, **changes):
    return recipe(workspace, method=RTN(group_size=32), **changes)


def test_always_puts_the_token_there_even_if_the_tokenizer_does_not(workspace):
    lines = compress.plan(quick_text(workspace, bos="always")).lines()
    assert any("begins '<bos>'" in line for line in lines)
    lines = compress.plan(quick_text(workspace)).lines()
    assert not any("<bos>" in line for line in lines)


def test_ready_rows_that_begin_otherwise_are_noted(beginning):
    ids = adding("$A")("the quick brown fox jumps over the lazy dog").input_ids[:32]
    rows = [{"input_ids": [*ids[n:], *ids[:n]]} for n in range(8)]
    (beginning / "ids.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = quick(beginning, calibration=(str(beginning / "ids.jsonl"),))
    note = f"8 of 8 rows of token ids from {beginning / 'ids.jsonl'} do not begin with the special"
    assert any(note in each for each in compress.run(wanted).notes)
    assert any(note in line for line in compress.plan(replace(wanted, out=None)).lines())


# Samples. ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template", [None, "<bos>{{ messages[0].content }}", "{{ messages[0].content }}"]
)
def test_prompts_of_samples_begin_with_the_prefix_once_and_without_what_ends_a_text(template):
    tokenizer = adding("<bos> $A <eos>")
    tokenizer.chat_template = template
    seen = []

    class Spy:
        config = tiny_model("llama").config
        generation_config = None
        device = torch.device("cpu")

        def generate(self, ids, **_):
            seen.append(ids[0].tolist())
            return ids

    sample(Spy(), Spy(), tokenizer, PROMPTS[:1], prefix=(BOS,))
    own = tokenizer(PROMPTS[0], add_special_tokens=False).input_ids
    assert seen == [[BOS, *own]] * 2
