"""The rows of `scripts/table`: what is compressed how, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from calibration.propagation import Propagate
from compress.families.base import Compressor
from compress.families.correction import Correction
from compress.families.factorisation import Factorisation
from compress.families.low_rank import FactorDtype
from compress.families.sparse_storage import AtomDtype, CodeBits
from compress.families.target import FitTarget
from compress.methods.admm import ADMM
from compress.methods.asvd import ASVD
from compress.methods.cospadi.method import CoSpaDi
from compress.methods.cospadi.options import AtomAllocation, Share, Solver
from compress.methods.dsnot import DSnoT
from compress.methods.eora import EoRA, OutputSide
from compress.methods.fwsvd import FWSVD, FisherMetric
from compress.methods.gptq import GPTQ
from compress.methods.lord import LoRD
from compress.methods.lqer import LQER
from compress.methods.rtn import RTN
from compress.methods.sparsegpt import SparseGPT
from compress.methods.svd import SVD
from compress.methods.svd_llm import SVDLLM
from compress.methods.svd_residual import SVDResidual
from compress.methods.wanda import Wanda
from compress.methods.welore import WeLore
from compress.solvers.masks import Pattern
from compress.solvers.rank_allocation import Allocation, Importance


@dataclass(frozen=True)
class Corrected:
    """A correction of another row's checkpoint."""

    base_name: str
    base: Compressor
    method: Compressor
    propagate: Propagate | None = None
    """The inputs that it is fitted on, where not those that all rows share."""


Row = Compressor | Corrected | None
"""None is the original."""

FACTORISATIONS: tuple[type[Factorisation], ...] = (SVD, ASVD, FWSVD, SVDLLM, LoRD, WeLore)
CORRECTIONS: dict[str, Callable[..., Correction]] = {"SVD": SVDResidual, "LQER": LQER, "EoRA": EoRA}
SHRINKAGES = (0.0, 0.03, 0.1, 0.3)
EQUAL_BYTES = {(4, 32): (5, 24), (4, 64): (6, 16), (3, 32): (4, 24), (3, 64): (6, 96)}
"""For (bits, rank) at group 64: bits and group of plain GPTQ that take the same bytes, to 3 %."""


def quantised() -> dict[str, Row]:
    """Rows by name; None is the original."""
    rows: dict[str, Row] = {"fp32": None}
    for bits in (4, 3):
        base = GPTQ(bits=bits, group_size=64)
        rows[f"{bits}-bit RTN"] = RTN(bits=bits, group_size=64)
        rows[f"{bits}-bit GPTQ"] = base
        for rank in (32, 64):
            rows[f"{bits}-bit GPTQ + SVD {rank}"] = SVDResidual(base=base, rank=rank)
            rows[f"{bits}-bit GPTQ + EoRA {rank}"] = EoRA(base=base, rank=rank)
            more, group = EQUAL_BYTES[bits, rank]
            name = f"{more}-bit GPTQ g{group} (bytes of {bits}-bit + {rank})"
            rows[name] = GPTQ(bits=more, group_size=group)
    return rows


def lowrank() -> dict[str, Row]:
    """The same for factorisations; the share is of the linear layers' bytes, kept."""
    rows: dict[str, Row] = {"fp32": None}
    for keep in (0.9, 0.8, 0.7, 0.6):
        every: dict[str, Compressor] = {method.name: method(keep=keep) for method in FACTORISATIONS}
        every["fwsvd kronecker"] = FWSVD(keep=keep, metric=FisherMetric.KRONECKER)
        for allocation in (Allocation.BY_TYPE, Allocation.WELORE):
            every[f"svd_llm {allocation}"] = SVDLLM(keep=keep, allocation=allocation)
        for importance in Importance:
            every[f"svd_llm spectrum {importance}"] = SVDLLM(
                keep=keep, allocation=Allocation.SPECTRUM, importance=importance
            )
        rows |= {f"{name}, {keep} kept": method for name, method in every.items()}
    return rows | {"4-bit GPTQ": GPTQ(bits=4, group_size=64)}


def dictionaries() -> dict[str, Row]:
    """Rows by name: everything in 16 bits, shares of what the linear layers take in 16 bits, the mask counted."""
    rows: dict[str, Row] = {"fp32": None}
    for keep in (0.8, 0.7, 0.6):
        half = keep * 16 / 32  # the demo's weights are stored in 32 bits
        cospadi = partial(CoSpaDi, keep=half, dictionary_dtype=AtomDtype.BFLOAT16)
        by_errors = partial(cospadi, allocation=AtomAllocation.ERRORS)
        every: dict[str, Compressor] = {
            "svd_llm": SVDLLM(keep=half, factor_dtype=FactorDtype.BFLOAT16),
            "the weight pruned (admm)": ADMM(keep=half, value_dtype=FactorDtype.BFLOAT16),
            "cospadi oneshot, each its own": cospadi(solver=Solver.ONESHOT, share=Share.NONE),
            "cospadi each its own": cospadi(share=Share.NONE),
            "cospadi": cospadi(),
            "cospadi across depth, 2 blocks": cospadi(share=Share.DEPTH),
            "cospadi across depth, 5 blocks": cospadi(share=Share.DEPTH, depth=5),
            "cospadi 2:4": cospadi(pattern=Pattern.TWO_OF_FOUR),
            "cospadi, codes of 14 bits": cospadi(code_bits=CodeBits.SHORT_14),
            "cospadi, codes of 8 bits": cospadi(code_bits=CodeBits.INT_8),
            "cospadi, codes of 4 bits": cospadi(code_bits=CodeBits.INT_4),
            "cospadi by errors, fisher": by_errors(importance=Importance.FISHER),
            "cospadi by errors, kl": by_errors(importance=Importance.KL),
        }
        rows |= {f"{name}, {keep} kept": method for name, method in every.items()}
    return rows


