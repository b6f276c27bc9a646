"""Text in: what is read, what is refused, and that the seed decides the rest."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow
import pytest
import torch
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import calibration.text.drawing
from calibration.errors import InputError
from calibration.text.data import Split, TextSource, Tokens, load_tokens, load_windows, parse_source

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def byte_tokenizer():
    """One token a byte, and an end-of-text token; enough for every rule of cutting and mixing."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def numbered_words(n):
    return " ".join(f"w{i:06d}" for i in range(n))


def load(sources, tokenizer, n_sequences=4, seq_len=16, seed=0, split=Split.CALIBRATION):
    sources = [TextSource(str(s)) if not isinstance(s, TextSource) else s for s in sources]
    settings = {"n_sequences": n_sequences, "seq_len": seq_len, "seed": seed, "split": split}
    return load_tokens(sources, tokenizer, **settings)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_sequences_are_cut_from_the_text_and_never_overlap(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text(numbered_words(201))
    all_ids = tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
    tokens = load([path], tokenizer, n_sequences=50, seq_len=32)
    places = []
    for row in tokens.input_ids.tolist():
        places += [i for i in range(len(all_ids)) if all_ids[i : i + 32] == row]
    assert len(places) == 50
    assert all(b - a >= 32 for a, b in zip(sorted(places), sorted(places)[1:], strict=False))
    assert tokens.attention_mask is None and tokens.n_tokens == 50 * 32


def test_documents_are_joined_with_the_end_of_text_token(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "ab"}, {"text": "  "}, {"text": "cd"}])
    row = load_windows(TextSource(str(path)), tokenizer, n_sequences=1, seq_len=5).input_ids[0]
    assert tokenizer.decode(row) == "ab<end>cd"


@pytest.mark.parametrize("limit", [1 << 22, 100], ids=["all text", "pieces"])
def test_a_seed_gives_the_same_tokens_and_another_seed_others(
    tmp_path, tokenizer, monkeypatch, limit
):
    monkeypatch.setattr(calibration.text.drawing, "_TOKENISE_ALL_CHARACTERS", limit)
    path = write_rows(tmp_path / "a.jsonl", [{"text": numbered_words(n)} for n in range(1, 60)])
    prints = [load([path], tokenizer, seed=seed).fingerprint() for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.slow
def test_tokens_do_not_depend_on_the_hash_seed_or_the_place_of_the_file(tmp_path):
    code = (
        "import sys; from calibration.text.data import *; import runpy;"
        "tokenizer = runpy.run_path(sys.argv[1])['byte_tokenizer']();"
        "print(load_tokens([TextSource(sys.argv[2]), TextSource('python-docs')], tokenizer,"
        "n_sequences=8, seq_len=32, seed=3, split=Split.CALIBRATION).fingerprint())"
    )
    prints = set()
    for hash_seed, folder in (("0", "one"), ("1", "two")):
        path = tmp_path / folder / "a.jsonl"
        path.parent.mkdir()
        write_rows(path, [{"text": numbered_words(n)} for n in range(60)])
        done = subprocess.run(
            [sys.executable, "-c", code, __file__, str(path)],
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path(__file__).parents[1])},
            capture_output=True,
            text=True,
            check=True,
        )
        prints.add(done.stdout)
    assert len(prints) == 1


