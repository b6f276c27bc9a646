"""Common to formats of codes: the quantised weight in a form or a method, and the low-rank correction of it."""

from __future__ import annotations

from compress.errors import CheckpointError
from compress.exports.base import LayerExport, Planned
from compress.families.base import Compressor
from compress.families.low_rank import Factors
from compress.families.quantiser import Quantiser
from compress.forms.base import Form
from compress.forms.low_rank import LowRank
from compress.forms.product import Product
from compress.forms.quantised import Quantised
from compress.forms.sum import Sum
from compress.models.checkpoint import some


def quantised_part(layer: LayerExport, export: str) -> tuple[Quantised, Factors | None]:
    """The codes of a layer's form, and the correction of them. Raises CheckpointError for any other form."""
    form: Form = layer.form
    terms = [form] if not isinstance(form, Sum) else list(form.terms)
    match terms:
        case [Quantised() as base]:
            return base, None
        case [Quantised() as base, (LowRank() | Product()) as correction]:
            return base, correction
    kinds = some([type(term).__name__ for term in terms])
    raise CheckpointError(
        f"{export} export: {layer.name} is a sum of {kinds}; the format holds a quantised weight and "
        "one low-rank correction of it"
    )


def quantiser_of(compressor: Compressor) -> Quantiser | None:
    """The method that makes the codes, a base at any depth; None if nothing quantises."""
    method: object = compressor
    while method is not None and not isinstance(method, Quantiser):
        method = getattr(method, "base", None)
    return method


def innermost(compressor: Compressor) -> Compressor:
    """The method at the bottom of bases of bases: the one that makes what the others correct."""
    base = getattr(compressor, "base", None)
    return innermost(base) if isinstance(base, Compressor) else compressor


def dense_bytes(plan: Planned, shape: tuple[int, int]) -> int:
    """Bytes of a weight (o, i) in the dtype of most of the source."""
    return shape[0] * shape[1] * plan.dtype.itemsize
