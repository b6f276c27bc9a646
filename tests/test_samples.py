"""What both models write: the plainest greedy loop writes the same."""

from pathlib import Path

import pytest
import torch
from families import save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from eval.samples import NEW_TOKENS, sample


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny(tmp_path, num_key_value_heads=4)
    return tmp_path


@torch.inference_mode()
def greedy(model: PreTrainedModel, ids: list[int], n: int) -> list[int]:
    end = model.generation_config.eos_token_id
    written: list[int] = []
    while len(written) < n and (not written or written[-1] != end):
        logits = model(torch.tensor([ids + written])).logits[0, -1]
        written.append(int(logits.argmax()))
    return written


def test_samples_are_what_a_plain_greedy_loop_writes(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    # Settings that a checkpoint may come with, which would make it sample.
    model.generation_config.do_sample = True
    model.generation_config.temperature = 2.0
    other = AutoModelForCausalLM.from_pretrained(folder).eval()
    for parameter in other.parameters():
        parameter.data.mul_(-1.3)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    (found,) = sample(model, other, tokenizer, ["the quick brown"])
    ids = tokenizer("the quick brown").input_ids
    room = min(NEW_TOKENS, model.config.max_position_embeddings - len(ids))
    for text, each in ((found.before, model), (found.after, other)):
        assert text == tokenizer.decode(greedy(each, ids, room), skip_special_tokens=True)
    assert found.framing == "text"


def test_a_chat_template_frames_the_prompt_and_one_that_fails_does_not(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} fox{% endfor %}"
    (chat,) = sample(model, model, tokenizer, ["the quick"])
    tokenizer.chat_template = None
    (plain,) = sample(model, model, tokenizer, ["the quick fox"])
    assert (chat.framing, chat.before) == ("chat", plain.before)
    tokenizer.chat_template = "{{ raise_exception('a system message first') }}"
    assert sample(model, model, tokenizer, ["the quick"])[0].framing == "text"


def test_a_prompt_that_fills_the_context_is_left_out(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert sample(model, model, tokenizer, ["the " * 2000]) == ()
