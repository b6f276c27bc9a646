"""Fidelity: against the plainest code, on whole logits in float64."""

import math
import statistics
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.gpt2 import GPT2Config
from transformers.models.llama import LlamaConfig
from transformers.models.opt import OPTConfig
from transformers.models.qwen3_moe import Qwen3MoeConfig

from eval import logits
from eval.errors import EvalError
from eval.fidelity import compare

VOCAB = 97
TINY = {"vocab_size": VOCAB, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = TINY | {"hidden_size": 16, "intermediate_size": 24, "num_key_value_heads": 1}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**LLAMA),
    "gemma3": lambda: Gemma3TextConfig(**LLAMA, head_dim=8, final_logit_softcapping=0.1),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **LLAMA, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8
    ),
    "gpt2": lambda: GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2),
    "opt": lambda: OPTConfig(**TINY, hidden_size=16, ffn_dim=24, word_embed_proj_dim=16),
}


def tiny(name: str = "llama", seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[name]())
    for parameter in model.parameters():
        parameter.data.mul_(5)
    return model.eval()


def windows(n: int = 3, t: int = 20) -> Tensor:
    return torch.randint(VOCAB, (n, t), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "PIECE_BYTES", 4 * VOCAB * 7)


@torch.inference_mode()
def plain(
    reference: PreTrainedModel, model: PreTrainedModel, ids: Tensor
) -> dict[str, list[float]]:
    """Means of each window, from whole logits in float64."""
    log_p, log_q = (
        m(input_ids=ids).logits[:, :-1].double().log_softmax(-1) for m in (reference, model)
    )
    nll = -log_q.gather(-1, ids[:, 1:, None])
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    same = (log_p.argmax(-1) == log_q.argmax(-1)).double()
    return {
        "nll": nll.mean((1, 2)).tolist(),
        "kl": kl.mean(1).tolist(),
        "top1": same.mean(1).tolist(),
    }


@pytest.mark.usefixtures("_small_pieces")
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_pieces_of_logits_are_the_models_logits(name: str) -> None:
    model, ids = tiny(name), windows()
    with torch.inference_mode():
        whole = model(input_ids=ids).logits
        pieces = logits.LogitPieces.of("it", model, ids)
        assert pieces.decoded is not None
        for row in range(len(ids)):
            parts = list(pieces.window(row))
            assert max(len(part) for part in parts) == 7
            torch.testing.assert_close(torch.cat(parts), whole[row], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(input_ids=ids).logits, whole, rtol=0, atol=0)


@pytest.mark.usefixtures("_small_pieces")
def test_a_forward_that_bypasses_the_decoder_gives_the_same_logits() -> None:
    model, ids = tiny(), windows()
    bystander = deepcopy(model.get_decoder())
    model.get_decoder = lambda: bystander  # type: ignore[method-assign]
    with torch.inference_mode():
        whole = model(input_ids=ids).logits
        pieces = logits.LogitPieces.of("it", model, ids)
        assert pieces.decoded is None
        torch.testing.assert_close(torch.cat(list(pieces.window(1))), whole[1])


@pytest.mark.usefixtures("_small_pieces")
def test_fidelity_equals_the_plain_formulas() -> None:
    reference, model, ids = tiny(seed=0), tiny(seed=1), windows()
    expected = plain(reference, model, ids)
    _, found = compare(reference, model, [ids[:2], ids[2:]])
    assert found.n_tokens == 3 * 19
    perplexity = math.exp(statistics.fmean(expected["nll"]))
    assert found.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert found.kl == pytest.approx(statistics.fmean(expected["kl"]), rel=1e-5)
    assert found.top1_agreement == pytest.approx(statistics.fmean(expected["top1"]))
    deviation = {key: statistics.stdev(values) / 3**0.5 for key, values in expected.items()}
    assert found.perplexity_stderr == pytest.approx(perplexity * deviation["nll"], rel=1e-4)
    assert found.kl_stderr == pytest.approx(deviation["kl"], rel=1e-4)
    assert found.top1_stderr == pytest.approx(deviation["top1"])


def test_a_model_is_exactly_faithful_to_itself() -> None:
    model = tiny()
    original, found = compare(model, model, [windows()])
    assert (found.kl, found.top1_agreement) == (0.0, 1.0)
    assert found.perplexity == original.perplexity
    assert (original.kl, original.top1_agreement) == (0.0, 1.0)


def test_how_windows_are_batched_changes_nothing() -> None:
    reference, model, ids = tiny(seed=0), tiny(seed=1), windows(4)
    together = compare(reference, model, [ids])[1]
    singly = compare(reference, model, list(ids.split(1)))[1]
    assert singly.kl == pytest.approx(together.kl, rel=1e-6)
    assert singly.perplexity == pytest.approx(together.perplexity, rel=1e-6)


def test_a_single_window_has_no_standard_error() -> None:
    found = compare(tiny(seed=0), tiny(seed=1), [windows(1)])[1]
    assert found.kl_stderr is None
    assert found.perplexity_stderr is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_model_and_window_with_bad_logits_are_named(value: float) -> None:
    reference, model, ids = tiny(seed=0), tiny(seed=1), windows()
    ids[ids == 5] = 6
    ids[1, 3] = 5
    model.get_input_embeddings().weight.data[5] = value
    with pytest.raises(EvalError, match=r"compressed model: NaN or infinite .* window 1;"):
        compare(reference, model, [ids])
    with pytest.raises(EvalError, match=r"original: NaN or infinite .* window 1;"):
        compare(model, reference, [ids[:1], ids[1:]])


def test_what_cannot_be_compared_is_refused() -> None:
    model = tiny()
    with pytest.raises(EvalError, match="no window"):
        compare(model, model, [])
    with pytest.raises(EvalError, match="tokens >= 2"):
        compare(model, model, [windows(2, 1)])
    with pytest.raises(EvalError, match="token id 97"):
        compare(model, model, [torch.full((1, 4), VOCAB)])
    other = AutoModelForCausalLM.from_config(LlamaConfig(**(LLAMA | {"vocab_size": 50})))
    with pytest.raises(EvalError, match="vocabularies differ"):
        compare(model, other, [windows()])


def test_progress_counts_windows() -> None:
    seen: list[tuple[str, int, int]] = []
    model, ids = tiny(), windows()
    compare(model, model, [ids[:2], ids[2:]], progress=lambda *step: seen.append(step))
    assert seen == [("fidelity", 2, 3), ("fidelity", 3, 3)]


def test_the_sums_of_the_windows_make_the_totals_of_both_models() -> None:
    reference, model, ids = tiny(), tiny(seed=1), windows(n=4)
    for found in compare(reference, model, [ids[:3], ids[3:]]):
        assert [part.n_tokens for part in found.windows] == [19] * 4
        n_tokens = sum(part.n_tokens for part in found.windows)
        assert found.n_tokens == n_tokens
        nll = math.fsum(part.nll for part in found.windows)
        assert found.perplexity == pytest.approx(math.exp(nll / n_tokens), rel=1e-12)
        kl = math.fsum(part.kl for part in found.windows)
        assert found.kl == pytest.approx(kl / n_tokens, rel=1e-12)
        assert found.top1_agreement == sum(part.n_agreements for part in found.windows) / n_tokens
