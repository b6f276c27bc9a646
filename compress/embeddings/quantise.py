"""Forms of embeddings and heads.

Embeddings are looked up: every row stands alone, so its codes are the nearest ones on a grid whose scale loses least. A
head multiplies: its codes are GPTQ's (Frantar et al. 2022, arXiv:2210.17323) in the metric of its own inputs. Tied ones
serve both and are fitted for both at once. How often a token occurs multiplies the errors of its row in both uses, as
an input and as a prediction, so it changes no choice within a row, and no row shares anything with another: the counts
weigh the errors that are reported, not the fit.

Shapes: v = rows of the vocabulary, d = hidden size, n = rows that are worked on together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.statistics.base import Observation
from calibration.statistics.collection import Statistics
from calibration.statistics.gram import Gram
from compress.embeddings.plan import PlannedTable, Role, dtype_of
from compress.errors import LayerError
from compress.exports.storage import Storage
from compress.families.low_rank import Factors
from compress.forms.base import Form
from compress.forms.dense import Dense
from compress.forms.int8 import Int8
from compress.forms.quantised import Quantised
from compress.forms.sum import Sum
from compress.forms.tied import Tied
from compress.methods.gptq import GPTQ
from compress.methods.rtn import RTN
from compress.solvers.grid import LEAST, MOST

ROWS_AT_ONCE = 1 << 14
MIDDLE = 128
EXPONENTS = (-125, 127)
"""Those of powers of two that fp32 holds, as do their inverses."""
LOOKUP_SHARE = 0.25
"""The share of the looked-up use in the metric of tied weights: the best of 0.25, 0.5 and 0.75 on the demo model."""


@dataclass(frozen=True)
class TableForms:
    """The forms that a storage of a table has."""

    form: Form
    """The weight's (v, d), a correction of a head of its own included."""
    correction: Factors | None = None
    """The correction of a tied head, which the embeddings go without."""

    def head(self, owner: str) -> Form:
        """The form of a tied head, which reads the module of this name."""
        tied = Tied(self.form.shape, owner)
        return tied if self.correction is None else Sum([tied, self.correction])


def table_forms(
    table: PlannedTable,
    storage: Storage,
    weight_vd: Tensor,
    gram: Gram | None,
    lookup_share: float = LOOKUP_SHARE,
) -> TableForms:
    """The forms of a weight in a storage, which is not `as-is`; `gram`: of the head's inputs, where there is a head.

    `lookup_share`: the share of the looked-up use in the metric of a tied weight.

    Raises LayerError with the table's name for values that the storage does not hold, and for a head without inputs.
    """
    try:
        return _forms(table, storage, weight_vd, gram, lookup_share)
    except LayerError as error:
        raise LayerError(f"{table.name}: {error}") from error


def _forms(
    table: PlannedTable,
    storage: Storage,
    weight_vd: Tensor,
    gram: Gram | None,
    lookup_share: float,
) -> TableForms:
    if not bool(torch.isfinite(weight_vd).all()):
        raise LayerError("it holds NaN or infinity; download the checkpoint again")
    if storage.bits is None:
        stored = weight_vd.to(dtype_of(storage))
        if not bool(torch.isfinite(stored).all()):
            raise LayerError(f"its values do not fit {storage}; use bfloat16")
        return TableForms(Dense(stored))
    stats = _metric(table, gram, weight_vd, lookup_share)
    form = _quantised(table, storage.bits, weight_vd, stats)
    correction = table.correction_in(storage)
    if correction is None or gram is None:
        return TableForms(form)
    residual = weight_vd.double() - form.dense().double()
    # In the metric of the head alone: the embeddings go without it.
    found = correction.corrections([residual], Statistics({Gram: gram}))[0]
    if table.role is Role.TIED or found is None:
        return TableForms(form, found)
    return TableForms(Sum([form, found]))


