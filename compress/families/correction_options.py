"""Options of low-rank corrections: rank or budget, allocation, storage, held-out sequences, and the bytes they take."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from calibration.statistics.cross_gram import CrossGram
from compress.errors import RecipeError
from compress.families.base import METHODS, Compressor
from compress.families.budget import parse_share_or_bytes
from compress.families.quantiser import Quantiser
from compress.families.target import FitTarget
from compress.forms.packing import CODES_A_ROW
from compress.solvers.rank_allocation import Importance

RANK, RANK_STEP = 32, 8
FACTOR_BYTES = 2
FULL_BITS = 16
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's --max-lora-rank accepts; it computes with that many whatever rank an adapter has."""


def padded_rank(rank: int) -> int:
    """The rank of a padded adapter whose highest rank this is: the next that vLLM takes, itself above the largest."""
    return next((served for served in VLLM_RANKS if served >= rank), rank)


class FactorDtype(enum.StrEnum):
    """The dtype of the low-rank factors where they have 16 bits."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class RanksFor(enum.StrEnum):
    """The server whose ranks the corrections have."""

    ANY = "any"
    VLLM = "vllm"


class AdapterBits(enum.StrEnum):
    """Bits of each number in the factors."""

    FULL = "16"
    EIGHT = "8"
    FOUR = "4"
    THREE = "3"
    AUTO = "auto"
    """The width with the least error in the same bytes, by the measured error of rounding."""


class CorrectionAllocation(enum.StrEnum):
    """How an adapter budget is spread over the layers."""

    UNIFORM = "uniform"
    """One rank for every layer."""
    SPECTRUM = "spectrum"
    """Each layer's rank where it removes most weighted error for its bytes; some layers may get no correction."""


class Holdout(enum.StrEnum):
    """The calibration sequences that are held out to check corrections on."""

    NONE = "none"
    EIGHTH = "1/8"
    """Every eighth calibration sequence: corrections are fitted to the rest, and stay if they lower the error on these.

    EoRA's correction is the residual projected on some of its outputs' directions, U U^T (W - W'), whatever the
    statistics: before it is rounded it raises the error on no input at all. What can is rounding it to few bits, or a
    Fisher on the output side.
    """


def default_base() -> Compressor:
    """GPTQ at its defaults; methods are imported only when they are looked up."""
    return METHODS["gptq"]()


