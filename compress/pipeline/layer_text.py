"""Forms in a few words, for people."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from compress.families.correction import Correction, has_correction, widens
from compress.families.low_rank import as_low_rank
from compress.forms.factorised import Form, Product, Sum
from compress.planning.layer import PlannedLayer


def describe(form: Form) -> str:
    """A form in a few words: `4-bit g64 + rank 32`."""
    spec = form.spec()
    match spec["form"]:
        case "sum":
            return " + ".join(describe(term) for term in form.terms)  # type: ignore[union-attr]
        case "quantised":
            kind = "" if spec["symmetric"] else " asymmetric"
            return f"{spec['bits']}-bit g{spec['group_size']}{kind}"
        case "low_rank":
            return f"rank {spec['rank']}"
        case "product" if "sparse" in (spec["up"]["form"], spec["down"]["form"]):
            return _described_codes(spec)
        case "product":
            return f"rank {spec['rank']} in {describe(form.down)}"  # type: ignore[arg-type]
        case "dense":
            bits = 8 * form.weight.element_size()  # type: ignore[operator]
            return f"{bits}-bit dense"
        case "sparse":
            dense = spec["values"]["form"] == "dense"
            stored = "" if dense else f", {describe(form.values)}"  # type: ignore[arg-type]
            return f"{spec['per_line']} of {form.shape[1]} in a row{stored}"
        case "short":
            return f"{spec['bits']}-bit floats"
        case other:
            return str(other)


def written(form: Form, exports: Collection[str]) -> tuple[list[str], int]:
    """The terms of a form, each in a few words, and its bytes, as exports of these formats hold it.

    They are those of the form itself, unless its correction is on grids and only PEFT adapters are there to hold it.
    """
    terms = (
        [term for term in form.terms if isinstance(term, Form)] if isinstance(form, Sum) else [form]
    )
    texts = [describe(term) for term in terms]
    correction = terms[-1] if has_correction(form) else None
    if not isinstance(correction, Product) or not widens(exports):
        return texts, form.n_bytes()
    texts[-1] = f"rank {correction.rank} rounded to {describe(correction.down)}"
    more = as_low_rank(correction).n_bytes() - correction.n_bytes()
    return texts, form.n_bytes() + more


def _described_codes(spec: Mapping[str, Any]) -> str:
    """A dictionary and its codes: `614 atoms, shared, 307 an output`."""
    inputs = spec["down"]["form"] == "sparse"
    codes, dictionary = spec["down" if inputs else "up"], spec["up" if inputs else "down"]
    shared = ", shared" if dictionary["form"] in ("common", "shared") else ""
    side = "input" if inputs else "output"
    return f"{spec['rank']} atoms{shared}, {codes['per_line']} an {side}"


def remarks(layer: PlannedLayer, form: Form, dead: int) -> str:
    """What is to be known of a finished layer, of whose input channels so many are dead."""
    remarks = [layer.note] if layer.note else []
    if isinstance(layer.compressor, Correction) and not has_correction(form):
        remarks.append("no correction: it did not lower the error on the sequences kept aside")
    if dead:
        remarks.append(
            f"{dead} of {layer.shape[1]} input channels are zero on the calibration text"
        )
    return "; ".join(remarks)