RANKS, ROUNDS = (32, 64, 128), 4
EXTRAS_AT = 64
"""The rank at which what EoRA can do besides is measured."""
EQUAL_SHARES = {32: 0.3194, 64: 0.3654, 128: 0.4575}
"""Share of the demo's 32-bit weights that 2:4 in 16 bits and a correction of this rank in 16 bits take together."""


def compensated() -> dict[str, Row]:
    """In the manner of EoRA's paper: checkpoints, each corrected three ways at three ranks, EoRA's extras at one, and
    what has their bytes."""
    wanda = Wanda(pattern=Pattern.TWO_OF_FOUR, value_dtype=FactorDtype.BFLOAT16)
    bases: dict[str, Compressor] = {
        "SparseGPT 2:4": SparseGPT(pattern=Pattern.TWO_OF_FOUR, value_dtype=FactorDtype.BFLOAT16),
        "Wanda 2:4": wanda,
        "DSnoT on Wanda 2:4": DSnoT(base=wanda),
        "ADMM 2:4": ADMM(pattern=Pattern.TWO_OF_FOUR, value_dtype=FactorDtype.BFLOAT16),
        "4-bit GPTQ": GPTQ(bits=4, group_size=64),
        "3-bit GPTQ": GPTQ(bits=3, group_size=64),
        "SparseGPT 2:4 in 4 bits": SparseGPT(
            pattern=Pattern.TWO_OF_FOUR, value_bits=CodeBits.INT_4
        ),
    }
    rows: dict[str, Row] = {"fp32": None}
    for name, base in bases.items():
        rows[name] = base
        for rank in RANKS:
            for label, correction in CORRECTIONS.items():
                rows[f"{name} + {label} {rank}"] = Corrected(name, base, correction(rank=rank))
        fisher = EoRA(rank=EXTRAS_AT, output_side=OutputSide.FISHER)
        rows[f"{name} + EoRA {EXTRAS_AT} by outputs too"] = Corrected(name, base, fisher)
        for label, target in {
            "on propagated inputs": FitTarget.LAYER,
            "to the original's outputs": FitTarget.ORIGINAL,
        }.items():
            fitted = EoRA(rank=EXTRAS_AT, target=target)
            row = Corrected(name, base, fitted, Propagate.BLOCK)
            rows[f"{name} + EoRA {EXTRAS_AT} {label}"] = row
        turns = EoRA(base=base, rank=EXTRAS_AT, base_rounds=ROUNDS)
        rows[f"{name} and EoRA {EXTRAS_AT} in {ROUNDS} rounds"] = turns
    for (bits, rank), (more, group) in EQUAL_BYTES.items():
        name = f"{more}-bit GPTQ g{group} (bytes of {bits}-bit + {rank})"
        rows[name] = GPTQ(bits=more, group_size=group)
    for rank, keep in EQUAL_SHARES.items():
        pruned = SparseGPT(keep=keep, value_dtype=FactorDtype.BFLOAT16)
        rows[f"SparseGPT anywhere (bytes of 2:4 + {rank})"] = pruned
    return rows


def shrunk() -> dict[str, Row]:
    """Methods that let one input make up for another's error, by how far their Gram is moved towards its diagonal."""
    rows: dict[str, Row] = {}
    for shrinkage in SHRINKAGES:
        for bits in (4, 3):
            rows[f"{bits}-bit GPTQ, {shrinkage}"] = GPTQ(
                bits=bits, group_size=64, shrinkage=shrinkage
            )
        pruned = SparseGPT(
            pattern=Pattern.TWO_OF_FOUR, value_dtype=FactorDtype.BFLOAT16, shrinkage=shrinkage
        )
        rows[f"SparseGPT 2:4, {shrinkage}"] = pruned
        correction = EoRA(rank=32, shrinkage=shrinkage)
        base = GPTQ(bits=3, group_size=64, shrinkage=0.1)
        rows[f"3-bit GPTQ of 0.1 + EoRA 32, {shrinkage}"] = Corrected(
            "3-bit GPTQ, 0.1", base, correction
        )
    return rows


TABLES: dict[str, Callable[[], dict[str, Row]]] = {
    "quantised": quantised,
    "lowrank": lowrank,
    "dictionaries": dictionaries,
    "compensated": compensated,
    "shrunk": shrunk,
}
