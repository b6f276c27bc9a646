"""Reading and writing checkpoints: bytes are kept, and what is broken is refused by name."""

import errno
import json
import os
import resource
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.errors import CheckpointError
from compress.models.checkpoint import Reader, Writer, read_json

TENSORS = {
    "b.weight": torch.arange(15, dtype=torch.float32).reshape(3, 5),
    "a.weight": torch.arange(7).to(torch.bfloat16),
    "ä.codes": torch.arange(-4, 4, dtype=torch.int32).reshape(2, 4),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "empty": torch.empty(0, 4, dtype=torch.float16),
    "mask": torch.tensor([True, False, True]),
    "bytes": torch.arange(5, dtype=torch.uint8),
}


def write(folder, tensors=TENSORS, **options):
    folder.mkdir(exist_ok=True)
    writer = Writer(folder, **options)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    return folder


@pytest.fixture
def sharded(tmp_path):
    return write(tmp_path / "sharded", shard_bytes=40)


def same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_one_file_has_the_bytes_that_the_safetensors_library_writes(tmp_path):
    folder = write(tmp_path / "out")
    save_file(TENSORS, tmp_path / "oracle", {"format": "pt"})
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "oracle").read_bytes()
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]


def test_shards_are_bounded_complete_and_indexed(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    n_bytes = sum(tensor.nbytes for tensor in TENSORS.values())
    assert index["metadata"]["total_size"] == n_bytes
    shards = sorted(set(index["weight_map"].values()))
    n = len(shards)
    assert n > 2
    assert shards == [f"model-{k:05d}-of-{n:05d}.safetensors" for k in range(1, n + 1)]
    parts = [load_file(sharded / shard) for shard in shards]
    same({name: tensor for part in parts for name, tensor in part.items()}, TENSORS)
    for shard, part in zip(shards, parts, strict=True):
        assert sum(t.nbytes for t in part.values()) <= 40 or len(part) == 1
        assert all(index["weight_map"][name] == shard for name in part)
    assert len(list(sharded.iterdir())) == n + 1


def test_a_reader_gives_what_was_written(sharded, tmp_path):
    for folder in (sharded, write(tmp_path / "single")):
        reader = Reader(folder)
        same(dict(reader.items()), TENSORS)
        assert len(reader) == len(TENSORS)
        assert reader.total_bytes == sum(tensor.nbytes for tensor in TENSORS.values())
        assert "b.weight" in reader
        assert "c.weight" not in reader
        assert reader.shape("b.weight") == (3, 5)
        assert reader.dtype("a.weight") == torch.bfloat16
        assert reader.nbytes("a.weight") == 14


def test_views_and_transposed_tensors_are_written_as_they_read(tmp_path):
    base = torch.randn(6, 4)
    made = {"rows": base[2:4], "turned": base.T, "whole": base}
    same(dict(Reader(write(tmp_path / "out", made)).items()), made)


def test_the_fingerprint_sees_every_byte_and_the_config(tmp_path):
    folder = write(tmp_path / "out")
    (folder / "config.json").write_text("{}")
    prints = [Reader(folder).fingerprint]
    (folder / "config.json").write_text("{ }")
    prints.append(Reader(folder).fingerprint)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    prints.append(Reader(folder).fingerprint)
    assert len(set(prints)) == 3
    assert Reader(folder).fingerprint == prints[-1]


# What a reader refuses


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        Reader(tmp_path)
    with pytest.raises(CheckpointError, match="not a folder"):
        Reader(tmp_path / "none")


def test_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*save_pretrained"):
        Reader(tmp_path)


@pytest.mark.parametrize("n_bytes", [0, 4, 30, -1, -40])
def test_a_truncated_shard_is_refused_by_name(sharded, n_bytes):
    path = sorted(sharded.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(CheckpointError, match=f"{path.name}.*(truncated|corrupt)"):
        Reader(sharded)


def test_a_shard_with_bytes_too_many_is_refused(sharded):
    path = sorted(sharded.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="corrupt"):
        Reader(sharded)


@pytest.mark.parametrize(
    "header",
    [
        b"no json",
        b"[]",
        b"\xff\xfe",
        b'{"a": 3}',
        b'{"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
        b' "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_a_corrupt_header_is_refused(tmp_path, header):
    data = len(header).to_bytes(8, "little") + header + b"\0" * 4
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is (corrupt|truncated)"):
        Reader(tmp_path)


def test_a_shard_missing_from_the_folder_is_refused_by_name(sharded):
    path = sorted(sharded.glob("*.safetensors"))[1]
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{path.name} is missing"):
        Reader(sharded)


def test_a_tensor_that_its_shard_lacks_is_refused_by_name(sharded):
    change_index(sharded, lambda places: places.update({"ghost": places["b.weight"]}))
    with pytest.raises(CheckpointError, match="lacks ghost"):
        Reader(sharded)


@pytest.mark.parametrize("path", ["../x.safetensors", "{outside}", "a\\b", "sub/../../x"])
def test_an_index_that_points_outside_the_folder_is_refused(sharded, tmp_path, path):
    (tmp_path / "x.safetensors").write_bytes(b"")
    name = path.format(outside=tmp_path / "x.safetensors")
    change_index(sharded, lambda places: places.update({"b.weight": name}))
    with pytest.raises(CheckpointError, match="outside the folder"):
        Reader(sharded)


def test_a_link_out_of_the_folder_is_refused_unless_the_hubs_cache_made_it(tmp_path):
    stranger = write(tmp_path / "stranger") / "model.safetensors"
    folder = tmp_path / "models--x" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").symlink_to(stranger)
    with pytest.raises(CheckpointError, match="link that points outside"):
        Reader(folder)
    blobs = tmp_path / "models--x" / "blobs"
    blobs.mkdir()
    stranger.rename(blobs / "0123")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(blobs / "0123")
    same(dict(Reader(folder).items()), TENSORS)


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', "\xff"]
)
def test_an_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"index\.json"):
        Reader(tmp_path)


def test_a_file_that_shrinks_after_opening_is_an_error_not_a_crash(tmp_path):
    reader = Reader(write(tmp_path / "out"))
    path = tmp_path / "out" / "model.safetensors"
    os.truncate(path, path.stat().st_size - 20)
    with pytest.raises(CheckpointError, match="cut short"):
        dict(reader.items())


def test_json_that_is_absent_says_so(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_json(tmp_path / "config.json")


# What a writer refuses


def test_a_name_twice_is_refused_even_in_another_shard(tmp_path):
    writer = Writer(tmp_path, shard_bytes=1)
    writer.add("a", torch.ones(3))
    writer.add("b", torch.ones(3))
    with pytest.raises(CheckpointError, match="a is written twice"):
        writer.add("a", torch.ones(3))


def test_a_tensor_without_data_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="meta"):
        Writer(tmp_path).add("a", torch.ones(3, device="meta"))
    with pytest.raises(CheckpointError, match="no tensor"):
        Writer(tmp_path).close()


def test_an_unclosed_writer_leaves_no_checkpoint(tmp_path):
    writer = Writer(tmp_path, shard_bytes=10)
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
    with pytest.raises(CheckpointError, match="neither"):
        Reader(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("limit", [500, 4200])
def test_a_full_disk_is_an_os_error_and_leaves_no_checkpoint(tmp_path, limit):
    """A limit on the size of files stands for the disk: while data comes, and while it is ordered."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    writer = Writer(tmp_path)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(OSError, match="too large") as caught:
            for k in range(4):
                writer.add(f"a.rather.long.name.{k}", torch.ones(256))
            writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG
    assert not list(tmp_path.glob("*.safetensors*"))


def change_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
