import pytest
import torch

from calibration.errors import InputError
from calibration.precision import cuda_products
from calibration.statistics import always_collected
from calibration.statistics.abs_mean import AbsMean
from calibration.statistics.base import InputStatistic
from calibration.statistics.collection import Statistics
from calibration.statistics.gram import Gram
from calibration.statistics.mean import Mean
from calibration.store import Store
from calibration.walk import SharedInput


def tokens(n, seed=0, width=7):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("wanted", ["highest", "high", "medium"])
def test_what_the_program_lets_products_keep_is_as_it_was(wanted):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(wanted)
        Gram.of(tokens(50), 1)
        with cuda_products("tf32"):
            pass
        assert torch.get_float32_matmul_precision() == wanted
    finally:
        torch.set_float32_matmul_precision(before)


def test_statistics_equal_their_definitions():
    x = tokens(40)
    assert torch.allclose(
        Gram.of(x, 1).sum_ii, sum(torch.outer(t, t) for t in x.double()), atol=1e-4
    )
    assert torch.allclose(Mean.of(x, 1).sum_i, x.double().sum(0))
    assert torch.allclose(AbsMean.of(x, 1).sum_i, x.double().abs().sum(0))
    assert torch.allclose(Gram.of(x, 1).mean_ii(), x.double().T @ x.double() / 40, atol=1e-5)


@pytest.mark.parametrize("width", [1, 2, 7, 33])
def test_statistics_come_back_from_the_store_exactly(tmp_path, width):
    stats = Statistics.of(tokens(40, width=width), 2, InputStatistic.among(always_collected()))
    store = Store(tmp_path, {"model": "m"})
    assert not store.complete
    store.save(0, [SharedInput(("a", "b"), stats)])
    assert not store.complete
    store.finish()
    assert store.complete
    [shared] = store.load(0, torch.device("cpu"))
    assert shared.names == ("a", "b")
    for kind, statistic in stats.items():
        assert shared.stats[kind].n_tokens == 40
        for name, tensor in statistic.tensors().items():
            assert torch.equal(tensor, shared.stats[kind].tensors()[name])


def test_other_settings_are_another_fingerprint(tmp_path):
    assert Store(tmp_path, {"model": "a"}).key != Store(tmp_path, {"model": "b"}).key
    assert Store(tmp_path, {"a": 1, "b": 2}).key == Store(tmp_path, {"b": 2, "a": 1}).key


def test_an_unfinished_store_leaves_nothing_that_counts(tmp_path):
    store = Store(tmp_path, {"model": "m"})
    store.save(0, [SharedInput(("a",), Statistics.of(tokens(5), 1, frozenset({Gram})))])
    store.discard()
    assert list(tmp_path.iterdir()) == []


def saved(root, **settings):
    store = Store(root, {"model": "m", **settings})
    shared = SharedInput(("a",), Statistics.of(tokens(5), 1, frozenset({Gram})))
    store.save(0, [shared])
    store.save(1, [shared])
    return store


def test_equal_jobs_at_once_leave_one_complete_store(tmp_path):
    first, second = saved(tmp_path), saved(tmp_path)
    first.finish()
    second.finish()
    second.discard()
    assert first.complete
    assert [path.name for path in tmp_path.iterdir()] == [first.folder.name]
    assert first.load(1, torch.device("cpu"))


def test_a_store_with_a_missing_or_cut_block_counts_as_none_and_is_made_again(tmp_path):
    store = saved(tmp_path)
    store.finish()
    (store.folder / "block-0001.safetensors").write_bytes(b"short")
    assert not Store(tmp_path, {"model": "m"}).complete
    again = saved(tmp_path)
    again.finish()
    assert again.complete


def test_a_damaged_block_is_an_error_that_says_what_to_remove(tmp_path):
    store = saved(tmp_path)
    store.finish()
    path = store.folder / "block-0000.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(
        InputError, match=r"block-0000\.safetensors is damaged; remove .*--statistics off"
    ):
        store.load(0, torch.device("cpu"))


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_stays(tmp_path):
    killed = saved(tmp_path, by="another")
    killed._lock.release()  # as the system does for a process that ends, and nothing else
    [left] = tmp_path.iterdir()
    at_work = saved(tmp_path)
    assert not left.exists()
    [living] = tmp_path.iterdir()
    last = saved(tmp_path, more=1)
    assert living.exists()
    for store in (at_work, last):
        store.finish()
        assert store.complete
        assert {path.suffix for path in store.folder.iterdir()} == {".safetensors", ".json"}
