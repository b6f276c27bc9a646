import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.forms.build import empty
from compress.forms.dense import Dense
from compress.forms.packing import pack, unpack
from compress.forms.quantised import Quantised
from compress.forms.shared import Common, Shared
from compress.forms.short import Short
from compress.forms.sparse import Along, Layout, Sparse


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@given(n=st.integers(1, 100), m=st.integers(1, 9), seed=st.integers(0, 1000))
@settings(deadline=None, derandomize=True, max_examples=20)
def test_packing_round_trips(bits, n, m, seed):
    codes = torch.randint(0, 1 << bits, (n, m), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.shape == (-(-n // 32) * bits, m)
    assert packed.dtype == torch.int32
    assert torch.equal(unpack(packed, bits, n).long(), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_layout_is_one_little_endian_bit_stream(bits):
    codes = torch.randint(0, 1 << bits, (32, 1), generator=torch.Generator().manual_seed(0))
    stream = sum(int(code) << (bits * j) for j, code in enumerate(codes.flatten()))
    words = [(stream >> (32 * k)) & 0xFFFFFFFF for k in range(bits)]
    assert [int(word) & 0xFFFFFFFF for word in pack(codes, bits).flatten()] == words


def test_a_code_that_does_not_fit_its_bits_is_refused():
    with pytest.raises(ValueError, match=r"0\.\.8, which does not fit 3 bits"):
        pack(torch.tensor([[0], [8]]), 3)


def quantised(o=12, i=96, bits=4, size=32, kind="symmetric"):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 1 << bits, (o, i), generator=generator)
    groups = -(-i // size)
    scales = torch.randn(o, groups, generator=generator)
    zeros = None
    if kind in ("asymmetric", "shuffled"):
        zeros = torch.randint(0, 1 << bits, (o, groups), generator=generator)
    order = torch.arange(i) // size
    if "shuffled" in kind:
        order = order[torch.randperm(i, generator=generator)]
    form = Quantised.from_codes(
        codes,
        scales,
        zeros,
        bits=bits,
        group_size=size,
        groups_i=order if "shuffled" in kind else None,
    )
    if "affine" in kind:
        offsets = torch.randn(o, groups, generator=generator).half()
        expected = scales.half().float()[:, order] * codes + offsets.float()[:, order]
        return form.with_offsets(offsets), expected
    zero = torch.full((o, groups), 1 << (bits - 1)) if zeros is None else zeros
    return form, scales.half().float()[:, order] * (codes - zero[:, order])


KINDS = ["symmetric", "asymmetric", "shuffled", "affine", "affine, shuffled"]


@pytest.mark.parametrize("i", [96, 80])  # 80: the last group is shorter, the last word is not full
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_a_quantised_form_equals_scale_times_code_minus_zero(bits, kind, i):
    form, expected = quantised(bits=bits, kind=kind, i=i)
    assert torch.equal(form.dense(), expected)


def test_an_affine_form_has_no_integer_zeros_to_mistake_for_its_own():
    form, _ = quantised(kind="affine")
    assert form.affine
    assert not form.symmetric
    with pytest.raises(ValueError, match="no integer zero points"):
        form.zeros()
    with pytest.raises(ValueError, match="only symmetric grids"):
        Quantised.joined([form, form])


def test_an_unknown_form_is_refused_by_name():
    with pytest.raises(ValueError, match="'wavelet' is unknown"):
        empty({"form": "wavelet"}, (2, 2), torch.float32, "cpu")


def sparse(along=Along.ROWS, n=12, m=21, v=5, values=Dense):
    """A sparse form and the weight that it stands for."""
    generator = torch.Generator().manual_seed(1)
    places = torch.rand(n, m, generator=generator).argsort(1)[:, :v]
    mask = torch.zeros(n, m, dtype=torch.bool).scatter_(1, places, value=True)
    lines = torch.randn(n, m, generator=generator) * mask
    form = Sparse.from_lines(mask, values(lines[mask].view(n, v)), along)
    return form, lines if along is Along.ROWS else lines.T


@pytest.mark.parametrize("along", Along)
@pytest.mark.parametrize("m", [4, 21, 32])
def test_a_sparse_form_is_its_values_where_its_mask_has_ones(along, m):
    form, weight = sparse(along, m=m, v=3)
    assert form.shape == tuple(weight.shape)
    assert torch.equal(form.dense(), weight)
    assert form.n_bytes() == -(-12 * m // 32) * 4 + 12 * 3 * 4
    x = torch.randn(2, weight.shape[1])
    torch.testing.assert_close(form(x), x @ weight.T)
    torch.testing.assert_close(form.unpacked(torch.float32)(x), x @ weight.T)


@pytest.mark.parametrize("along", Along)
@pytest.mark.parametrize("n", [1, 6, 11])
def test_two_of_every_four_take_three_bits_for_the_four(along, n):
    every = torch.tensor([f for f in itertools.product([0, 1], repeat=4) if sum(f) == 2]).bool()
    mask = torch.cat([every.roll(row, 0).view(1, 24) for row in range(n)])
    lines = torch.randn(n, 24, generator=torch.Generator().manual_seed(1)) * mask
    form = Sparse.from_lines(mask, Dense(lines[mask].view(n, 12)), along, Layout.FOURS)
    weight = lines if along is Along.ROWS else lines.T
    assert torch.equal(form.dense(), weight)
    assert form.n_bytes() == -(-n * 6 // 32) * 3 * 4 + n * 12 * 4
    again = empty(form.spec(), form.shape, torch.float32, None)
    again.load_state_dict(form.state_dict())
    assert torch.equal(again.dense(), weight)


def test_fours_with_other_than_two_values_are_refused():
    for of_row in ([1, 1, 1, 0, 1, 0, 0, 0], [1, 1, 0, 1, 0, 1]):
        mask = torch.tensor([of_row]).bool()
        with pytest.raises(ValueError, match="not every four entries of a line have two values"):
            Sparse.from_lines(mask, Dense(torch.ones(1, 4)), Along.ROWS, Layout.FOURS)


@pytest.mark.parametrize("along", Along)
@pytest.mark.parametrize("values", [Dense, lambda v: Short.from_values(v, 13)])
def test_a_sparse_form_is_built_again_from_its_spec(along, values):
    form, _ = sparse(along, values=values)
    again = empty(form.spec(), form.shape, torch.float32, None)
    again.load_state_dict(form.state_dict())
    assert torch.equal(again.dense(), form.dense())


def test_lines_with_other_numbers_of_values_are_refused():
    with pytest.raises(ValueError, match="2 values for each of 3 lines, and 1 to 2 ones"):
        Sparse.from_lines(
            torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 0]]).bool(),
            Dense(torch.ones(3, 2)),
            Along.ROWS,
        )


@pytest.mark.parametrize("bits", [10, 13, 14, 15])
def test_short_floats_are_the_nearest_there_are(bits):
    values = torch.randn(7, 40, generator=torch.Generator().manual_seed(0)).exp() - 1
    form = Short.from_values(values, bits)
    step = 2.0 ** -(bits - 9)  # sign, 8 bits of exponent; the rest is mantissa
    exponent = torch.frexp(values).exponent.float() - 1
    nearest = torch.round(values / 2**exponent / step) * step * 2**exponent
    assert torch.equal(form.dense(), nearest)
    assert form.n_bytes() == -(-7 * 40 // 32) * bits * 4
    again = empty(form.spec(), form.shape, torch.float32, None)
    again.load_state_dict(form.state_dict())
    assert torch.equal(again.dense(), nearest)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.4e38])
def test_values_that_no_short_float_holds_are_refused(value):
    with pytest.raises(ValueError, match="do not fit 14 bits"):
        Short.from_values(torch.tensor([[1.0, value]]), 14)


class Counted(Dense):
    """Counts its products."""

    n_products = 0

    def forward(self, x):
        self.n_products += 1
        return super().forward(x)


def users(n=3):
    """A form that counts, the layer that stores it, and those that read it."""
    form = Counted(torch.randn(6, 8))
    common = Common(form, n)
    return form, [common, *(Shared(common.shape, "layers.0", common) for _ in range(n - 1))]


def test_users_of_a_common_form_that_read_one_tensor_share_one_product():
    form, forms = users()
    with torch.no_grad():
        for n in (1, 2, 3):
            x = torch.randn(2, 8)
            for each in forms:
                assert torch.equal(each(x), x @ form.dense().T)
            assert form.n_products == n
        assert forms[0]._memory.product is None, "it is let go when everybody has had it"


def test_a_tensor_that_changed_or_another_at_the_same_place_is_read_again():
    form, forms = users()
    with torch.no_grad():
        x = torch.randn(2, 8)
        forms[0](x)
        x *= 2
        assert torch.equal(forms[1](x), x @ form.dense().T)
        forms[0](torch.randn(2, 8))
        y = torch.randn(2, 8)
        assert torch.equal(forms[2](y), y @ form.dense().T)


def test_where_gradients_are_recorded_every_user_computes_its_own():
    form, forms = users()
    x = torch.randn(2, 8, requires_grad=True)
    sum(each(x).sum() for each in forms).backward()
    torch.testing.assert_close(x.grad, 3 * form.dense().sum(0).expand(2, 8))
    assert form.n_products == 3


def test_a_shared_form_takes_no_bytes_and_is_the_owners_unpacked_too():
    form, forms = users()
    assert forms[0].n_bytes() == 6 * 8 * 4
    assert forms[1].n_bytes() == 0
    twins = [each.unpacked(torch.float64) for each in forms]
    assert twins[1].form is twins[0]
    assert twins[2].form is twins[0]
    assert torch.equal(twins[1].dense(), form.dense())
    again = empty(forms[1].spec(), (6, 8), torch.float32, None)
    assert again.owner == "layers.0"
    with pytest.raises(RuntimeError, match=r"read layers\.0 was never linked"):
        again(torch.randn(2, 8))


def test_a_copy_of_a_model_in_use_remembers_nothing():
    _, forms = users()
    with torch.no_grad():
        x = torch.randn(2, 8)
        forms[0](x)
        model = torch.nn.ModuleList(forms)
        copied = copy.deepcopy(model)
        assert copied[0]._memory.product is None
        assert torch.equal(copied[0](x), forms[1](x))