def test_pieces_of_a_long_text_do_not_overlap_and_begin_at_words(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(calibration.text.drawing, "_TOKENISE_ALL_CHARACTERS", 100)
    path = tmp_path / "a.txt"
    path.write_text(numbered_words(2000))
    tokens = load([path], tokenizer, n_sequences=100, seq_len=64)
    text = "".join(tokenizer.decode(row) for row in tokens.input_ids)
    words = [word for word in text.replace("<end>", " ").split() if len(word) == 7]
    assert len(words) == len(set(words)) > 500
    assert tokens.provenance["sources"][0]["drawn_from"] == "pieces at random places"
    with pytest.raises(InputError, match=r"10000 sequences of 64 tokens are asked for, there are"):
        load([path], tokenizer, n_sequences=10000, seq_len=64)


def test_shares_follow_the_weights_by_largest_remainder(tmp_path, tokenizer):
    names = []
    for letter in "abc":
        path = tmp_path / f"{letter}.txt"
        path.write_text(f"{letter} " * 5000)
        names.append(str(path))
    weights = (0.5, 0.335, 0.001)
    sources = [TextSource(name, w) for name, w in zip(names, weights, strict=True)]
    tokens = load(sources, tokenizer, n_sequences=10, seq_len=20)
    texts = [tokenizer.decode(row) for row in tokens.input_ids]
    counts = [sum(letter in text for text in texts) for letter in "abc"]
    assert counts == [5, 4, 1]
    assert [s["sequences"] for s in tokens.provenance["sources"]] == counts
    with pytest.raises(InputError, match="samples: 2 sequences for 3 source"):
        load(sources, tokenizer, n_sequences=2)


def test_too_little_text_is_refused_with_the_number_of_sequences(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("x" * 100)
    assert len(load([path], tokenizer, n_sequences=6)) == 6
    message = r"a\.txt: 7 sequences of 16 tokens are asked for, there are 6"
    with pytest.raises(InputError, match=message):
        load([path], tokenizer, n_sequences=7)
    with pytest.raises(InputError, match=message):
        load_windows(TextSource(str(path)), tokenizer, n_sequences=7, seq_len=16)


def test_the_same_text_twice_is_refused(tmp_path, tokenizer):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(numbered_words(100))
    with pytest.raises(InputError, match=r"b\.txt is the same text as .*a\.txt"):
        load([tmp_path / "a.txt", tmp_path / "b.txt"], tokenizer)


def test_provenance_says_exactly_what_was_read(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", [{"content": numbered_words(20)}] * 3)
    read = load([path], tokenizer).provenance
    source = read["sources"][0]
    digest = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout
    assert source["sha256"] == digest.split()[0] and source["source"] == str(path)
    assert (source["field"], source["rows"], source["documents"]) == ("content", 3, 3)
    assert source["tokens_read"] == 3 * 159 + 2 and source["sequences_available"] == 29
    assert (read["seed"], read["seq_len"], read["tokens"]) == (0, 16, 64)
    assert json.loads(json.dumps(read)) == read


def test_ready_ids_are_cut_and_padded_and_padding_never_counts(tmp_path, tokenizer):
    rows = [{"input_ids": [5] * 3}, {"input_ids": [6] * 40}]
    tokens = load([write_rows(tmp_path / "a.jsonl", rows)], tokenizer, n_sequences=2)
    by_length = sorted(tokens.attention_mask.sum(1).tolist())
    assert by_length == [3, 16] and tokens.n_tokens == 19
    short = tokens.input_ids[tokens.attention_mask.sum(1) == 3][0]
    assert short.tolist() == [5] * 3 + [tokenizer.eos_token_id] * 13


def test_a_given_mask_is_kept(tmp_path, tokenizer):
    rows = [{"input_ids": [1, 2, 3, 4], "attention_mask": [0, 1, 1, 0]}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    assert load([path], tokenizer, n_sequences=1, seq_len=4).attention_mask.tolist() == [
        [0, 1, 1, 0]
    ]


def test_parquet_gives_the_same_tokens_as_jsonl(tmp_path, tokenizer):
    texts = [numbered_words(n) for n in range(1, 40)]
    ids = [[n, n + 1, n + 2] for n in range(40)]
    for field, values in (("text", texts), ("input_ids", ids)):
        path = write_rows(tmp_path / f"{field}.jsonl", [{field: value} for value in values])
        parquet.write_table(pyarrow.table({field: values}), tmp_path / f"{field}.parquet")
        same = load([path], tokenizer).fingerprint()
        assert load([tmp_path / f"{field}.parquet"], tokenizer).fingerprint() == same


BAD_LINES = {
    "not valid JSON": '{"text": "a"}\n{"text": \n',
    "line 2: no field 'text', which": '{"text": "a"}\n{"title": "b"}\n',
    "there are title, body": '{"title": "a", "body": "b"}\n',
    "line 1: a JSON list": '["a"]\n',
    "'text' is NoneType, not text": '{"text": null}\n',
    "line 1: 'input_ids' is not a list of whole": '{"input_ids": [1.5]}\n',
    "some have not": '{"input_ids": [1], "attention_mask": [1]}\n{"input_ids": [1]}\n',
    "token id 999 is outside the tokenizer's 257": '{"input_ids": [1, 999]}\n',
    "the attention_mask is not 2 times": '{"input_ids": [1, 2], "attention_mask": [1]}\n',
    "no tokens in the first": '{"input_ids": [1, 2], "attention_mask": [0, 0]}\n',
    "row 0: no tokens": '{"input_ids": []}\n',
    "the file is empty": "",
    "there is no row": "\n\n",
}


@pytest.mark.parametrize("message", BAD_LINES)
def test_a_bad_jsonl_file_is_refused_by_name_and_line(tmp_path, tokenizer, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(BAD_LINES[message])
    with pytest.raises(InputError, match=message) as caught:
        load([path], tokenizer, n_sequences=1)
    assert "bad.jsonl" in str(caught.value)


def test_files_that_are_no_text_are_refused(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "a.csv").write_text("a,b")
    parquet.write_table(pyarrow.table({"title": ["x"]}), tmp_path / "b.parquet")
    parquet.write_table(pyarrow.table({"text": ["x", None]}), tmp_path / "c.parquet")
    messages = {
        "a.txt": "not UTF-8",
        "a.parquet": "not a readable parquet",
        "a.csv": "files of type '.csv' are not read",
        "b.parquet": "there are title",
        "c.parquet": "a row has no value",
        "absent.txt": "no such file",
        "": "this is a folder",
    }
    for name, message in messages.items():
        with pytest.raises(InputError, match=message):
            load([tmp_path / name], tokenizer)


def test_python_docs_has_enough_text_and_its_parts_share_no_paragraph(tokenizer):
    calibration_part = load(["python-docs"], tokenizer, n_sequences=128, seq_len=2048)
    held_out = load_windows(TextSource("python-docs"), tokenizer, n_sequences=None, seq_len=2048)
    assert len(held_out) >= 16
    topics = [set(t.provenance["sources"][0]["topics"]) for t in (calibration_part, held_out)]
    assert topics[0] and topics[1] and not topics[0] & topics[1]
    from calibration.text.prose import python_docs

    paragraphs = [
        {p for text in python_docs(part)[0] for p in text.split("\n\n")}
        for part in ("calibration", "heldout")
    ]
    assert not paragraphs[0] & paragraphs[1]


def test_windows_are_the_first_tokens_of_the_whole_text(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(calibration.text.drawing, "_PIECE_CHARACTERS_PER_TOKEN", 1)
    path = tmp_path / "a.txt"
    path.write_text("é" * 3000 + numbered_words(3000))
    whole = torch.tensor(tokenizer(path.read_text(), add_special_tokens=False)["input_ids"])
    some = load_windows(TextSource(str(path)), tokenizer, n_sequences=40, seq_len=128)
    every = load_windows(TextSource(str(path)), tokenizer, n_sequences=None, seq_len=128)
    assert some.input_ids.equal(whole[: 40 * 128].view(40, 128))
    assert every.input_ids.equal(whole[: len(whole) // 128 * 128].view(-1, 128))


@pytest.mark.parametrize(
    ("text", "spec", "weight"),
    [
        ("python-docs", "python-docs", 1.0),
        ("a/b.txt:0.25", "a/b.txt", 0.25),
        ("C:/x.txt", "C:/x.txt", 1.0),
    ],
)
def test_a_weight_follows_a_colon(text, spec, weight):
    assert parse_source(text) == TextSource(spec, weight)


@pytest.mark.parametrize("text", ["a.txt:0", "a.txt:-1", "a.txt:nan", "a.txt:much", "a.txt:", ""])
def test_a_bad_weight_or_no_name_is_refused(text):
    with pytest.raises(InputError, match="calibration: "):
        parse_source(text)


def test_batches_and_fingerprint():
    mask = torch.ones(5, 3, dtype=torch.int64)
    tokens = Tokens(torch.arange(15).view(5, 3), None, {})
    assert [len(batch) for batch in tokens.batches(2)] == [2, 2, 1]
    assert torch.cat([b.input_ids for b in tokens.batches(2)]).equal(tokens.input_ids)
    assert tokens.fingerprint() == Tokens(tokens.input_ids, mask, {"other": 1}).fingerprint()
    mask[0, 0] = 0
    assert tokens.fingerprint() != Tokens(tokens.input_ids, mask, {}).fingerprint()
    with pytest.raises(InputError, match="at least 1"):
        next(tokens.batches(0))


def test_a_hub_data_set_is_streamed_by_split(tokenizer, monkeypatch):
    def fake_load(name, config, split, streaming):
        assert (name, config, streaming) == ("owner/name", "small", True)
        rows = [{"text": f"{split} {numbered_words(i)}"} for i in range(1, 99)]
        return datasets.IterableDataset.from_generator(lambda: iter(rows))

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["train", "validation"])
    monkeypatch.setattr(datasets, "load_dataset", fake_load)
    for split, name in ((Split.CALIBRATION, "train"), (Split.HELDOUT, "validation")):
        tokens = load(["owner/name@small"], tokenizer, split=split)
        assert tokens.provenance["sources"][0]["split"] == name
        assert (
            tokens.fingerprint() == load(["owner/name@small"], tokenizer, split=split).fingerprint()
        )
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["train"])
    with pytest.raises(InputError, match="no split test or validation; there are train"):
        load(["owner/name@small"], tokenizer, split=Split.HELDOUT)


def test_a_hub_data_set_out_of_reach_is_refused(tokenizer, monkeypatch):
    def fail(*_):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "get_dataset_split_names", fail)
    with pytest.raises(InputError, match=r"owner/name: no such file, and the hub cannot be asked"):
        load(["owner/name"], tokenizer)


def test_real_text_mixes_with_the_built_in(tokenizer):
    path = SHARED / "calib" / "c4_en.jsonl"
    if not path.is_file():
        pytest.skip("needs ../shared/data")
    tokens = load(
        [TextSource(str(path), 3.0), "python-docs"], tokenizer, n_sequences=64, seq_len=512
    )
    first, second = tokens.provenance["sources"]
    assert (first["documents"], first["sequences"], second["sequences"]) == (1280, 48, 16)
