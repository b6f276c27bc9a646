"""Models in: what is accepted, what is refused before any weight is read, and GGUF conversion."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from gguf_files import SPECIAL, TOKENS, tiny_llama, write_gguf
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, LlamaConfig

import compress.models.gguf
import compress.models.resolve
from compress.errors import CheckpointError
from compress.models.gguf import convert
from compress.models.resolve import load_tokenizer, read_licence, resolve_model

IDS = torch.arange(2, 34).view(2, 16)


def silent(stage, done, total):
    pass


def logits_of(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A converted tiny model: its GGUF file, its folder, the original."""
    root = tmp_path_factory.mktemp("tiny")
    model = tiny_llama()
    file = write_gguf(root / "tiny.gguf", model, general__license="mit")
    source = resolve_model(str(file), root / "cache")
    return SimpleNamespace(file=file, source=source, model=model)


@pytest.fixture
def folder(tiny, tmp_path):
    """A good folder that a test may spoil."""
    return shutil.copytree(tiny.source.folder, tmp_path / "model")


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_a_gguf_file_becomes_an_ordinary_folder_with_the_same_logits(tiny):
    loaded = AutoModelForCausalLM.from_pretrained(tiny.source.folder)
    assert torch.equal(logits_of(loaded), logits_of(tiny.model))
    weights = load_file(tiny.source.folder / "model.safetensors")
    assert "lm_head.weight" not in weights and weights["model.norm.weight"].dtype == torch.float32
    config = json.loads((tiny.source.folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and "quantization_config" not in config
    assert tiny.source.licence == "mit"
    assert "the GGUF file tiny.gguf (20 F32)" in tiny.source.notes[0]


def test_an_untied_head_is_kept(tmp_path):
    model = tiny_llama(tie_word_embeddings=False)
    file = write_gguf(tmp_path / "untied.gguf", model)
    source = resolve_model(str(file), tmp_path / "cache")
    loaded = AutoModelForCausalLM.from_pretrained(source.folder)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


@pytest.mark.parametrize(("kind", "dtype"), [("F16", torch.float16), ("Q8_0", torch.float32)])
def test_weights_are_unpacked_to_a_dtype_that_holds_them(tmp_path, kind, dtype):
    model = tiny_llama()
    source = resolve_model(str(write_gguf(tmp_path / "a.gguf", model, kind)), tmp_path / "cache")
    weight = load_file(source.folder / "model.safetensors")[
        "model.layers.1.self_attn.q_proj.weight"
    ]
    original = model.state_dict()["model.layers.1.self_attn.q_proj.weight"]
    assert weight.dtype == dtype
    if kind == "F16":
        assert torch.equal(weight, original.half())
    else:
        step = original.view(64, 2, 32).abs().amax(-1, keepdim=True) / 127
        error = (weight - original).view(64, 2, 32).abs() / step
        assert 0.1 < error.max() < 0.6


def test_the_tokenizer_of_a_gguf_file_is_whole(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny.source.folder)
    text = " the  1\n\n22 é 漢字<|start|>x"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert ids.count(SPECIAL.index("<|start|>")) == 1
    assert tokenizer.tokenize("x\n\n1  2") == ["x", "ĊĊ", "1", "ĠĠ", "2"]  # each digit is apart
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<end>", "<|start|>")
    assert tokenizer.model_max_length == 256
    assert len(tokenizer) == len(TOKENS)  # none that the model has no embedding for
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
    assert chat == "<|start|>the"


def test_conversion_happens_once(tiny, monkeypatch):
    monkeypatch.setattr(compress.models.gguf, "_write", None)
    cache = tiny.source.folder.parents[1]
    assert resolve_model(str(tiny.file), cache).folder == tiny.source.folder


def test_conversion_reports_progress(tiny, tmp_path):
    seen = []
    convert(tiny.file, tmp_path / "out", progress=lambda *args: seen.append(args[1:]))
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_conversion_leaves_nothing(tiny, tmp_path, interruption):
    def stop(_stage, done, _total):
        if done == 3:
            raise interruption

    with pytest.raises(interruption):
        convert(tiny.file, tmp_path / "cache" / "out", progress=stop)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_full_disk_is_told_before_work(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match="1,000 are free; set COMPRESS_CACHE"):
        convert(tiny.file, tmp_path / "out", progress=silent)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", [10, 100, 3000, -40])
def test_a_truncated_gguf_file_is_refused(tiny, tmp_path, kept):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny.file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"cut\.gguf: truncated or corrupt GGUF file"):
        resolve_model(str(cut), tmp_path / "cache")
    assert not (tmp_path / "cache" / "models").exists()


BAD_GGUF = {
    "not a causal language model|transformers cannot read": {"architecture": "nonsense"},
    "holds a adapter, not a model": {"general__type": "adapter"},
    "one of 3 parts": {"split__count": 3},
    "no tokenizer": {"tokenizer": ""},
}


@pytest.mark.parametrize("message", BAD_GGUF)
def test_a_gguf_file_of_something_else_is_refused(tmp_path, message):
    file = write_gguf(tmp_path / "a.gguf", tiny_llama(), **BAD_GGUF[message])
    with pytest.raises(CheckpointError, match=message):
        resolve_model(str(file), tmp_path / "cache")
    models = tmp_path / "cache" / "models"
    assert not models.exists() or list(models.iterdir()) == []


def test_a_gguf_file_with_a_tensor_missing_is_refused(tmp_path):
    model = tiny_llama()
    del model.model.layers[1].mlp.up_proj
    file = write_gguf(tmp_path / "a.gguf", model)
    with pytest.raises(
        CheckpointError, match=r"no weights in the file for .*layers\.1\.mlp\.up_proj"
    ):
        resolve_model(str(file), tmp_path / "cache")


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"hello")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        resolve_model(str(path), tmp_path)


