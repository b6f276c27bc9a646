"""Pruning methods that choose a mask, with the weights as they are or as the mask leaves them: facts of each."""

import pytest
import torch
from problems import inputs, relative_output_error, statistics, weight

from calibration.statistics.collection import Statistics
from calibration.statistics.gram import Gram
from compress.errors import LayerError, RecipeError
from compress.families.base import METHODS, LayerShape
from compress.families.pruner import Pruner
from compress.forms.sparse import Sparse
from compress.methods.eora import EoRA
from compress.methods.magnitude import Magnitude
from compress.methods.wanda import Wanda

PRUNERS = {name: kind for name, kind in METHODS.items() if issubclass(kind, Pruner)}
PATTERNS = ({"sparsity": 0.6}, {"pattern": "2:4"})


def planned(method, shape):
    [found] = method.plan({"w": LayerShape(shape, shape[0] * shape[1] * 4)}).values()
    return found


def pruned(method, w, stats):
    """What is stored of a weight."""
    [form] = planned(method, tuple(w.shape)).compress([w], stats)
    return form


def error_of(w, form, stats):
    return relative_output_error(w, form.dense(), stats[Gram].mean_ii())


def with_gram(gram_ii):
    """Statistics of inputs with these second moments."""
    return Statistics({Gram: Gram(n_tokens=1, n_sequences=1, sum_ii=gram_ii.double())})


def kept_by(scores, n_kept):
    """A mask of the highest scores of every row, one row after the other."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for row, of_row in enumerate(scores.tolist()):
        best = sorted(range(len(of_row)), key=of_row.__getitem__)[-n_kept:]
        mask[row, best] = True
    return mask


def kept_of_fours(scores):
    """A mask of the two highest scores of every four."""
    o, i = scores.shape
    return kept_by(scores.reshape(-1, 4), 2).view(o, i)


@pytest.mark.parametrize("name", PRUNERS)
class TestEveryPruner:
    @pytest.mark.parametrize("pattern", PATTERNS)
    def test_keeps_as_many_weights_in_every_row_as_were_asked_for(self, name, pattern):
        form = pruned(PRUNERS[name](**pattern), weight(24, 200), statistics(inputs(200)))
        assert isinstance(form, Sparse)
        there = form.dense() != 0
        assert (there.sum(1) == (100 if "pattern" in pattern else 80)).all()
        assert "pattern" not in pattern or (there.view(24, 50, 4).sum(2) == 2).all()

    @pytest.mark.parametrize("bits", ["32", "16", "14", "8", "4"])
    @pytest.mark.parametrize("pattern", PATTERNS)
    def test_bytes_planned_are_bytes_stored(self, name, pattern, bits):
        method = planned(PRUNERS[name](**pattern, value_bits=bits), (24, 200))
        [form] = method.compress([weight(24, 200)], statistics(inputs(200)))
        n = 100 if "pattern" in pattern else 80
        words = {
            "32": 24 * n,
            "16": 24 * n / 2,
            "14": 24 * n // 32 * 14,
        }  # rows of fewer bits: of 32
        values = words.get(bits, 24 * -(-n // 32) * int(bits) + 24 * 2 / 2)  # two scales in 16 bits
        mask = -(-24 * 50 // 32) * 3 if "pattern" in pattern else 24 * 200 / 32
        assert form.n_bytes() == method.planned_bytes((24, 200)) == 4 * (values + mask)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_refuses_a_weight_that_is_not_finite(self, name, value):
        w = weight(24, 64)
        w[3, 7] = value
        with pytest.raises(LayerError):
            pruned(PRUNERS[name](), w, statistics(inputs(64)))

    def test_is_corrected_by_a_low_rank_correction(self, name):
        w, stats = weight(24, 64), statistics(inputs(64))
        base = PRUNERS[name](sparsity=0.6)
        alone, corrected = pruned(base, w, stats), pruned(EoRA(base=base, rank=4), w, stats)
        assert corrected.n_bytes() == alone.n_bytes() + 4 * (24 + 64) * 2
        assert error_of(w, corrected, stats) < 0.9 * error_of(w, alone, stats)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_magnitude_keeps_the_largest_weights_as_they_are(pattern):
    w = weight(24, 48)
    mask = kept_of_fours(w.abs()) if "pattern" in pattern else kept_by(w.abs(), 19)
    found = pruned(Magnitude(**pattern), w, statistics(inputs(48))).dense()
    assert torch.equal(found, torch.where(mask, w, 0))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_wanda_keeps_the_weights_with_the_largest_products_with_their_inputs_length(pattern):
    w, x = weight(24, 48), inputs(48)
    scores = w.abs().double() * x.double().norm(dim=0)
    mask = kept_of_fours(scores) if "pattern" in pattern else kept_by(scores, 19)
    found = pruned(Wanda(**pattern), w, statistics(x)).dense()
    assert torch.equal(found, torch.where(mask, w, 0))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_wanda_is_magnitude_where_all_inputs_are_of_one_size(pattern):
    w, stats = weight(24, 48), with_gram(3 * torch.eye(48))
    wanda, magnitude = (pruned(kind(**pattern), w, stats).dense() for kind in (Wanda, Magnitude))
    assert torch.equal(wanda, magnitude)


def test_wanda_refuses_inputs_that_are_all_zero():
    with pytest.raises(LayerError, match="every input channel is zero"):
        pruned(Wanda(), weight(24, 48), with_gram(torch.zeros(48, 48)))


@pytest.mark.parametrize("name", sorted(PRUNERS))
def test_weights_beyond_fp16_are_refused_with_the_option_that_stores_them_wider(name):
    w, stats = 1e7 * weight(24, 64), statistics(inputs(64))
    with pytest.raises(LayerError, match=r"beyond torch\.float16.*use --value-dtype bfloat16"):
        pruned(PRUNERS[name](value_dtype="float16"), w, stats)


def test_values_of_16_bits_are_no_float32():
    with pytest.raises(RecipeError, match="value_dtype: float32 has 32 bits, and --value-bits"):
        PRUNERS["magnitude"](value_dtype="float32", value_bits="16")
