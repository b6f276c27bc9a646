"""Forms in a few words, for people."""

from __future__ import annotations

from collections.abc import Sequence

from compress.exports.base import widens
from compress.families.correction import Correction, has_correction
from compress.families.low_rank import as_low_rank
from compress.forms.base import Form
from compress.forms.low_rank import LowRank
from compress.forms.product import Product
from compress.forms.quantised import Quantised
from compress.forms.sum import Sum
from compress.planning.layer import PlannedLayer
from compress.subjects.subject import Description


def written(form: Form, exports: Sequence[str]) -> Description:
    """The terms of a form, each in a few words, and its bytes, as exports of these formats hold it.

    They are those of the form itself, unless its correction is on grids and only PEFT adapters are there to hold it.
    """
    terms = (
        [term for term in form.terms if isinstance(term, Form)] if isinstance(form, Sum) else [form]
    )
    texts = [term.describe() for term in terms]
    correction = terms[-1] if has_correction(form) else None
    if not isinstance(correction, Product) or not widens(exports):
        return Description(tuple(texts), form.n_bytes())
    texts[-1] = f"rank {correction.rank} rounded to {correction.down.describe()}"
    more = as_low_rank(correction).n_bytes() - correction.n_bytes()
    return Description(tuple(texts), form.n_bytes() + more)


def factor_bits(form: Form) -> int | None:
    """Bits of a number in the factors of a form's correction; None without one."""
    if not isinstance(form, Sum) or not has_correction(form):
        return None
    correction = form.terms[-1]
    if isinstance(correction, LowRank):
        return 8 * correction.down.weight.element_size()
    assert isinstance(correction, Product)
    assert isinstance(correction.down, Quantised)
    return correction.down.bits


def remarks(layer: PlannedLayer, form: Form, dead: int) -> str:
    """Remarks on a finished layer, with `dead` of its input channels zero; empty if there are none."""
    remarks = [layer.note] if layer.note else []
    if isinstance(layer.compressor, Correction) and not has_correction(form):
        remarks.append("no correction: it did not lower the error on the sequences kept aside")
    if dead:
        remarks.append(
            f"{dead} of {layer.shape[1]} input channels are zero on the calibration text"
        )
    return "; ".join(remarks)
