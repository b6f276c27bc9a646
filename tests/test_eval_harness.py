"""The harness on a ready model: names, items, scores, silence."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eval.catalog import builtin_tasks, check_tasks, task_manager
from eval.errors import EvalError
from eval.harness import Settings, run_tasks
from eval.lm import prefix_token_id
from eval.scores import TaskScore, paired_difference

END = "<|endoftext|>"
METRICS = [
    {"metric": name, "aggregation": "mean", "higher_is_better": True}
    for name in ("acc", "acc_norm")
]


def byte_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    vocab = {letter: k for k, letter in enumerate(sorted(ByteLevel.alphabet()))}
    vocab |= {token: 256 + k for k, token in enumerate([END, "<|im_start|>", "<|im_end|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({"eos_token": END} | special))


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tasks_folder(tmp_path: Path) -> Path:
    """Tasks `one` and `two`, a rolling one `text`, a group `both` and a tag `mine`."""
    rows = [
        {"q": f"{k} plus {k} is", "choices": [f"{k + k}", "none"], "a": k % 2} for k in range(9)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "metadata": {"version": 3.0},
    }
    choice = {
        "output_type": "multiple_choice",
        "tag": "mine",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "choices",
        "doc_to_target": "a",
        "metric_list": METRICS,
    }
    rolling = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{q}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    aggregate = {"metric": "acc", "aggregation": "mean", "weight_by_size": True}
    group = {"group": "both", "task": ["one", "two"], "aggregate_metric_list": [aggregate]}
    for name, config in {
        "one": {"task": "one"} | common | choice,
        "two": {"task": "two"} | common | choice,
        "text": {"task": "text"} | common | rolling,
        "both": group | {"metadata": {"version": 2.0}},
    }.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def run(names: list[str], folder: Path, **more: int) -> list[TaskScore]:
    settings = Settings(include_path=folder, **more)  # type: ignore[arg-type]
    return run_tasks(tiny_llama(more.pop("seed", 0)), byte_tokenizer(), names, settings)


@torch.inference_mode()
def log_likelihood(model: LlamaForCausalLM, context: str, continuation: str) -> float:
    tokenizer = byte_tokenizer()
    head, tail = tokenizer(context)["input_ids"], tokenizer(continuation)["input_ids"]
    log_p = model(torch.tensor([head + tail])).logits[0].double().log_softmax(-1)
    return sum(float(log_p[len(head) + k - 1, token]) for k, token in enumerate(tail))


def test_accuracy_is_that_of_the_plain_loop(tasks_folder: Path) -> None:
    model = tiny_llama()
    acc, acc_norm = run(["one"], tasks_folder)
    expected: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    for k in range(9):
        choices = [f"{k + k}", "none"]
        scores = [log_likelihood(model, f"{k} plus {k} is", f" {choice}") for choice in choices]
        normed = [s / len(choice) for s, choice in zip(scores, choices, strict=True)]
        for name, values in (("acc", scores), ("acc_norm", normed)):
            expected[name].append(float(values.index(max(values)) == k % 2))
    assert list(acc.per_item) == expected["acc"]
    assert list(acc_norm.per_item) == expected["acc_norm"]
    assert acc.value == pytest.approx(sum(expected["acc"]) / 9)
    assert (acc.n_items, acc.version, acc.higher_is_better, acc.n_shot) == (9, "3.0", True, 0)
    assert acc.stderr == pytest.approx(math.sqrt(acc.value * (1 - acc.value) / 8))


def test_the_limit_takes_the_first_items(tasks_folder: Path) -> None:
    everything, first = run(["one"], tasks_folder), run(["one"], tasks_folder, limit=4)
    assert first[0].per_item == everything[0].per_item[:4]


def test_batches_change_nothing(tasks_folder: Path) -> None:
    assert run(["one"], tasks_folder, batch_size=1) == run(["one"], tasks_folder, batch_size=5)


def test_groups_and_tags_run_their_tasks(tasks_folder: Path) -> None:
    found = run(["both", "mine", "text"], tasks_folder, limit=3)
    rows = [(score.task, score.metric, score.n_items) for score in found]
    each = [(task, metric, 3) for task in ("one", "two") for metric in ("acc", "acc_norm")]
    assert rows == [*each, ("both", "acc", 6), ("text", "bits_per_byte", 3)]
    group = found[4]
    assert group.per_item == found[0].per_item + found[2].per_item
    assert found[-1].per_item == ()
    assert found[-1].stderr is None
    assert not found[-1].higher_is_better


def test_a_task_can_be_named_by_its_file(tasks_folder: Path) -> None:
    assert run([str(tasks_folder / "one.yaml")], tasks_folder) == run(["one"], tasks_folder)


def test_two_models_are_compared_item_by_item(tasks_folder: Path) -> None:
    settings = Settings(include_path=tasks_folder)
    before, after = (
        run_tasks(tiny_llama(seed), byte_tokenizer(), ["one"], settings)[0] for seed in (0, 1)
    )
    difference, _ = paired_difference(after, before)
    assert difference == pytest.approx(after.value - before.value)


def test_nothing_is_printed(tasks_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(["both", "text"], tasks_folder)
    assert capfd.readouterr() == ("", "")


def test_progress_counts_names(tasks_folder: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    settings = Settings(include_path=tasks_folder, limit=1)
    run_tasks(
        tiny_llama(),
        byte_tokenizer(),
        ["one", "text"],
        settings,
        progress=lambda *step: seen.append(step),
    )
    assert seen == [("tasks", 0, 2), ("tasks", 1, 2), ("tasks", 2, 2)]


def test_global_state_is_left_alone(tasks_folder: Path) -> None:
    model, tokenizer = tiny_llama().train(), byte_tokenizer()
    state = torch.random.get_rng_state()
    run_tasks(model, tokenizer, ["one"], Settings(include_path=tasks_folder, limit=1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert tokenizer.pad_token is None


def test_a_model_that_gives_nan_is_refused(tasks_folder: Path) -> None:
    model = tiny_llama()
    model.model.norm.weight.data[0] = math.nan
    with pytest.raises(EvalError, match="NaN"):
        run_tasks(model, byte_tokenizer(), ["one"], Settings(include_path=tasks_folder))


def test_builtin_names_are_checked_without_reading_lm_evals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("eval.catalog.TaskManager", None)
    assert set(builtin_tasks()) == {
        f"offline_{name}" for name in ("arc_challenge", "arc_easy", "hellaswag", "piqa")
    }
    check_tasks(builtin_tasks())


def test_own_names_are_checked_without_reading_lm_evals(tasks_folder: Path) -> None:
    manager = task_manager(["both", "mine", "offline_piqa"], tasks_folder)
    assert "hellaswag" not in manager.all_tasks


@pytest.mark.slow
def test_unknown_names_are_refused_with_the_nearest_ones(tasks_folder: Path) -> None:
    with pytest.raises(EvalError, match=r"'ofline_piqa'; nearest: offline_piqa") as caught:
        check_tasks(["ofline_piqa", "one", "hellaswag"], tasks_folder)
    assert "offline_arc_easy" in str(caught.value)


@pytest.mark.slow
def test_a_group_may_name_upstream_tasks(tasks_folder: Path) -> None:
    (tasks_folder / "mixed.yaml").write_text("group: mixed\ntask: [one, hellaswag]\n")
    assert "hellaswag" in task_manager(["mixed"], tasks_folder).all_tasks


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="limit: 0"):
        Settings(limit=0)
    with pytest.raises(EvalError, match="batch_size: 0"):
        Settings(batch_size=0)
    with pytest.raises(EvalError, match="include_path"):
        check_tasks(["one"], tmp_path / "nowhere")


def test_data_that_cannot_be_read_are_named(tasks_folder: Path) -> None:
    config = yaml.safe_load((tasks_folder / "one.yaml").read_text())
    config["dataset_kwargs"]["data_files"]["test"] = str(tasks_folder / "missing.jsonl")
    (tasks_folder / "one.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(EvalError, match="one could not be loaded"):
        run(["one"], tasks_folder)


CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize(
    ("special", "template", "expected"),
    [
        ({"bos_token": "<|im_start|>"}, CHAT, 256),
        ({"eos_token": "<|im_end|>"}, CHAT, 256),
        ({"bos_token": END}, CHAT, None),
        ({"bos_token": "<|im_start|>"}, "{{ bos_token }}{{ messages }}", None),
        ({"bos_token": "<|im_start|>"}, None, None),
    ],
)
def test_unprompted_text_does_not_begin_like_a_chat(
    special: dict[str, str], template: str | None, expected: int | None
) -> None:
    tokenizer = byte_tokenizer(**special)
    tokenizer.chat_template = template
    assert prefix_token_id(tokenizer) == expected
