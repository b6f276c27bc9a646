"""Windows begin as the tokenizer begins a text, and documents in them are joined as in training."""

import json
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
from tokenizers_with_specials import BOS, EOS, PAD, adding

import calibration.text.drawing
from calibration.bos import Bos
from calibration.errors import InputError
from calibration.text.data import Split, TextSource, load_tokens, load_windows
from calibration.text.special import SpecialTokens


def words(n, start=0):
    return " ".join(f"w{i:04d}" for i in range(start, start + n))


def write_texts(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return TextSource(str(path))


def windows(source, tokenizer, **changes):
    options = {"n_sequences": None, "seq_len": 16, **changes}
    return load_windows(source, tokenizer, **options)


def drawn(source, tokenizer, **changes):
    options = {"n_sequences": 8, "seq_len": 16, "seed": 0, "split": Split.CALIBRATION, **changes}
    return load_tokens([source], tokenizer, **options)


@pytest.mark.parametrize(
    ("template", "prefix"),
    [
        ("$A", ()),
        ("<bos> $A", (BOS,)),
        ("$A <eos>", ()),
        ("<bos> $A <eos>", (BOS,)),
        ("<bos> <pad> $A <eos>", (BOS, PAD)),
        ("<eos> $A <eos>", (EOS,)),
    ],
)
def test_what_the_tokenizer_adds_at_the_end_is_no_prefix(template, prefix):
    assert SpecialTokens.of(adding(template), Bos.AUTO).prefix == prefix
    assert SpecialTokens.of(adding(template), Bos.NEVER).prefix == ()
    assert SpecialTokens.of(adding(template), Bos.ALWAYS).prefix == (BOS,)


def test_a_tokenizer_that_begins_texts_in_different_ways_is_refused():
    class Moody:
        all_special_ids = ()
        eos_token_id = None

        def __call__(self, text, **options):
            ids = [10 + ord(letter) for letter in text]
            added = options.get("add_special_tokens", True)
            return SimpleNamespace(input_ids=[len(text), *ids] if added else ids)

        def __len__(self):
            return 0

    with pytest.raises(InputError, match=r"same special tokens in front of every text.*use never"):
        SpecialTokens.of(Moody(), Bos.AUTO)
    assert SpecialTokens.of(Moody(), Bos.NEVER).prefix == ()


def test_always_needs_a_bos_token():
    tokenizer = adding("$A")
    tokenizer.bos_token = None
    with pytest.raises(InputError, match="no bos_token; use auto or never"):
        SpecialTokens.of(tokenizer, Bos.ALWAYS)


@pytest.mark.parametrize("limit", [1 << 22, 100], ids=["all text", "pieces"])
@pytest.mark.parametrize("load", [windows, drawn])
@pytest.mark.parametrize(
    "case",
    [
        ("<bos> $A <eos>", Bos.AUTO, [BOS]),
        ("<bos> <pad> $A", Bos.AUTO, [BOS, PAD]),
        ("$A", Bos.ALWAYS, [BOS]),
    ],
)
def test_every_window_begins_with_the_prefix_which_counts_among_its_tokens(
    tmp_path, monkeypatch, load, limit, case
):
    template, bos, prefix = case
    monkeypatch.setattr(calibration.text.drawing, "_TOKENISE_ALL_CHARACTERS", limit)
    source = write_texts(tmp_path / "a.jsonl", [words(n) for n in range(1, 30)])
    tokens = load(source, adding(template), bos=bos)
    assert tokens.input_ids.shape[1] == 16 and len(tokens) >= 8
    for row, inserted in zip(tokens.input_ids.tolist(), tokens.inserted.tolist(), strict=True):
        assert row[: len(prefix)] == prefix and all(inserted[: len(prefix)])
        # The text's own tokens follow at once, not the end of a document that was cut off.
        assert not inserted[len(prefix)]


def test_without_a_prefix_windows_are_those_of_the_joined_text(tmp_path):
    texts = [words(n) for n in range(1, 9)]
    source = write_texts(tmp_path / "a.jsonl", texts)
    tokenizer = adding("<bos> $A")
    joined = [EOS]
    for text in texts:
        joined += [*tokenizer(text, add_special_tokens=False).input_ids, EOS]
    found = windows(source, tokenizer, bos=Bos.NEVER)
    assert found.input_ids.flatten().tolist() == joined[1:][: found.input_ids.numel()]
    assert found.inserted.equal(found.input_ids == EOS)
    auto = windows(source, adding("$A <eos>"))
    assert auto.fingerprint() == found.fingerprint()


def test_documents_are_joined_by_end_of_text_and_the_prefix_and_no_token_is_lost(tmp_path):
    texts = [words(n, start=100 * n) for n in range(1, 12)]
    source = write_texts(tmp_path / "a.jsonl", texts)
    tokenizer = adding("<bos> $A <eos>")
    own = [k for text in texts for k in tokenizer(text, add_special_tokens=False).input_ids]
    found = windows(source, tokenizer, seq_len=37)
    kept = found.input_ids[~found.inserted].tolist()
    assert kept == own[: len(kept)] and len(own) - len(kept) < 37
    assert set(found.input_ids[found.inserted].tolist()) == {BOS, EOS}
    for row in found.input_ids.tolist():
        assert all((a == EOS) == (b == BOS) for a, b in pairwise(row))
    read = found.provenance["sources"][0]
    assert (read["prefix"], read["separator"]) == ("<bos>", "<eos><bos>")


def test_sequences_drawn_from_joined_documents_share_no_token(tmp_path):
    texts = [words(1, start=n) for n in range(300)]
    source = write_texts(tmp_path / "a.jsonl", texts)
    tokenizer = adding("<bos> $A")
    for seed in range(20):
        tokens = drawn(source, tokenizer, seed=seed, seq_len=23, n_sequences=60)
        text = "<eos><bos>".join(tokenizer.decode(row[1:]) for row in tokens.input_ids)
        whole = [word for word in text.split("<eos><bos>") if len(word) == 5]
        assert len(whole) == len(set(whole)) > 100


@pytest.mark.parametrize(
    ("template", "texts", "joined"),
    [
        ("<bos> $A", ["ab", "cd"], "<bos>ab<eos><bos>cd"),
        ("<bos> $A", ["<bos>ab<eos>", "<bos>cd<eos>"], "<bos>ab<eos><bos>cd<eos>"),
        ("<bos> $A", ["ab<eos>\n", "cd"], "<bos>ab<eos>\n<bos>cd"),
        ("$A", ["ab<eos>\n", "cd"], "ab<eos>\ncd"),
        ("<eos> $A", ["ab", "cd"], "<eos>ab<eos>cd"),
        ("<eos> $A", ["ab<eos>", "cd"], "<eos>ab<eos>cd"),
        ("<bos> $A", ["ab\n", "cd"], "<bos>ab\n<eos><bos>cd"),
    ],
)
def test_a_special_token_that_the_text_brings_is_not_added_again(tmp_path, template, texts, joined):
    tokenizer = adding(template)
    n = len(tokenizer(joined, add_special_tokens=False).input_ids)
    found = windows(write_texts(tmp_path / "a.jsonl", texts), tokenizer, seq_len=n)
    assert [tokenizer.decode(row) for row in found.input_ids] == [joined]


def test_a_sequence_that_is_all_special_tokens_is_refused(tmp_path):
    source = write_texts(tmp_path / "a.jsonl", [words(20)])
    with pytest.raises(InputError, match=r"seq_len: 2 tokens are all special ones \(<bos><pad>\)"):
        windows(source, adding("<bos> <pad> $A"), seq_len=2)


def test_ready_rows_stay_as_they_are_and_those_without_the_prefix_are_counted(tmp_path):
    rows = [
        {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]},
        {"input_ids": [BOS, 6, 7], "attention_mask": [1, 1, 1]},
        {"input_ids": [PAD, BOS, 7], "attention_mask": [0, 1, 1]},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = windows(TextSource(str(path)), adding("<bos> $A"), seq_len=3)
    assert found.input_ids.tolist() == [row["input_ids"] for row in rows]
    assert found.inserted is None
    assert found.provenance["sources"][0]["rows_without_prefix"] == 1
    plain = windows(TextSource(str(path)), adding("$A"), seq_len=3)
    assert "rows_without_prefix" not in plain.provenance["sources"][0]
    assert plain.fingerprint() == found.fingerprint()


def test_parts_of_tokens_keep_their_special_ones_and_these_count_in_the_fingerprint(tmp_path):
    source = write_texts(tmp_path / "a.jsonl", [words(n) for n in range(1, 20)])
    tokens = windows(source, adding("<bos> $A"))
    halves = list(tokens.batches(5))
    assert [row for half in halves for row in half.inserted.tolist()] == tokens.inserted.tolist()
    assert all(one.inserted.shape == one.input_ids.shape for one in tokens.singles())
    assert replace(tokens, inserted=None).fingerprint() != tokens.fingerprint()
