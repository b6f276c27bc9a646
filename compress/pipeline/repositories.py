"""Repositories of the hub that the exports of a run are to be, and what is missing for publishing them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from compress.config.recipe import Recipe
from compress.exports import EXPORTS
from compress.exports.base import CorrectionStorage, MadeOf, Traits
from compress.exports.codes import quantiser_of
from compress.exports.peft import local_reference
from compress.planning.plan import Plan
from compress.prepare.prepare import Prepared
from compress.report.card.names import base_model_of
from compress.report.report import ExportReport


def repositories(recipe: Recipe, plan: Plan) -> dict[str, str | None]:
    """The id of each format's repository; of several formats each has one, with the format at the end of its name."""
    if len(recipe.export) == 1 or recipe.publish_as is None:
        return dict.fromkeys(recipe.export, recipe.publish_as)
    ranks = [layer.padded_rank or getattr(layer.compressor, "rank", None) for layer in plan.layers]
    made = MadeOf(
        bits=_bits(plan),
        method=type(recipe.method).__name__,
        rank=max((rank for rank in ranks if rank is not None), default=None),
    )
    return {
        name: recipe.publish_as + EXPORTS[name].repository_suffix(made) for name in recipe.export
    }


def with_publishing(prepared: Prepared, exports: Sequence[ExportReport]) -> list[ExportReport]:
    """The exports with their repositories, the bits of their codes, and why servers refuse them."""
    plan, ids = prepared.plan, repositories(prepared.recipe, prepared.plan)
    return [
        replace(
            export,
            repository=ids[export.format],
            bits=_bits(plan) if _holds_codes(EXPORTS[export.format].traits) else None,
            refusals=plan.refusals(export.format),
        )
        for export in exports
    ]


def _holds_codes(traits: Traits) -> bool:
    return traits.corrections is not CorrectionStorage.MERGED and not traits.needs_base


def _bits(plan: Plan) -> int | None:
    """Bits of the codes that a plan's layers have; None without codes, or where widths differ."""
    found = (quantiser_of(layer.compressor) for layer in plan.layers)
    bits = {quantiser.bits for quantiser in found if quantiser is not None}
    return bits.pop() if len(bits) == 1 else None


def references(recipe: Recipe, plan: Plan) -> Mapping[str, str]:
    """What an adapter that lies beside its checkpoint calls this: its repository, or else its folder here."""
    out, several = recipe.folder.name, len(recipe.export) > 1
    return {
        name: repository or local_reference(f"{out}/{name}" if several else out)
        for name, repository in repositories(recipe, plan).items()
    }


def missing_text(prepared: Prepared) -> str:
    """What the cards will lack, with the options that give it; empty if nothing."""
    recipe, source, base = prepared.recipe, prepared.source, prepared.subject.report()
    lacking = []
    if base_model_of(recipe.to_mapping(), source.revision) is None:
        lacking.append("the original's id (--base-model owner/name)")
    if recipe.license is None and source.licence is None:
        lacking.append("its licence (--license apache-2.0, ...)")
    if base is not None and base.revision is None:
        lacking.append(
            "the id of the base checkpoint, a folder here (compress publish --base owner/name)"
        )
    return f"for publishing, the cards lack {', '.join(lacking)}" if lacking else ""
