"""The built-in tasks: upstream's prompts, upstream's data, in a fixed order."""

import gzip
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from eval.catalog import BUILTIN_FOLDER
from eval.tasks import offline

UPSTREAM = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
}
SHARED = Path(__file__).parents[1] / ".." / "shared" / "data" / "eval"
SHARED_FILES = {
    "hellaswag": "hellaswag_val.jsonl",
    "piqa": "piqa_val.jsonl",
    "arc_easy": "arc_easy_test.jsonl",
    "arc_challenge": "arc_challenge_test.jsonl",
}
HELLASWAG = {
    "activity_label": "Making a cake",
    "ctx_a": "[header] How to [title] Bake. A man stirs.",
    "ctx_b": "he then",
    "endings": ["bakes [substeps] it.", "sings.", "runs  away.", "naps."],
    "label": "2",
}
PIQA = {"goal": "To open a jar,", "sol1": "twist the lid.", "sol2": "eat the lid.", "label": 1}
ARC = {
    "id": "Mercury_1",
    "question": "What is hot?",
    "choices": {"text": ["ice", "the Sun", "snow"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}
ROWS = {"hellaswag": HELLASWAG, "piqa": PIQA, "arc_easy": ARC, "arc_challenge": ARC}


def arc_requests(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The row as the wheel has it: two requests for each choice, with and without the question."""
    texts, gold = row["choices"]["text"], row["choices"]["label"].index(row["answerKey"])
    query = f"Question: {row['question']}\nAnswer:"
    doc = {"id": row["id"], "query": query, "choices": texts, "gold": gold}
    return [{"doc": doc, "request": {"continuation": f" {text}"}} for text in texts * 2]


def upstream_task(name: str, rows: list[dict[str, Any]]) -> ConfigurableTask:
    """lm-eval's own task of this name, on these rows instead of the hub's."""
    config = load_yaml(Path(str(files("lm_eval"))) / "tasks" / UPSTREAM[name])
    for key in ("tag", "dataset_path", "dataset_name", "training_split"):
        config.pop(key, None)
    config["fewshot_split"] = split = "validation" if name in ("hellaswag", "piqa") else "test"
    config["validation_split"] = "validation" if split == "validation" else None
    config["custom_dataset"] = lambda **_: DatasetDict({split: Dataset.from_list(rows)})
    return ConfigurableTask(config=config)


def our_task(name: str) -> ConfigurableTask:
    return ConfigurableTask(config=load_yaml(BUILTIN_FOLDER / f"offline_{name}.yaml"))


def rendered(task: ConfigurableTask, n_docs: int) -> list[tuple[Any, ...]]:
    """Prompt, choices and right answer of the first documents, and every request made of them."""
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(limit=n_docs)
    docs = list(task.eval_docs)[:n_docs]
    seen: list[tuple[Any, ...]] = [
        (task.doc_to_text(doc), task.doc_to_choice(doc), int(task.doc_to_target(doc)))
        for doc in docs
    ]
    return [*seen, *(instance.args for instance in task.instances)]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as if extracted from the wheel, with one row in each test set."""
    for name, row in ROWS.items():
        if name.startswith("arc"):
            lines = "".join(json.dumps(request) + "\n" for request in arc_requests(row))
            (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        else:
            Dataset.from_list([row]).save_to_disk(tmp_path / name)
            saved = next((tmp_path / name).glob("*.arrow"))
            saved.rename(tmp_path / f"{name}.arrow")
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "data"
    name = f"{offline.REQUIREMENT.replace('==', '-')}-{offline.SHA256[:12]}"
    folder.mkdir(parents=True)
    (folder / name).symlink_to(tmp_path, target_is_directory=True)
    return tmp_path


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize("name", sorted(UPSTREAM))
def test_prompts_and_requests_equal_upstreams(name: str) -> None:
    assert rendered(our_task(name), 1) == rendered(upstream_task(name, [ROWS[name]]), 1)


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize("name", sorted(UPSTREAM))
def test_metrics_and_version_equal_upstreams(name: str) -> None:
    ours, upstream = our_task(name), upstream_task(name, [ROWS[name]])
    assert list(ours.aggregation()) == list(upstream.aggregation()) == ["acc", "acc_norm"]
    assert ours.VERSION == upstream.VERSION
    assert ours.higher_is_better() == upstream.higher_is_better()


def test_shuffling_is_fixed_and_keeps_its_argument() -> None:
    rows = [{"k": k} for k in range(20)]
    assert offline.shuffled(rows) == offline.shuffled(rows) != rows
    assert rows == [{"k": k} for k in range(20)]


@pytest.mark.slow
@pytest.mark.hub
@pytest.mark.parametrize("name", sorted(UPSTREAM))
def test_the_wheels_rows_are_those_of_the_original_data_sets(name: str) -> None:
    if not SHARED.is_dir():
        pytest.skip(f"needs {SHARED}")
    lines = (SHARED / SHARED_FILES[name]).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    ours = rendered(our_task(name), 100_000)[: len(list(our_task(name).eval_docs))]
    n = {"hellaswag": 10_042, "piqa": 1_838, "arc_easy": 2_376, "arc_challenge": 1_172}[name]
    assert len(ours) == n
    theirs = rendered(upstream_task(name, rows), 100_000)[: len(rows)]
    # The copy has the first 4,000 of HellaSwag's items, in the order that is ours as well.
    assert ours[: len(theirs)] == theirs
