"""What every statistic must do, whatever it sums. A new statistic is covered when its file exists."""

from dataclasses import fields

import pytest
import torch
from families import tiny_ids, tiny_model

from calibration.backward import Backward
from calibration.layers import is_linear
from calibration.skeleton import PartLoader, build_skeleton, decoder_blocks
from calibration.statistics import load_statistics
from calibration.statistics.base import GradientStatistic, Observation, ObservedStatistic
from calibration.statistics.collection import Statistics
from calibration.store import Store, stored_bytes
from calibration.stream import Stream
from calibration.text.data import Tokens
from calibration.walk import Propagate, SharedInput, walk

STATISTICS = load_statistics()
OBSERVED = [name for name, kind in STATISTICS.items() if issubclass(kind, ObservedStatistic)]
CPU = torch.device("cpu")
GRADIENTS = [name for name, kind in STATISTICS.items() if issubclass(kind, GradientStatistic)]
O, I = 5, 7  # noqa: E741  (the sides of a weight)


def rows(n, width, seed):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def observation(n_tokens, seed, n_sequences=2):
    """Everything that a statistic may read of a batch, of which three tokens are held out."""
    x_ti = rows(n_tokens, I, seed)
    return Observation(x_ti, n_sequences, x_ti[:3], 1, x_ti + rows(n_tokens, I, seed + 50) / 10)


def both(a, b):
    """Two batches as one."""
    join = {
        name: torch.cat([getattr(a, name), getattr(b, name)])
        for name in ("x_ti", "held_out_ti", "original_ti")
    }
    counts = {name: getattr(a, name) + getattr(b, name) for name in ("n_sequences", "n_held_out")}
    return Observation(**join, **counts)


def made(name, n_tokens=9, seed=0):
    """The statistic of something, of the weight (O, I)."""
    kind = STATISTICS[name]
    if name in GRADIENTS:
        return kind.of(rows(n_tokens, I, seed), rows(n_tokens, O, seed + 9))
    return kind.observed(observation(n_tokens, seed))


def assert_equal(a, b):
    """To the bit."""
    assert type(a) is type(b)
    assert a.counts() == b.counts()
    for name, tensor in a.tensors().items():
        assert torch.equal(tensor, b.tensors()[name]), name


def assert_close(a, b):
    assert a.counts() == b.counts()
    for name, tensor in a.tensors().items():
        torch.testing.assert_close(tensor, b.tensors()[name], rtol=1e-5, atol=1e-5)


def test_every_statistic_comes_from_a_forward_or_a_backward_pass():
    assert sorted(OBSERVED + GRADIENTS) == sorted(STATISTICS)
    assert len(OBSERVED) >= 5
    assert len(GRADIENTS) >= 3


@pytest.mark.parametrize("name", OBSERVED)
class TestEveryObservedStatistic:
    @pytest.mark.parametrize("n_tokens", [3, 40])
    def test_of_two_batches_as_one_is_the_sum_of_both(self, name, n_tokens):
        kind, a, b = STATISTICS[name], observation(n_tokens, 1), observation(20, 2)
        whole = kind.observed(both(a, b))
        assert_close(whole, kind.observed(a) + kind.observed(b))
        assert_close(whole, kind.observed(a).with_observed(b))

    def test_counts_tokens_and_sequences(self, name):
        counts = STATISTICS[name].observed(observation(9, 0)).counts()
        assert (counts["n_tokens"], counts["n_sequences"]) in [(9, 2), (3, 1)]  # 3: held out

    def test_leaves_what_it_reads_unchanged(self, name):
        seen, again = observation(9, 0), observation(9, 0)
        STATISTICS[name].observed(seen).with_observed(seen)
        for field in ("x_ti", "held_out_ti", "original_ti"):
            assert torch.equal(getattr(seen, field), getattr(again, field))

    def test_never_counts_padding(self, name):
        lengths, ids = [16, 9, 16, 5, 16, 12, 16, 7], tiny_ids(8)
        mask = torch.stack([(torch.arange(16) < n).long() for n in lengths])
        padded = observed(name, [(ids[:3], mask[:3]), (ids[3:], mask[3:])])
        cut = observed(name, [(ids[k : k + 1, :n], None) for k, n in enumerate(lengths)])
        assert padded.keys() == cut.keys()
        for layer, statistic in padded.items():
            assert_close(statistic, cut[layer])


def streamed(batches):
    """A loader of a tiny model, and the stream of batches of ids and masks at its first block."""
    model = tiny_model("llama")
    skeleton = build_skeleton(model.config, torch.float32)
    prefix, blocks = decoder_blocks(skeleton)
    loader = PartLoader(skeleton, model.state_dict())
    loader.load_outside(prefix + ".", CPU)
    tokens = [Tokens(ids, attention_mask=mask, provenance={}) for ids, mask in batches]
    return loader, Stream(skeleton, blocks, tokens)


