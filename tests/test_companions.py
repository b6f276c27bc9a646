"""Files beside the weights: what goes with every export, and what never does."""

import json

import pytest
import torch
import transformers.utils
from exported import compressed, export
from safetensors.torch import save_file
from workspaces import recipe

import compress.models.companions
import compress.models.resolve
from compress import run
from compress.errors import CheckpointError
from compress.exports.verification.places import PROBE
from compress.exports.verification.probe import file_digests, make_probe, write_probe
from compress.methods.rtn import RTN
from compress.models.companions import companions, copy_companions
from compress.models.resolve import resolve_model

SECRET = "the content of a file elsewhere"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return compressed(tmp_path_factory.mktemp("source"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


def put(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def modules(folder, *names):
    paths = [{"idx": k, "path": name} for k, name in enumerate(("", *names))]
    (folder / "modules.json").write_text(json.dumps(paths))


FILE_NAMES = [
    getattr(transformers.utils, f"{kind}_NAME")
    for kind in (
        *("FEATURE_EXTRACTOR", "IMAGE_PROCESSOR", "VIDEO_PROCESSOR", "AUDIO_TOKENIZER"),
        *("PROCESSOR", "GENERATION_CONFIG"),
    )
]


@pytest.mark.parametrize("name", [*FILE_NAMES, "chat_template.jinja", "chat_template.json"])
def test_files_that_transformers_reads_beside_the_weights_go_along(folder, name):
    (folder / name).write_text("{}")
    assert set(companions(folder)) == {name}


@pytest.mark.parametrize(
    "name",
    [
        *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
        *("bpe.codes", "entity_vocab.json", "prophetnet.tokenizer", "target_vocab.json"),
        *("normalizer.json", "emoji.json", "tekken.json", "tokenizer.model.v3", "o200k.tiktoken"),
        *("additional_chat_templates/tools.jinja", "sentence_roberta_config.json"),
        *("LICENSE.md", "LICENCE", "Notice.txt", "USE_POLICY.md", "COPYING"),
    ],
)
def test_files_of_tokenizers_and_licences_go_along(folder, name):
    put(folder, **{name.replace("/", "__"): "x"})
    assert set(companions(folder)) == {name}


@pytest.mark.parametrize(
    "name",
    [
        *("model.safetensors", "tokenizer.safetensors", "model.safetensors.index.json"),
        *("vocab.bin", "tokenizer.pt", "vocab.gguf", "modeling_own.py", "training_args.bin"),
        *("README.md", "config.json", "onnx/tokenizer.json", "trainer_state.json"),
    ],
)
def test_weights_code_and_everything_else_stay_behind(folder, name):
    put(folder, **{name.replace("/", "__"): "x"})
    assert companions(folder) == {}


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "chat_template", "vocab.txt"])
def test_a_link_to_another_place_is_refused_by_name(folder, tmp_path, name):
    put(tmp_path, elsewhere__secret=SECRET)
    target = tmp_path / "elsewhere" / ("" if name == "chat_template" else "secret")
    (folder / name).symlink_to(target)
    with pytest.raises(CheckpointError, match=rf"{name}.* is a link that points outside"):
        copy_companions(folder, tmp_path)


def test_a_link_within_the_folder_becomes_a_file(folder, tmp_path):
    put(folder, vocab_="a", vocab_2="b")
    (folder / "tokenizer.json").symlink_to("vocab_")
    (tmp_path / "out").mkdir()
    copy_companions(folder, tmp_path / "out")
    copied = tmp_path / "out" / "tokenizer.json"
    assert copied.read_text() == "a"
    assert not copied.is_symlink()


def test_a_circle_of_links_is_refused(folder):
    (folder / "tokenizer.json").symlink_to("tokenizer.json")
    with pytest.raises(CheckpointError, match="leads nowhere"):
        companions(folder)


def test_the_hubs_cache_is_a_folder_of_links(tmp_path):
    blobs, folder = tmp_path / "m" / "blobs", tmp_path / "m" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    (folder / "1_Pooling").mkdir(parents=True)
    modules(blobs, "1_Pooling")
    put(blobs, tok="words", pool="{}")
    for name, blob in (
        *(("tokenizer.json", "tok"), ("1_Pooling/config.json", "pool")),
        ("modules.json", "modules.json"),
    ):
        (folder / name).symlink_to(blobs / blob)
    assert set(companions(folder)) == {"tokenizer.json", "1_Pooling/config.json", "modules.json"}


def test_a_file_too_large_for_a_tokenizer_is_refused(folder, monkeypatch):
    monkeypatch.setattr(compress.models.companions, "LARGEST", 3)
    put(folder, vocab_="1234")
    with pytest.raises(CheckpointError, match=r"vocab_ would be copied .* 4 bytes"):
        companions(folder)


def test_modules_of_sentence_transformers_go_along_with_their_weights(folder):
    modules(folder, "1_Pooling", "2_Dense")
    put(
        folder,
        **{
            "1_Pooling__config.json": "{}",
            "2_Dense__config.json": "{}",
            "3_Other__config.json": "{}",
        },
    )
    save_file({"linear.weight": torch.zeros(2, 2)}, folder / "2_Dense" / "model.safetensors")
    expected = {"modules.json", "1_Pooling/config.json", "2_Dense/config.json"}
    assert set(companions(folder)) == expected | {"2_Dense/model.safetensors"}


def test_a_module_with_pickled_weights_is_refused(folder):
    modules(folder, "2_Dense")
    put(folder, **{"2_Dense__pytorch_model.bin": "x", "2_Dense__config.json": "{}"})
    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin holds the weights of a module as a pickle"
    ):
        companions(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"path": "../elsewhere"}]', "points outside"),
        ('[{"path": "/etc"}]', "points outside"),
        ('[{"path": 3}]', "a module's path is 3"),
        ('[{"path": "absent"}]', "there are no files in it"),
        ("{", "no list of modules"),
        ("[1]", "no list of modules"),
        ("[" * 100_000, "no list of modules"),
    ],
)
def test_a_list_of_modules_that_is_none_is_refused(folder, text, message):
    (folder / "modules.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        companions(folder)


@pytest.mark.parametrize("name", ["dense", "native"])
def test_an_export_has_the_files_and_its_digests_cover_them(made, tmp_path, name):
    source = made.source.folder
    modules(source, "1_Pooling")
    put(source, **{"1_Pooling__config.json": "{}", "processor_config.json": "{}"})
    found = export(made, tmp_path / name, name)
    names = {"modules.json", "1_Pooling/config.json", "processor_config.json"}
    assert all((found / each).is_file() for each in names)
    assert names <= set(file_digests(found))


def test_a_link_to_another_place_is_refused_before_work(made, tmp_path):
    put(tmp_path, secret=SECRET)
    link = made.source.folder / "LICENSE"
    link.symlink_to(tmp_path / "secret")
    try:
        with pytest.raises(CheckpointError, match="LICENSE is a link that points outside"):
            resolve_model(str(made.source.folder))
    finally:
        link.unlink()


def test_folders_of_modules_are_fetched_from_the_hub(made, monkeypatch):
    calls = []

    def fetch(_, **options):
        calls.append(options["allow_patterns"])
        modules(made.source.folder, "1_Pooling")
        put(made.source.folder, **{"1_Pooling__config.json": "{}"})
        return str(made.source.folder)

    monkeypatch.setattr(compress.models.resolve, "snapshot_download", fetch)
    resolve_model("owner/name")
    assert "preprocessor_config.json" in calls[0]
    assert "1_Pooling/*.json" in calls[1]
    assert not any(
        pattern.endswith((".bin", ".py", "/*")) and "template" not in pattern
        for pattern in calls[1]
    )


def test_two_equal_probes_have_equal_bytes(made, tmp_path):
    folder = export(made, tmp_path / "dense", "dense")
    probe = make_probe(torch.zeros(1, 3, dtype=torch.long), torch.ones(3, 4))
    contents = set()
    for _ in range(8):
        write_probe(folder, probe, torch.float32, torch.float16)
        contents.add((folder / PROBE).read_bytes())
    assert len(contents) == 1


@pytest.mark.usefixtures("quick_verification")
def test_a_folder_of_links_into_the_hubs_cache_is_compressed_into_one_of_files(workspace):
    blobs, folder = workspace / "m" / "blobs", workspace / "m" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    folder.mkdir(parents=True)
    put(workspace / "model", LICENSE="ours", **{"1_Pooling__config.json": "{}"})
    modules(workspace / "model", "1_Pooling")
    (folder / "1_Pooling").mkdir()
    files = [path for path in (workspace / "model").rglob("*") if path.is_file()]
    for number, path in enumerate(files):
        blob = path.rename(blobs / str(number))
        (folder / path.relative_to(workspace / "model")).symlink_to(blob)
    options = {"method": RTN(bits=8, group_size=32), "export": ("dense",)}
    run(recipe(workspace, model=str(folder), **options))
    names = ("LICENSE", "tokenizer.json", "1_Pooling/config.json", "model.safetensors")
    written = [workspace / "out" / name for name in names]
    assert all(path.is_file() and not path.is_symlink() for path in written)
    assert written[0].read_text() == "ours"