def _metric(
    table: PlannedTable, gram: Gram | None, weight_vd: Tensor, lookup_share: float
) -> Statistics:
    """Statistics whose Gram weighs errors as the uses of the weight do: looking up weighs all columns alike."""
    d = table.shape[1]
    if gram is None:
        rows = torch.eye(d, device=weight_vd.device)
        return Statistics.observed(Observation(rows, 1), frozenset({Gram}))
    if not bool(gram.sum_ii.diagonal().any()):
        raise LayerError(
            f"every input of {table.head or table.name} is zero on the calibration text; use other text, or --head "
            "as-is"
        )
    if table.role is Role.HEAD:
        return Statistics({Gram: gram})
    both_dd = gram.sum_ii * ((1 - lookup_share) / gram.sum_ii.diagonal().mean())
    both_dd.diagonal().add_(lookup_share)
    return Statistics({Gram: Gram(n_tokens=1, n_sequences=1, sum_ii=both_dd)})


def _quantised(table: PlannedTable, bits: int, weight_vd: Tensor, stats: Statistics) -> Form:
    """Codes and scales of all rows.

    Rows of a table may be as different in size as 1 and 1e-9, and fp16 holds no scale below 6e-8. Each row is brought
    to the size of 1 by a power of two, which changes none of its digits; then its scales are brought back.
    """
    exponents_v = torch.frexp(weight_vd.float().abs().amax(1)).exponent.clamp(*EXPONENTS)
    parts = list(_parts(table, bits, (weight_vd, exponents_v), stats))
    scales_gv = torch.cat([part.scales for part in parts], 1).float()
    scales_gv = _stored(torch.ldexp(scales_gv, exponents_v))
    if bits != 8:
        joined = Quantised.joined(parts)
        joined.scales = scales_gv
        return joined
    codes = torch.cat([(part.codes().T - MIDDLE).to(torch.int8) for part in parts])
    return Int8(codes.contiguous(), scales_gv[0].contiguous())


def _parts(
    table: PlannedTable, bits: int, rows: tuple[Tensor, Tensor], stats: Statistics
) -> Iterator[Quantised]:
    """Some rows' forms at a time, brought to the size of 1: their errors never meet, and copies of a few are small."""
    gptq = table.quantiser(bits)
    method: GPTQ | RTN = gptq
    if table.role is Role.EMBEDDINGS:
        method = RTN(bits=bits, group_size=gptq.group_size)
    for weight, exponents in zip(*(each.split(ROWS_AT_ONCE) for each in rows), strict=True):
        form = method.compress([torch.ldexp(weight.float(), -exponents[:, None])], stats)[0]
        assert isinstance(form, Quantised)
        yield form


def _stored(scales: Tensor) -> Tensor:
    """Scales, which have 8 significant bits, in fp16 where it has the range of them all, else in bf16: both exactly."""
    sizes = scales.abs()
    fits = bool(((sizes >= LEAST) & (sizes <= MOST)).all())
    return scales.to(torch.float16 if fits else torch.bfloat16)


def relative_error(
    weight_vd: Tensor, form: Form, gram: Gram | None, weights_v: Tensor | None
) -> float:
    """The relative error of a form: in the metric of the head's inputs, or of rows weighted by the tokens' counts."""

    def energy(rows: Callable[[Tensor], Tensor]) -> float:
        total = 0.0
        for index in torch.arange(weight_vd.shape[0], device=weight_vd.device).split(ROWS_AT_ONCE):
            part = rows(index).double()
            if gram is not None:
                total += float(((part @ gram.mean_ii()) * part).sum())
            else:
                squares = part.square().sum(1)
                total += float((squares if weights_v is None else squares * weights_v[index]).sum())
        return total

    whole = energy(lambda index: weight_vd[index])
    lost = energy(lambda index: weight_vd[index].float() - form.rows(index))
    return (max(lost, 0.0) / whole) ** 0.5 if whole > 0 else 0.0