def test_a_good_folder_is_taken_as_it_is(folder):
    source = resolve_model(str(folder))
    assert (source.spec, source.folder, source.revision) == (str(folder), folder, None)


BAD_CONFIGS = {
    r"already compressed \(compress\)": {"model_type": "compress"},
    "exists only as Python code": {"model_type": "own", "auto_map": {"AutoConfig": "x.Y"}},
    "knows no model_type 'own'": {"model_type": "own"},
    "knows no model_type None": {"model_type": None},
    "LlamaForTokenClassification is neither": {"architectures": ["LlamaForTokenClassification"]},
    "BertForMaskedLM is neither": BertConfig(architectures=["BertForMaskedLM"]).to_dict(),
    "BertLMHeadModel is neither": BertConfig(architectures=["BertLMHeadModel"]).to_dict(),
    "bert is neither a causal": BertConfig().to_dict() | {"architectures": None},
    "is an encoder with a decoder": {"model_type": "t5", "architectures": None},
    "dtype 'int8', which no dense": {"dtype": "int8"},
    "transformers cannot use its config.json": {"num_attention_heads": "many"},
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_a_config_that_cannot_be_compressed_is_refused(folder, message):
    edit_config(folder, **BAD_CONFIGS[message])
    with pytest.raises(CheckpointError, match=message):
        resolve_model(str(folder))


def test_own_code_beside_a_stock_architecture_is_ignored(folder):
    edit_config(folder, auto_map={"AutoModelForCausalLM": "evil.Model"})
    (folder / "evil.py").write_text("raise SystemExit('this code must not run')")
    assert resolve_model(str(folder)).folder == folder


def test_a_folder_without_config_is_refused_with_what_was_looked_for(tmp_path):
    with pytest.raises(CheckpointError, match=r"looked for config\.json and .* found nothing"):
        resolve_model(str(tmp_path))
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(CheckpointError, match=r"found notes\.md"):
        resolve_model(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="a PEFT adapter"):
        resolve_model(str(tmp_path))


def test_a_folder_of_gguf_files_names_the_file_to_give(tiny, tmp_path):
    shutil.copy(tiny.file, tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match=r"name the file itself: .*x\.gguf"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("content", ["{not json", "[1]"])
def test_an_unreadable_config_is_refused(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json (is not valid JSON|holds a list)"):
        resolve_model(str(folder))


def test_missing_weights_pickles_and_missing_tokenizers_are_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no weights: looked for model\.safetensors or"):
        resolve_model(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"pickles only \(pytorch_model\.bin\).*convert"):
        resolve_model(str(folder))
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match="no tokenizer: looked for"):
        resolve_model(str(folder))


@pytest.mark.parametrize("spec", ["no/such/model", "absent.gguf", "./absent", "a b", ""])
def test_a_name_that_can_be_nothing_is_refused(spec):
    with pytest.raises(CheckpointError, match=r"there is no file or folder|is no model|no model"):
        resolve_model(spec)


def test_the_hub_out_of_reach_is_told(monkeypatch):
    def fail(*_, **__):
        raise LocalEntryNotFoundError("no route to host")

    monkeypatch.setattr(compress.models.resolve, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"hub cannot be asked for it \(no route to host\)"):
        resolve_model("owner/name")


def test_a_name_unknown_to_the_hub_is_told(monkeypatch):
    def fail(*_, **__):
        raise RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(compress.models.resolve, "snapshot_download", fail)
    with pytest.raises(
        CheckpointError, match="neither a file or folder here nor a model of the hub"
    ):
        resolve_model("owner/name")


def test_a_hub_model_is_pinned_to_its_commit_and_only_safetensors_are_fetched(folder, monkeypatch):
    asked = {}

    def fetch(name, **options):
        asked.update(options, name=name)
        return str(folder.rename(folder.with_name("0123abc")))

    monkeypatch.setattr(compress.models.resolve, "snapshot_download", fetch)
    source = resolve_model("owner/name@main")
    assert (source.revision, asked["name"], asked["revision"]) == ("0123abc", "owner/name", "main")
    assert not any("bin" in pattern or "*.py" in pattern for pattern in asked["allow_patterns"])


@pytest.mark.parametrize(
    ("front", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n# x", "apache-2.0"),
        ("---\nlicense: [mit, bsd]\n---\n", "mit, bsd"),
        ("---\nlicense: other\nlicense_name: gemma\n---\n", "gemma"),
        ("---\ntags: [x]\n---\n", None),
        ("---\n: [\n---\n", None),
        ("# no front matter\n---\nlicense: mit\n---\n", None),
    ],
)
def test_the_licence_is_read_from_the_front_matter(tmp_path, front, licence):
    (tmp_path / "README.md").write_text(front)
    assert read_licence(tmp_path) == (licence, None)


def test_the_link_to_a_licence_is_read_too(tmp_path):
    front = "---\nlicense: other\nlicense_name: house\nlicense_link: https://example.org/l\n---\n"
    (tmp_path / "README.md").write_text(front)
    assert read_licence(tmp_path) == ("house", "https://example.org/l")


def test_a_config_without_architectures_is_judged_by_its_type(folder):
    edit_config(folder, architectures=None)
    assert LlamaConfig.from_pretrained(folder).architectures is None
    assert resolve_model(str(folder)).folder == folder


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_without_a_word_in_the_config_are_refused(folder, dtype):
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {name: weights[name].to(dtype)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name} are stored as {str(dtype)[6:]}"):
        resolve_model(str(folder))


def test_a_whole_tokenizer_loads(folder):
    assert load_tokenizer(folder).encode("the")


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"model": {"type": "Nix"}}', "\x00"])
def test_a_spoilt_tokenizer_is_refused(folder, content):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"its tokenizer files .* cannot be used: \S"):
        load_tokenizer(folder)


def test_a_tokenizer_config_alone_is_no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="its tokenizer files"):
        load_tokenizer(folder)


def test_an_interruption_is_no_spoilt_tokenizer(folder, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(compress.models.resolve.AutoTokenizer, "from_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_tokenizer(folder)