@dataclass(frozen=True, kw_only=True)
class CorrectionOptions(Compressor, ABC):
    """Options of every method that adds a low-rank correction to a base method's form."""

    base: Compressor | None = field(
        default=None,
        metadata={"resolves_to": default_base, "help": "method whose error is corrected"},
    )
    """None: GPTQ, or a base checkpoint's layers in its place."""
    rank: int | None = field(
        default=None,
        metadata={
            "resolves_to": RANK,
            "help": "rank of the correction of every layer; not given: 32, in small layers the "
            "largest that leaves them smaller than they were",
        },
    )
    adapter_budget: str | None = field(
        default=None,
        metadata={
            "metavar": "BYTES",
            "help": "bytes for all corrections together (20MB, 0.5GiB), or a share of what the base takes in these "
            "layers (5%); takes the place of --rank",
        },
    )
    allocation: CorrectionAllocation | None = field(
        default=None,
        metadata={
            "resolves_to": CorrectionAllocation.SPECTRUM,
            "help": "how an adapter budget is spread: ranks where they remove most error, which takes a survey, or one "
            "rank for all",
        },
    )
    adapter_importance: Importance | None = field(
        default=None,
        metadata={
            "resolves_to": Importance.RELATIVE,
            "help": "what a unit of a layer's error costs where an adapter budget is spread by a survey",
        },
    )
    adapter_bits: AdapterBits = field(
        default=AdapterBits.FULL,
        metadata={
            "help": "bits of the factors: below 16 by GPTQ on their own statistics; auto: the width with the least "
            "error in the same bytes, found by a survey. A PEFT adapter stores the same values in 16"
        },
    )
    factor_dtype: FactorDtype | None = field(
        default=None,
        metadata={"resolves_to": FactorDtype.FLOAT16, "help": "dtype of factors of 16 bits"},
    )
    ranks_for: RanksFor = field(
        default=RanksFor.ANY,
        metadata={
            "help": "vllm: the rank rounded up (a budget's: down) to one that vLLM serves: "
            + ", ".join(map(str, VLLM_RANKS))
        },
    )
    holdout: Holdout = field(
        default=Holdout.NONE,
        metadata={
            "help": "1/8: every eighth calibration sequence is held out, and a correction that does not lower its "
            "layer's error on those is dropped and listed in the report"
        },
    )
    base_rounds: int = field(
        default=0,
        metadata={
            "help": "alternates so many times: requantise W - BA, refit BA on the new error (as CALDERA); each layer "
            "keeps its best pair, and each round costs as much as the first"
        },
    )
    target: FitTarget = field(
        default=FitTarget.LAYER,
        metadata={
            "help": "what a layer's outputs are fitted to, on inputs from the compressed layers before it: the "
            "weight's own outputs on them (layer), or the original model's (original)"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None and self.rank < 1:
            raise RecipeError(f"must be 1 or more, got {self.rank}", option="rank")
        if self.base_rounds < 0:
            raise RecipeError(f"must be 0 or more, got {self.base_rounds}", option="base_rounds")
        if isinstance(self.base, CorrectionOptions):
            raise RecipeError(
                f"{self.base.name} is itself a correction; give a method that compresses",
                option="base",
            )
        if self.adapter_budget is not None:
            parse_share_or_bytes(self.adapter_budget, 0, "adapter_budget", "the base's")
        self._refuse_clashes()

    def idle(self) -> Mapping[str, str]:
        """The rank beside a budget, what a budget alone needs without one, the dtype where no factor has 16 bits."""
        found = {}
        if self.adapter_budget is not None:
            found["rank"] = (
                f"beside --adapter-budget {self.adapter_budget}, which settles the ranks; give one of the two"
            )
        else:
            found["allocation"] = (
                "without --adapter-budget, which it spreads: a --rank is one for all layers"
            )
        if not self.allocates_by_spectrum:
            found["adapter_importance"] = (
                "where no plan compares layers; give an --adapter-budget with --allocation spectrum"
            )
        if FULL_BITS not in self.widths:
            found["factor_dtype"] = (
                f"with --adapter-bits {self.adapter_bits}, which leaves no factors of 16 bits; give one of the two"
            )
        return found

    def _refuse_clashes(self) -> None:
        """Raises RecipeError for options of the base that do not go with these."""
        base = self.resolved_base
        if CrossGram in base.needs:
            raise RecipeError(
                "the base would be fitted to the original's outputs, and the correction to the "
                "layer's; set method.target: original, and leave method.base.target at layer",
                option="base.target",
            )
        if self.surveys_residuals and base.blocks_at_once > 1:
            raise RecipeError(
                f"needs a survey of one block at a time, and {base.name} compresses layers of "
                "several blocks together; give a --rank",
                option="adapter_budget",
            )
        if self.surveys_residuals and base.surveys is not None:
            raise RecipeError(
                f"needs a survey of the error that {base.name} leaves, and {base.name} needs "
                "one of its own before; give the base a plan without a survey (uniform), or a --rank",
                option="adapter_budget",
            )
        if self.holdout is not Holdout.NONE and base.shifts_outputs:
            raise RecipeError(
                f"{base.name} corrects the mean of the outputs, which the held-out sequences do not "
                "measure; use --holdout none",
                option="holdout",
            )
        if self.target is not FitTarget.LAYER:
            self._refuse_target()
        if self.adapter_importance is Importance.KL and base.shifts_outputs:
            raise RecipeError(
                f"kl measures weights, and {base.name} changes biases too; use fisher",
                option="adapter_importance",
            )

    def _refuse_target(self) -> None:
        """Raises RecipeError for options that do not go with the original's outputs as the target."""
        if self.resolved_base.shifts_outputs:
            raise RecipeError(
                f"{self.resolved_base.name} corrects the mean of the layer's own outputs, not of the "
                "original's; use --target layer",
                option="target",
            )
        if self.holdout is not Holdout.NONE:
            raise RecipeError(
                "with --target original the target itself is fitted to every sequence, so none can be "
                "held out; use --holdout none, or --target layer",
                option="holdout",
            )

    @property
    def resolved_base(self) -> Compressor:
        """The base method: the given one, or the default."""
        return default_base() if self.base is None else self.base

    @property
    def resolved_rank(self) -> int:
        """The rank: the given one, or the default."""
        return RANK if self.rank is None else self.rank

    @property
    def settles_rank(self) -> bool:
        """Whether every layer has the one rank that was given, whatever its size."""
        return self.rank is not None

    def why_none(self, shape: tuple[int, int]) -> str:
        """Why a layer has no correction in a plan that gives others one."""
        if self.adapter_budget is None and not self.settles_rank:
            return f"no correction: none leaves so small a layer {shape} smaller than it was"
        return "no correction: its bytes remove more error in other layers"

    @property
    def resolved_importance(self) -> Importance:
        """The importance of a layer's error: the given one, or the default."""
        return Importance.RELATIVE if self.adapter_importance is None else self.adapter_importance

    @property
    def allocates_by_spectrum(self) -> bool:
        """Whether an adapter budget gives each layer a rank of its own."""
        is_spread = self.allocation is not CorrectionAllocation.UNIFORM
        return self.adapter_budget is not None and is_spread

    @property
    def surveys_residuals(self) -> bool:
        """Whether planning the corrections needs a survey of the error that the base leaves in every layer."""
        return self.allocates_by_spectrum or self.adapter_bits is AdapterBits.AUTO

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths in bits that a correction's factors may be stored in, 16 first among several."""
        if self.adapter_bits is not AdapterBits.AUTO:
            return (int(self.adapter_bits),)
        return tuple(int(bits) for bits in AdapterBits if bits is not AdapterBits.AUTO)

    @property
    def storage(self) -> torch.dtype:
        """The torch dtype of the stored factors."""
        return torch.bfloat16 if self.factor_dtype is FactorDtype.BFLOAT16 else torch.float16

    def served(self, rank: int) -> int:
        """The rank, rounded up to one that the server of `ranks_for` accepts. Raises RecipeError above its largest."""
        if self.ranks_for is RanksFor.ANY:
            return rank
        enough = [served for served in VLLM_RANKS if served >= rank]
        if not enough:
            raise RecipeError(
                f"{rank} is above {VLLM_RANKS[-1]}, the largest that vLLM serves; give a lower rank, or "
                "--ranks-for any",
                option="rank",
            )
        return enough[0]

    def ranks_in(self, thinnest: int, bits: int) -> list[int]:
        """The ranks that a plan may give a layer whose shorter side is `thinnest`, ascending.

        They are multiples of 8, or of 32 where factors are codes (rows of codes are packed by 32), and the full rank.
        """
        if self.ranks_for is RanksFor.VLLM:
            return [rank for rank in VLLM_RANKS if rank <= thinnest] or [thinnest]
        step = RANK_STEP if bits == FULL_BITS else CODES_A_ROW
        ranks = list(range(step, thinnest + 1, step))
        return ranks if ranks and ranks[-1] == thinnest else [*ranks, thinnest]

    @property
    def saves_bytes(self) -> bool:
        """Whether the base's forms are to be smaller than the weights."""
        return self.resolved_base.saves_bytes

    @abstractmethod
    def rounding(self, bits: int) -> Quantiser:
        """The quantiser that stores factors in so many bits."""

    def correction_bytes(self, shape: tuple[int, int], rank: int, bits: int) -> int:
        """Bytes of the two factors of a correction for a weight (o, i), as the native format stores them."""
        if bits == FULL_BITS:
            return rank * sum(shape) * FACTOR_BYTES
        if rank == 0:
            return 0
        quantiser, (o, i) = self.rounding(bits), shape
        return quantiser.planned_bytes((o, rank)) + quantiser.planned_bytes((rank, i))

    def adapter_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of the two factors in a PEFT adapter, which holds 16 bits whatever they were rounded to."""
        return self.correction_bytes(shape, self.resolved_rank, FULL_BITS)

    def planned_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of the base's form and of the two factors."""
        correction = self.correction_bytes(shape, self.resolved_rank, int(self.adapter_bits))
        return self.resolved_base.planned_bytes(shape) + correction


# A correction of a correction has one closed form, which is the correction of a higher rank.
CorrectionOptions.refused_choices = (CorrectionOptions,)
