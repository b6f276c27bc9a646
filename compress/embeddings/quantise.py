"""Forms of embeddings and heads.

Embeddings are looked up: every row stands alone, so its codes are the nearest ones on a grid whose scale loses least. A
head multiplies: its codes are GPTQ's (Frantar et al. 2022, arXiv:2210.17323) in the metric of its own inputs. Tied ones
serve both and are fitted for both at once. How often a token occurs multiplies the errors of its row in both uses, as
an input and as a prediction, so it changes no choice within a row, and no row shares anything with another: the counts
weigh the errors that are reported, not the fit.

Shapes: v = rows of the vocabulary, d = hidden size, n = rows that are worked on together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
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

ROWS_AT_ONCE = 1 << 14
MIDDLE = 128
LOOKUP_SHARE = 0.5
"""The share of the looked-up use in the metric of tied weights: half, for the two uses count alike."""


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
    table: PlannedTable, storage: Storage, weight_vd: Tensor, gram: Gram | None
) -> TableForms:
    """The forms of a weight in a storage, which is not `as-is`; `gram`: of the head's inputs, where there is a head.

    Raises LayerError for values that the storage does not hold.
    """
    _refuse_extremes(table, storage, weight_vd)
    if storage.bits is None:
        stored = weight_vd.to(dtype_of(storage))
        if not bool(torch.isfinite(stored).all()):
            raise LayerError(f"{table.name}: its values do not fit {storage}; use bfloat16")
        return TableForms(Dense(stored))
    stats = _metric(table, gram, weight_vd)
    form = _joined(list(_quantised(table, storage.bits, weight_vd, stats)))
    correction = table.correction_in(storage)
    if correction is None or gram is None:
        return TableForms(form)
    residual = weight_vd.double() - form.dense().double()
    # In the metric of the head alone: the embeddings go without it.
    found = correction.corrections([residual], Statistics({Gram: gram}))[0]
    if table.role is Role.TIED or found is None:
        return TableForms(form, found)
    return TableForms(Sum([form, found]))


def _refuse_extremes(table: PlannedTable, storage: Storage, weight_vd: Tensor) -> None:
    """Raises LayerError for NaN and infinity, and for values whose scale is beyond fp16."""
    largest = float(weight_vd.abs().amax())
    if not math.isfinite(largest):
        raise LayerError(f"{table.name} holds NaN or infinity; download the checkpoint again")
    scale = largest / (1 << (storage.bits - 1)) if storage.bits else 0.0
    if scale > torch.finfo(torch.float16).max:
        option = "head" if table.role is Role.HEAD else "embeddings"
        raise LayerError(
            f"{table.name}: values as large as {largest:.3g} do not fit {storage} bits, whose scales are fp16; use "
            f"--{option} bfloat16"
        )


def _metric(table: PlannedTable, gram: Gram | None, weight_vd: Tensor) -> Statistics:
    """Statistics whose Gram weighs errors as the uses of the weight do: looking up weighs all columns alike."""
    d = table.shape[1]
    if gram is None:
        rows = torch.eye(d, device=weight_vd.device)
        return Statistics.observed(Observation(rows, 1), frozenset({Gram}))
    if table.role is Role.HEAD:
        return Statistics({Gram: gram})
    both_dd = gram.sum_ii * ((1 - LOOKUP_SHARE) / gram.sum_ii.diagonal().mean())
    both_dd.diagonal().add_(LOOKUP_SHARE)
    return Statistics({Gram: Gram(n_tokens=1, n_sequences=1, sum_ii=both_dd)})


def _quantised(
    table: PlannedTable, bits: int, weight_vd: Tensor, stats: Statistics
) -> Iterator[Quantised]:
    """The rows' forms, some rows at a time: their errors never meet, and the copies of a few are small."""
    gptq = table.quantiser(bits)
    method: GPTQ | RTN = gptq
    if table.role is Role.EMBEDDINGS:
        method = RTN(bits=bits, group_size=gptq.group_size)
    for rows in weight_vd.split(ROWS_AT_ONCE):
        form = method.compress([rows.float()], stats)[0]
        assert isinstance(form, Quantised)
        yield form


def _joined(parts: Sequence[Quantised]) -> Form:
    if parts[0].bits != 8:
        return Quantised.joined(parts)
    codes = torch.cat([(part.codes().T - MIDDLE).to(torch.int8) for part in parts])
    return Int8(codes.contiguous(), torch.cat([part.scales[0] for part in parts]))


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
