"""Fisher-weighted SVD: facts of the paper and of its two-sided generalisation."""

import pytest
import torch
from problems import gradients, inputs, statistics, weight

from calibration.statistics.collection import Statistics
from calibration.statistics.fisher import Fisher
from calibration.statistics.gram import Gram
from calibration.statistics.output_gradients import OutputGradients
from compress.errors import LayerError
from compress.families.base import LayerShape
from compress.methods.fwsvd import FWSVD
from compress.methods.svd import SVD
from compress.methods.svd_llm import SVDLLM

SHAPES = [(48, 64), (64, 48)]
RANK = 8


def compressed(kind, w, stats, **options):
    layer = LayerShape(tuple(w.shape), w.numel() * 4)
    [form] = kind(rank=RANK, **options).plan({"layer": layer})["layer"].compress([w], stats)
    return form.dense().double()


def fisher(values):
    return Statistics({Fisher: Fisher(n_tokens=9, n_sequences=3, sum_i=values.double())})


def two_sides(gram, left):
    return Statistics(
        {
            Gram: Gram(n_tokens=1, n_sequences=1, sum_ii=gram.double()),
            OutputGradients: OutputGradients(n_tokens=1, n_sequences=1, sum_oo=left.double()),
        }
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_uniform_fisher_equals_plain_svd(shape):
    w = weight(*shape)
    weighted = compressed(FWSVD, w, fisher(torch.full((shape[1],), 0.37)))
    torch.testing.assert_close(weighted, compressed(SVD, w, statistics(inputs(shape[1]))))


@pytest.mark.parametrize("shape", SHAPES)
def test_identity_sides_equal_plain_svd(shape):
    w = weight(*shape)
    found = compressed(
        FWSVD, w, two_sides(torch.eye(shape[1]), torch.eye(shape[0])), metric="kronecker"
    )
    torch.testing.assert_close(found, compressed(SVD, w, statistics(inputs(shape[1]))))


@pytest.mark.parametrize("shape", SHAPES)
def test_an_identity_left_side_equals_svd_llm(shape):
    w, stats = weight(*shape), statistics(inputs(shape[1]))
    sides = two_sides(stats[Gram].mean_ii(), torch.eye(shape[0]))
    found = compressed(FWSVD, w, sides, metric="kronecker")
    torch.testing.assert_close(found, compressed(SVDLLM, w, stats), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_is_the_tail_of_the_weighted_spectrum(shape):
    w = weight(*shape)
    importance = torch.rand(shape[1], generator=torch.Generator().manual_seed(3)) + 0.01
    found = compressed(FWSVD, w, fisher(importance * 3), damping=0.0)
    scaled = w.double() * importance.double().sqrt()
    lost = ((w.double() - found) * importance.double().sqrt()).square().sum()
    tail = torch.linalg.svdvals(scaled)[RANK:].square().sum()
    assert float(lost) == pytest.approx(float(tail), rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_two_sided_loss_is_the_tail_of_the_spectrum_between_both_sides(shape):
    w = weight(*shape)
    x, g = inputs(shape[1]).double(), gradients(2048, shape[0]).double()
    gram, left = x.T @ x / len(x), g.T @ g / len(g)
    found = compressed(FWSVD, w, two_sides(gram, left), metric="kronecker", damping=0.0)
    error = w.double() - found
    lost = torch.trace(left @ error @ gram @ error.T)
    middle = torch.linalg.cholesky(left).T @ w.double() @ torch.linalg.cholesky(gram)
    tail = torch.linalg.svdvals(middle)[RANK:].square().sum()
    assert float(lost) == pytest.approx(float(tail), rel=1e-5)


def test_inputs_that_the_loss_ignores_cost_little():
    w = weight(48, 64)
    importance = torch.ones(64)
    importance[32:] = 1e-6
    weighted, plain = (
        (w.double() - compressed(kind, w, fisher(importance)))[:, :32].norm()
        for kind in (FWSVD, SVD)
    )
    assert weighted < 0.9 * plain


@pytest.mark.parametrize("metric", ["rows", "kronecker"])
def test_a_layer_that_the_loss_does_not_depend_on_is_refused(metric):
    stats = Statistics({Gram: statistics(inputs(64))[Gram]})
    with pytest.raises(LayerError, match="no Fisher; --exclude"):
        compressed(FWSVD, weight(48, 64), stats, metric=metric)


def test_a_fisher_of_zeros_is_refused():
    with pytest.raises(LayerError, match="every row of its Fisher is zero"):
        compressed(FWSVD, weight(48, 64), fisher(torch.zeros(64)))
