"""Damaged files of a model: one message that names the file, the entry, its value and what would be right."""

import json

import pytest
from gguf_files import MERGES, TOKENS, tiny_llama, write_gguf
from workspaces import fill

from compress.errors import CheckpointError
from compress.models.checkpoint import Reader, read_json
from compress.models.resolve import load_tokenizer, resolve_model

DEEP = 200_000


def header(text):
    raw = text.encode()
    return len(raw).to_bytes(8, "little") + raw + b"\0" * 4


def entry(**changes):
    given = {"dtype": '"F32"', "shape": "[1]", "data_offsets": "[0, 4]", **changes}
    parts = ", ".join(f'"{key}": {value}' for key, value in given.items())
    return f'{{"a.weight": {{{parts}}}}}'


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_offsets": "[0, Infinity]"}, r"data_offsets is \[0, inf\]; two whole numbers"),
        ({"data_offsets": "[0, 1e999]"}, r"data_offsets is \[0, inf\]; two whole numbers"),
        ({"data_offsets": "[0, NaN]"}, r"data_offsets is \[0, nan\]; two whole numbers"),
        ({"data_offsets": "[0, 4.0]"}, r"data_offsets is \[0, 4\.0\]; two whole numbers"),
        ({"data_offsets": "[0, true]"}, r"data_offsets is \[0, True\]; two whole numbers"),
        ({"data_offsets": '"04"'}, "data_offsets is '04'; two whole numbers"),
        ({"data_offsets": "[0]"}, r"data_offsets is \[0\]; two whole numbers"),
        ({"data_offsets": "[0, 8]"}, r"data_offsets is \[0, 8\]; \[1\] of F32 takes 4 bytes"),
        ({"shape": "[1e999]"}, r"shape is \[inf\]; a list of whole numbers"),
        ({"shape": "1"}, "shape is 1; a list of whole numbers"),
        ({"dtype": "[]"}, r"dtype is \[\]; there are F64"),
        ({"dtype": "null"}, "dtype is None; there are F64"),
    ],
)
def test_a_damaged_entry_of_a_safetensors_header_is_named(tmp_path, changes, message):
    (tmp_path / "model.safetensors").write_bytes(header(entry(**changes)))
    with pytest.raises(
        CheckpointError, match=rf"model\.safetensors is corrupt: 'a\.weight': {message}"
    ):
        Reader(tmp_path)


@pytest.mark.parametrize("start", ['{"a": ' * DEEP, "[" * DEEP])
def test_a_deeply_nested_header_or_index_is_refused(tmp_path, start):
    (tmp_path / "model.safetensors").write_bytes(header(start))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is corrupt"):
        Reader(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(start)
    with pytest.raises(CheckpointError, match=r"index\.json is not JSON"):
        Reader(tmp_path)
    with pytest.raises(CheckpointError, match="is not JSON"):
        read_json(tmp_path / "model.safetensors.index.json")


@pytest.mark.parametrize("name", ["a\\u0000b", "\\ud800"])
def test_a_shard_whose_name_is_none_is_refused(tmp_path, name):
    index = f'{{"weight_map": {{"a.weight": "{name}"}}}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="cannot be the name of a file"):
        Reader(tmp_path)


def test_a_shard_that_is_a_link_to_itself_is_refused(tmp_path):
    (tmp_path / "s.safetensors").symlink_to("s.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a.weight": "s.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"s\.safetensors is a link that leads nowhere"):
        Reader(tmp_path)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


BAD_SIZES = {
    "block_count": [
        (0, "is 0, which is less than 1"),
        (3, "is 3, but there are tensors of 2 blocks"),
        (2**31, "is 2147483648, which is more than 2147483647"),
        (2**32 - 1, "is 4294967295, which is more"),
        (2**31 - 1, "is 2147483647, but there are tensors of 2 blocks"),
        ("two", "is 'two', which is no whole number"),
    ],
    "embedding_length": [(0, "is 0, which is less than 1"), (10**6, "but no tensor has a dim")],
    "attention.head_count": [(0, "is 0, which is less than 1"), ([4, 0], "less than 1")],
    "attention.head_count_kv": [(2**31, "but no tensor has a dimension above")],
    "context_length": [(0, "is 0, which is less than 1"), (2.5, "is 2.5, which is no whole")],
}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [(key, value, message) for key, cases in BAD_SIZES.items() for value, message in cases],
)
def test_a_size_that_cannot_be_is_named(tmp_path, model, key, value, message):
    fields = {f"llama__{key.replace('.', '__')}": value}
    file = write_gguf(tmp_path / "a.gguf", model, **fields)
    with pytest.raises(CheckpointError, match=rf"a\.gguf: llama\.{key} .*{message}"):
        resolve_model(str(file), tmp_path / "cache")
    assert not (tmp_path / "cache" / "models").exists()


def spoil(file, text):
    """Make a text in a file no UTF-8."""
    raw = file.read_bytes()
    assert text in raw
    file.write_bytes(raw.replace(text, b"\xff" + text[1:], 1))
    return str(file)


@pytest.mark.parametrize("text", [b"Tiny", b"<|start|>", b"smollm", "Ġthe".encode()])
def test_text_that_is_no_utf8_is_refused(tmp_path, model, text):
    file = write_gguf(tmp_path / "a.gguf", model, tokens=[*TOKENS[:-1], "Ġthe"], merges=MERGES[:1])
    with pytest.raises(CheckpointError, match=r"a\.gguf: .*utf-8"):
        resolve_model(spoil(file, text), tmp_path / "cache")


def test_a_vocabulary_without_tokens_is_refused(tmp_path, model):
    file = write_gguf(tmp_path / "a.gguf", model, tokenizer="")
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.tokens is absent"):
        resolve_model(str(file), tmp_path / "cache")
    file = write_gguf(tmp_path / "b.gguf", model, tokens=["<x>"], merges=["a b"])
    raw = file.read_bytes()
    one = (1).to_bytes(8, "little") + (3).to_bytes(8, "little") + b"<x>"
    assert raw.count(one) == 1
    file.write_bytes(raw.replace(one, (0).to_bytes(8, "little")))
    with pytest.raises(CheckpointError, match=r"tokens is empty|corrupt GGUF file"):
        resolve_model(str(file), tmp_path / "cache")


def test_a_merge_of_tokens_that_are_not_there_is_refused(tmp_path, model):
    file = write_gguf(tmp_path / "a.gguf", model, merges=["t h", "never seen"])
    with pytest.raises(CheckpointError, match=r"a\.gguf: its tokenizer cannot be read"):
        resolve_model(str(file), tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path) / "model"


@pytest.mark.parametrize("value", ["4096", [4096], {"tokens": 4096}, True, -1, 0])
def test_a_longest_text_that_is_no_number_is_named(folder, value):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": value}))
    with pytest.raises(
        CheckpointError, match=r"tokenizer_config\.json.*model_max_length|cannot be used"
    ):
        load_tokenizer(folder)


def test_own_code_of_a_tokenizer_that_is_an_empty_list_is_refused_or_ignored(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": []}))
    with pytest.raises(CheckpointError, match="cannot be used"):
        load_tokenizer(folder)
