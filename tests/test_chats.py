"""Rows of chat messages become text by the tokenizer's chat template; text that is no Unicode is refused."""

import json

import datasets
import pyarrow
import pytest
from families import byte_tokenizer
from pyarrow import parquet
from tokenizers_with_specials import adding

from calibration.errors import InputError
from calibration.text.data import Split, TextSource, load_tokens, load_windows

TEMPLATE = (
    "<bos>{% for m in messages %}"
    "{% if m['role'] not in ('user', 'assistant') %}{{ raise_exception('no such role') }}{% endif %}"
    "{{ m['role'] }}: {{ m['content'] }}<eos>\n{% endfor %}"
)


def chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


CHATS = [chat(f"ask {n}", f"say {n}") for n in range(6)]
TEXTS = [f"user: ask {n}<eos>\nassistant: say {n}<eos>\n" for n in range(6)]


def tokenizer(template=TEMPLATE, single="<bos> $A"):
    made = adding(single)
    made.chat_template = template
    return made


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def first_window(path, reader, seq_len=100):
    window = load_windows(TextSource(str(path)), reader, n_sequences=1, seq_len=seq_len)
    return reader.decode(window.input_ids[0])


def test_a_window_of_chats_is_what_the_template_writes_with_one_bos_each(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": each} for each in CHATS])
    assert first_window(path, tokenizer()) == ("<bos>" + "<bos>".join(TEXTS))[: len_of(100)]


def len_of(n_tokens):
    """Characters of that many tokens of the joined chats: special tokens are five characters each."""
    ids = byte_tokenizer()("<bos>" + "<bos>".join(TEXTS)).input_ids[:n_tokens]
    return len(byte_tokenizer().decode(ids))


def test_parquet_and_the_words_of_sharegpt_give_the_same_tokens(tmp_path):
    names = {"user": "human", "assistant": "gpt"}
    others = [[{"from": names[m["role"]], "value": m["content"]} for m in each] for each in CHATS]
    paths = [
        write(tmp_path / "a.jsonl", [{"messages": each} for each in CHATS]),
        write(tmp_path / "b.jsonl", [{"id": 1, "conversations": each} for each in others]),
        tmp_path / "c.parquet",
        tmp_path / "d.parquet",
    ]
    parquet.write_table(pyarrow.table({"messages": CHATS}), paths[2])
    parquet.write_table(pyarrow.table({"conversations": others}), paths[3])
    assert len({first_window(path, tokenizer()) for path in paths}) == 1


def test_chats_of_the_hub_are_rendered(monkeypatch):
    def fake_load(*_, **__):
        return datasets.IterableDataset.from_generator(
            lambda: iter({"prompt": "x", "messages": each} for each in CHATS)
        )

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["test"])
    monkeypatch.setattr(datasets, "load_dataset", fake_load)
    assert first_window("owner/name", tokenizer(), 30).startswith("<bos>user: ask 0<eos>")


