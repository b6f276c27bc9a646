"""A shared context read once gives what reading it for every continuation gives."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from eval.contexts import items, log_likelihoods, shares_contexts
from eval.harness import Settings, run_tasks
from tests.families import FAMILIES, byte_tokenizer, tiny_model

SLIDING = {"mistral", "gemma3_text"}
REQUESTS = [
    ((5, 6, 7, 8), (9, 10, 11)),
    ((12, 13), (14,)),
    ((5, 6, 7, 8), (15,)),
    ((12, 13), (16, 17)),
    ((5, 6, 7, 8), (9, 10, 18, 19, 20)),
    ((21, 22, 23), (24,)),
    ((25,), (26,)),
    ((25,), (27,)),
]


def plain(model, context, continuation):
    """One request on its own, in fp64."""
    ids = torch.tensor([[*context, *continuation]])
    with torch.no_grad():
        log_p = model(ids).logits[0, :-1].double().log_softmax(-1)[len(context) - 1 :]
    target = torch.tensor(continuation)
    return float(log_p.gather(1, target[:, None]).sum()), bool((log_p.argmax(1) == target).all())


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - SLIDING))
def test_answers_are_those_of_a_forward_for_every_request(family: str) -> None:
    model = tiny_model(family)
    assert shares_contexts(model, 128, 64)
    found = dict(log_likelihoods(model, items(REQUESTS, 4, 64), 4, 64))
    assert sorted(found) == [0, 1, 2, 3, 4]  # the others share no context of 2 tokens or more
    for position, (value, greedy) in found.items():
        expected, expected_greedy = plain(model, *REQUESTS[position])
        assert value == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert greedy == expected_greedy


@pytest.mark.parametrize("family", sorted(SLIDING))
def test_a_model_with_sliding_windows_is_left_to_the_harness(family: str) -> None:
    assert not shares_contexts(tiny_model(family), 128, 64)


def test_a_greedy_continuation_is_told_from_one_that_is_not() -> None:
    model = tiny_model("llama")
    context = (5, 6, 7)
    with torch.no_grad():
        best = int(model(torch.tensor([context])).logits[0, -1].argmax())
        then = int(model(torch.tensor([(*context, best)])).logits[0, -1].argmax())
    requests = [(context, (best, then)), (context, (best + 1, then))]
    found = dict(log_likelihoods(model, items(requests, 4, 64), 4, 64))
    assert [found[k][1] for k in (0, 1)] == [True, False]


def test_a_context_with_a_continuation_that_must_be_cut_is_left_to_the_harness() -> None:
    assert [item.context for item in items(REQUESTS, 4, 8)] == [(5, 6, 7, 8), (12, 13)]
    assert [item.context for item in items(REQUESTS, 4, 7)] == [(12, 13)]


def test_no_forward_has_more_continuations_than_the_batch_size() -> None:
    requests = [((5, 6), (k, k)) for k in range(10, 17)]
    model = tiny_model("llama")
    sizes = []
    model.register_forward_pre_hook(
        lambda *_: sizes.append(_[2]["input_ids"].shape[0]), with_kwargs=True
    )
    found = dict(log_likelihoods(model, items(requests, 3, 64), 3, 64))
    assert max(sizes) == 3
    assert sorted(found) == [0, 1, 2, 3, 4, 5]  # the seventh is alone in its piece


def test_the_choices_of_a_task_cost_their_context_once() -> None:
    model = tiny_model("llama", vocab_size=160, max_position_embeddings=1024)
    tokens = []
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda _, args: tokens.append(args[0].numel()))
    scores = run_tasks(
        model, byte_tokenizer(), ["offline_hellaswag"], Settings(limit=2, batch_size=4)
    )
    shared = sum(tokens)
    tokens.clear()
    model.get_decoder = lambda: model  # what a model does that has no decoder of its own
    assert (
        run_tasks(model, byte_tokenizer(), ["offline_hellaswag"], Settings(limit=2, batch_size=4))
        == scores
    )
    assert shared < 0.8 * sum(tokens)


def test_choices_of_one_token_are_left_to_the_harness_which_reads_them_at_once() -> None:
    assert items([((5, 6), (7,)), ((5, 6), (8,))], 4, 64) == []


OTHERS = {
    "bart": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "is_decoder": True},
    "roberta": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "is_decoder": True,
    },
}


@pytest.mark.parametrize("family", sorted(OTHERS))
def test_a_model_that_counts_positions_another_way_is_left_to_the_harness(family: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=128, **OTHERS[family])
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert not shares_contexts(model, 128, 64)


def test_a_batch_is_never_wider_than_the_model_reads() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt_neo", vocab_size=128, hidden_size=32, num_layers=2, num_heads=4,
        attention_types=[[["global"], 2]], max_position_embeddings=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    long, short = tuple(range(3, 63)), tuple(range(3, 43))
    requests = [(long, (5, 6)), (long, (7,)), (short, tuple(range(9, 30))), (short, (8,))]
    found = dict(log_likelihoods(model, items(requests, 8, 64), 8, 64))
    for position, (value, _) in found.items():
        assert value == pytest.approx(plain(model, *requests[position])[0], rel=1e-4)
    assert len(found) == 4