def observed(name, batches):
    """What the walk finds at the layers of the first block."""
    loader, stream = streamed(batches)
    stream.keep_original()
    block = next(walk(stream, loader, propagate=Propagate.BLOCK, device=CPU))
    kind = STATISTICS[name]
    found = block.observe(frozenset(block.layers), frozenset({kind}))
    return {shared.names: shared.stats[kind] for shared in found}


def through_gradients(name, batches):
    """What the backward pass finds at the layers of the last block."""
    loader, stream = streamed(batches)
    way = Backward(stream, loader, CPU)
    assert len(list(way.there())) == 3
    names = frozenset(n for n, layer in stream.model.named_modules() if is_linear(layer))
    _, found = next(iter(way.back(names, frozenset({STATISTICS[name]}))))
    return {layer: stats[STATISTICS[name]] for layer, stats in found.items()}


@pytest.mark.parametrize("name", GRADIENTS)
class TestEveryGradientStatistic:
    def test_of_several_samples_is_the_sum_of_theirs(self, name):
        samples = [made(name, n, seed=n) for n in (9, 1, 20)]
        one_by_one = made(name, 9, seed=9)
        for n in (1, 20):
            one_by_one = one_by_one.with_sample(rows(n, I, n), rows(n, O, n + 9))
        assert_close(one_by_one, samples[0] + samples[1] + samples[2])
        assert (one_by_one.n_tokens, one_by_one.n_sequences) == (30, 3)

    def test_leaves_what_it_reads_unchanged(self, name):
        x_ti, g_to = rows(9, I, 0), rows(9, O, 1)
        STATISTICS[name].of(x_ti, g_to).with_sample(x_ti, g_to)
        assert torch.equal(x_ti, rows(9, I, 0))
        assert torch.equal(g_to, rows(9, O, 1))

    def test_never_counts_padding(self, name):
        ids, mask = tiny_ids(1), torch.ones(1, 16, dtype=torch.long)
        mask[:, 9:] = 0
        padded, cut = (
            through_gradients(name, [batch]) for batch in ((ids, mask), (ids[:, :9], None))
        )
        assert padded.keys() == cut.keys()
        assert padded
        for layer, statistic in padded.items():
            assert_close(statistic, cut[layer])


@pytest.mark.parametrize("name", STATISTICS)
class TestEveryStatistic:
    def test_adds_whatever_the_order(self, name):
        parts = [made(name, seed=seed) for seed in range(4)]
        forward = sum(parts[1:], start=parts[0])
        backward = sum(parts[-2::-1], start=parts[-1])
        assert forward.counts() == backward.counts()
        for key, tensor in forward.tensors().items():
            torch.testing.assert_close(tensor, backward.tensors()[key], rtol=1e-13, atol=1e-12)

    def test_absorbs_another_in_its_own_memory(self, name):
        a, b = made(name, seed=1), made(name, 4, seed=2)
        expected, kept = a + b, a.tensors()
        absorbed = a.absorb(b)
        assert_equal(absorbed, expected)
        assert all(tensor is kept[key] for key, tensor in absorbed.tensors().items())
        assert_equal(b, made(name, 4, seed=2))

    def test_comes_back_from_the_disk_to_the_bit(self, name, tmp_path):
        statistic, store = made(name), Store(tmp_path, {"name": name})
        stats = Statistics({STATISTICS[name]: statistic})
        store.save(0, [SharedInput(("a", "b"), stats)])
        store.finish()
        [found] = store.load(0, CPU)
        assert_equal(found.stats[STATISTICS[name]], statistic)

    def test_takes_the_bytes_that_planning_counts(self, name, tmp_path):
        store = Store(tmp_path, {"name": name})
        store.save(0, [SharedInput(("a",), Statistics({STATISTICS[name]: made(name)}))])
        store.finish()
        data = (store.folder / "block-0000.safetensors").read_bytes()
        n_header = int.from_bytes(data[:8], "little")
        assert stored_bytes((O, I), {STATISTICS[name]}) == len(data) - 8 - n_header

    def test_names_its_fields_for_what_they_count_or_sum_in_double_precision(self, name):
        statistic = made(name)
        assert {field.name for field in fields(statistic)} >= {"n_tokens", "n_sequences"}
        for key, count in statistic.counts().items():
            assert key.startswith("n_")
            assert isinstance(count, int)
        for key, tensor in statistic.tensors().items():
            sides = {"i": I, "j": I, "o": O}
            assert tuple(tensor.shape) == tuple(sides[side] for side in key.removeprefix("sum_"))
            assert tensor.dtype == torch.float64

    def test_is_known_by_its_name_and_says_what_it_is(self, name):
        assert STATISTICS[name].name == name
        assert STATISTICS[name].__doc__
        assert STATISTICS[name].identity().split()[0] == name

    def test_moves_to_another_device_whole(self, name):
        moved = made(name).to(torch.device("meta"))
        assert all(tensor.is_meta for tensor in moved.tensors().values())
        assert moved.counts() == made(name).counts()
