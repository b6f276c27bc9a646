"""A shared context read once gives what reading it for every continuation gives."""

import pytest
import torch

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
    assert shares_contexts(model)
    found = dict(log_likelihoods(model, items(REQUESTS, 4, 64), 4))
    assert sorted(found) == [0, 1, 2, 3, 4]  # the others share no context of 2 tokens or more
    for position, (value, greedy) in found.items():
        expected, expected_greedy = plain(model, *REQUESTS[position])
        assert value == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert greedy == expected_greedy


@pytest.mark.parametrize("family", sorted(SLIDING))
def test_a_model_with_sliding_windows_is_left_to_the_harness(family: str) -> None:
    assert not shares_contexts(tiny_model(family))


def test_a_greedy_continuation_is_told_from_one_that_is_not() -> None:
    model = tiny_model("llama")
    context = (5, 6, 7)
    with torch.no_grad():
        best = int(model(torch.tensor([context])).logits[0, -1].argmax())
    requests = [(context, (best,)), (context, ((best + 1) % 100,))]
    found = dict(log_likelihoods(model, items(requests, 4, 64), 4))
    assert [found[k][1] for k in (0, 1)] == [True, False]


def test_a_context_with_a_continuation_that_must_be_cut_is_left_to_the_harness() -> None:
    assert [item.context for item in items(REQUESTS, 4, 8)] == [(5, 6, 7, 8), (12, 13)]
    assert [item.context for item in items(REQUESTS, 4, 7)] == [(12, 13)]


def test_no_forward_has_more_continuations_than_the_batch_size() -> None:
    requests = [((5, 6), (k,)) for k in range(10, 17)]
    model = tiny_model("llama")
    sizes = []
    model.register_forward_pre_hook(
        lambda *_: sizes.append(_[2]["input_ids"].shape[0]), with_kwargs=True
    )
    found = dict(log_likelihoods(model, items(requests, 3, 64), 3))
    assert max(sizes) == 3
    assert sorted(found) == [0, 1, 2, 3, 4, 5]  # the seventh is alone in its piece


def test_the_choices_of_a_task_cost_their_context_once() -> None:
    model = tiny_model("llama", vocab_size=160, max_position_embeddings=1024)
    tokens = []
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda _, args: tokens.append(args[0].numel()))
    scores = run_tasks(
        model, byte_tokenizer(), ["offline_hellaswag"], Settings(limit=4, batch_size=4)
    )
    shared = sum(tokens)
    tokens.clear()
    model.get_decoder = lambda: model  # what a model does that has no decoder of its own
    assert (
        run_tasks(model, byte_tokenizer(), ["offline_hellaswag"], Settings(limit=4, batch_size=4))
        == scores
    )
    assert shared < 0.8 * sum(tokens)