def test_a_template_that_writes_no_bos_gets_it_from_the_tokenizer(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": each} for each in CHATS])
    with_it, without = tokenizer(), tokenizer(TEMPLATE.removeprefix("<bos>"))
    assert first_window(path, with_it) == first_window(path, without)
    assert first_window(path, tokenizer(single="$A"), 30).startswith("<bos>user")


def test_a_tokenizer_without_a_template_is_refused_naming_the_source(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": each} for each in CHATS])
    with pytest.raises(
        InputError, match=r"a\.jsonl: rows of chat messages .* chat template.* 'text'"
    ):
        first_window(path, tokenizer(template=None))


BAD = {
    "line 2: no field 'messages', which the first row has": {"text": "plain"},
    "line 2: 'messages' is str, not a list of messages": {"messages": "hello"},
    "line 2: 'messages' is list, not a list of messages": {"messages": []},
    "line 2: message 2 of 'messages' has no role": {"messages": [CHATS[0][0], {"role": "user"}]},
    "line 2: message 1 of 'messages' has no role": {"messages": ["hello"]},
    "line 2: the tokenizer's chat template does not take": {
        "messages": [{"role": "tool", "content": "x"}]
    },
    "line 2: character 12 is '.ud83d', half of a surrogate": {"messages": chat("\ud83d", "x")},
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_row_of_messages_is_refused_by_its_line(tmp_path, message):
    path = write(tmp_path / "a.jsonl", [{"messages": CHATS[0]}, BAD[message]])
    with pytest.raises(InputError, match=message):
        first_window(path, tokenizer())


@pytest.mark.parametrize("fault", ["{{ 1 / 0 }}", "{{ messages[9].role.x }}", "{{ messages + 1 }}"])
def test_whatever_a_template_ends_with_is_told_with_the_row(tmp_path, fault):
    path = write(tmp_path / "a.jsonl", [{"messages": CHATS[0]}])
    with pytest.raises(InputError, match=r"line 1: the tokenizer's chat template does not take"):
        first_window(path, tokenizer(fault))


def test_rows_of_parquet_that_are_no_messages_are_refused(tmp_path):
    table = pyarrow.table({"messages": ["hello"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match="column 'messages' holds string, not lists of messages"):
        first_window(tmp_path / "a.parquet", tokenizer())
    table = pyarrow.table({"messages": [CHATS[0], [{"role": "user", "content": None}]]})
    parquet.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet, row 1: message 1 of 'messages' has no role"):
        first_window(tmp_path / "b.parquet", tokenizer())


def test_a_call_of_a_tool_needs_no_content(tmp_path):
    calls = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
    rows = [{"messages": [{"role": "user", "content": None, "tool_calls": calls}]}] * 9
    path = write(tmp_path / "a.jsonl", rows)
    reader = tokenizer("{% for m in messages %}{{ m.tool_calls[0].function.name }}{% endfor %}")
    assert first_window(path, reader, 4) == "<bos>f<eos><bos>"


# Text that is no Unicode, and masks that are none. -------------------------------------------


def test_half_a_surrogate_pair_is_refused_by_its_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "ab"}\n\n{"text": "cut \\ud83d here"}\n')
    with pytest.raises(InputError, match=r"line 3: character 5 is '.ud83d', half of a surrogate"):
        first_window(tmp_path / "a.jsonl", byte_tokenizer())
    # Both halves are an emoji.
    (tmp_path / "b.jsonl").write_text('{"text": "\\ud83d\\ude00 and more"}\n')
    assert "more" in first_window(tmp_path / "b.jsonl", byte_tokenizer(), 9)


def test_parquet_text_that_is_no_utf8_is_refused(tmp_path):
    raw = pyarrow.array([b"good", b"\xed\xa0\xbd"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": raw}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet: .*Invalid UTF8 sequence at string index 1"):
        first_window(tmp_path / "a.parquet", byte_tokenizer())


@pytest.mark.parametrize("mask", [[[1], [1]], [1, [0]], [1, "1"], [1, None], [1, 2]])
def test_a_mask_that_is_not_zeros_and_ones_is_refused(tmp_path, mask):
    path = write(tmp_path / "a.jsonl", [{"input_ids": [5, 6], "attention_mask": mask}])
    with pytest.raises(InputError, match="row 0: the attention_mask is not 2 times 0 or 1"):
        load(path)


@pytest.mark.parametrize("mask", [1, "11", None, {"a": 1}])
def test_a_mask_that_is_no_list_is_refused(tmp_path, mask):
    path = write(tmp_path / "a.jsonl", [{"input_ids": [5, 6], "attention_mask": mask}])
    with pytest.raises(InputError, match="'attention_mask' is not a list"):
        load(path)


@pytest.mark.parametrize("masks", [[1, 0], ["a", "b"], [{"a": 1}, {"a": 2}]])
def test_a_column_of_masks_that_are_no_lists_is_refused(tmp_path, masks):
    table = pyarrow.table({"input_ids": [[5, 6], [7, 8]], "attention_mask": masks})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"column 'attention_mask' holds .*, not lists"):
        load(tmp_path / "a.parquet")


def load(path):
    return load_tokens(
        [TextSource(str(path))],
        byte_tokenizer(),
        n_sequences=1,
        seq_len=4,
        seed=0,
        split=Split.CALIBRATION,
    )
