"""Options of low-rank corrections: their bytes, allocation and storage, and what they are judged by."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch

from calibration.statistics.cross_gram import CrossGram
from compress.errors import RecipeError
from compress.families.base import Compressor
from compress.families.quantiser import Quantiser
from compress.families.quantities import parse_share_or_bytes
from compress.families.target import FitTarget
from compress.forms.packing import CODES_A_ROW
from compress.solvers.rank_allocation import Importance

RANK, RANK_STEP = 32, 8
FACTOR_BYTES = 2
FULL_BITS = 16
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be; it computes with that many whatever an adapter has."""


class FactorDtype(enum.StrEnum):
    """What the low-rank factors are stored in."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class RanksFor(enum.StrEnum):
    """Who is to serve the corrections."""

    ANY = "any"
    VLLM = "vllm"


class AdapterBits(enum.StrEnum):
    """Bits of a number in the factors."""

    FULL = "16"
    EIGHT = "8"
    FOUR = "4"
    THREE = "3"
    AUTO = "auto"
    """Whichever of these loses least in the same bytes, by what rounding was measured to cost."""


class CorrectionAllocation(enum.StrEnum):
    """How the bytes of corrections are spread over the layers."""

    UNIFORM = "uniform"
    """One rank for every layer."""
    SPECTRUM = "spectrum"
    """Each rank where it removes most weighted error for its bytes; layers where none does get no correction."""


class Holdout(enum.StrEnum):
    """What is kept aside to judge corrections by."""

    NONE = "none"
    EIGHTH = "1/8"
    """Every eighth calibration sequence: corrections are fitted to the rest, and stay if they lower the error on these.

    EoRA's correction is the residual projected on some of its outputs' directions, U U^T (W - W'), whatever the
    statistics: before it is rounded it raises the error on no input at all. What can is rounding it to few bits, or a
    Fisher on the output side.
    """


@dataclass(frozen=True, kw_only=True)
class CorrectionOptions(Compressor, ABC):
    """Options of every method that adds a low-rank correction to a base method's form."""

    base: Compressor
    rank: int = field(default=RANK, metadata={"help": "rank of the correction of every layer"})
    adapter_budget: str | None = field(
        default=None,
        metadata={
            "metavar": "BYTES",
            "help": "bytes for all corrections together (20MB, 0.5GiB), or their share of what the base takes in these "
            "layers (5%); takes the place of the rank",
        },
    )
    allocation: CorrectionAllocation = field(
        default=CorrectionAllocation.SPECTRUM,
        metadata={
            "help": "how an adapter budget is spread: ranks where they remove most error, which takes a survey, or "
            "one rank for all"
        },
    )
    adapter_importance: Importance = field(
        default=Importance.RELATIVE,
        metadata={"help": "what a unit of a layer's error costs where a survey compares layers"},
    )
    adapter_bits: AdapterBits = field(
        default=AdapterBits.FULL,
        metadata={
            "help": "bits of the factors: below 16 by GPTQ on their own statistics; auto: what loses least in as many "
            "bytes, found by a survey. A PEFT adapter holds the same values in 16"
        },
    )
    factor_dtype: FactorDtype = field(
        default=FactorDtype.FLOAT16, metadata={"help": "dtype of factors of 16 bits"}
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
            "layer's "
            "error on those is dropped and listed in the report"
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
            "weight's own "
            "outputs on them (layer), or the original model's (original)"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise RecipeError(f"{self.rank} is not a rank; 1 or more", option="rank")
        if self.base_rounds < 0:
            raise RecipeError(
                f"{self.base_rounds} is no number of rounds; 0 or more", option="base_rounds"
            )
        if CrossGram in self.base.needs:
            raise RecipeError(
                "the base would be fitted to the original's outputs, and the correction to the "
                "layer's; set method.target: original, and leave method.base.target at layer",
                option="base.target",
            )
        if isinstance(self.base, self.refused_choices):
            raise RecipeError(
                f"{self.base.name} is itself a correction; give the method that compresses",
                option="base",
            )
        if self.adapter_budget is not None:
            parse_share_or_bytes(self.adapter_budget, 0, "adapter_budget", "the base's")
        self._refuse_idle()
        self._refuse_clashes()

    def _refuse_idle(self) -> None:
        """Raises RecipeError for an option that nothing would look at."""
        if self.adapter_budget is not None and self.rank != RANK:
            raise RecipeError(
                f"{self.rank} does nothing beside --adapter-budget {self.adapter_budget}, which settles "
                "the ranks; give one of the two",
                option="rank",
            )
        if self.allocation is CorrectionAllocation.UNIFORM and self.adapter_budget is None:
            raise RecipeError(
                "uniform spreads an --adapter-budget, and there is none; a --rank is one "
                "for all layers anyway",
                option="allocation",
            )
        if self.adapter_importance is not Importance.RELATIVE and not self.allocates_by_spectrum:
            raise RecipeError(
                f"{self.adapter_importance} compares layers, and nothing here does; give an "
                "--adapter-budget",
                option="adapter_importance",
            )

        if FULL_BITS not in self.widths and self.factor_dtype is not FactorDtype.FLOAT16:
            raise RecipeError(
                f"{self.factor_dtype} is for factors of 16 bits, and with --adapter-bits "
                f"{self.adapter_bits} there are none; give one of the two",
                option="factor_dtype",
            )

    def _refuse_clashes(self) -> None:
        """Raises RecipeError for options of the base that do not go with these."""
        if self.surveys_residuals and self.base.spans_blocks:
            raise RecipeError(
                f"it takes a survey of one block at a time, and {self.base.name} compresses "
                "several together; give a --rank",
                option="adapter_budget",
            )
        if self.surveys_residuals and self.base.surveys is not None:
            raise RecipeError(
                f"it takes a survey of what {self.base.name} loses, whose own plan takes one "
                "before; give the base a plan that looks at nothing (uniform, say), or a --rank",
                option="adapter_budget",
            )
        if self.holdout is not Holdout.NONE and self.base.shifts_outputs:
            raise RecipeError(
                f"{self.base.name} puts means of outputs back, which the held-out part does not know; "
                "use none",
                option="holdout",
            )
        if self.target is not FitTarget.LAYER:
            self._refuse_target()
        if self.adapter_importance is Importance.KL and self.base.shifts_outputs:
            raise RecipeError(
                f"kl measures weights, and {self.base.name} changes biases too; use fisher",
                option="adapter_importance",
            )

    def _refuse_target(self) -> None:
        """Raises RecipeError for what the target does not go with."""
        if self.base.shifts_outputs:
            raise RecipeError(
                f"{self.base.name} puts means of outputs back, by the weight and not by the original's "
                "outputs; use none",
                option="target",
            )
        if self.holdout is not Holdout.NONE:
            raise RecipeError(
                "with --target original the target itself is fitted to every sequence, so none can be "
                "held out; use --holdout none, or --target layer",
                option="holdout",
            )

    @property
    def allocates_by_spectrum(self) -> bool:
        """Whether layers get ranks of their own."""
        spectrum = self.allocation is CorrectionAllocation.SPECTRUM
        return self.adapter_budget is not None and spectrum

    @property
    def surveys_residuals(self) -> bool:
        """Whether the plan of the corrections looks at what the base loses in every layer."""
        return self.allocates_by_spectrum or self.adapter_bits is AdapterBits.AUTO

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits that a correction may be stored in, 16 first among several."""
        if self.adapter_bits is not AdapterBits.AUTO:
            return (int(self.adapter_bits),)
        return tuple(int(bits) for bits in AdapterBits if bits is not AdapterBits.AUTO)

    @property
    def storage(self) -> torch.dtype:
        """The torch dtype of the stored factors."""
        return torch.float16 if self.factor_dtype is FactorDtype.FLOAT16 else torch.bfloat16

    def served(self, rank: int) -> int:
        """The rank, or the next one that is served. Raises RecipeError above the last of them."""
        if self.ranks_for is RanksFor.ANY:
            return rank
        enough = [served for served in VLLM_RANKS if served >= rank]
        if not enough:
            raise RecipeError(
                f"{rank} is above {VLLM_RANKS[-1]}, the most that vLLM serves; lower it, or give "
                "--ranks-for any",
                option="rank",
            )
        return enough[0]

    def ranks_in(self, thinnest: int, bits: int) -> list[int]:
        """Ranks that a plan may give layers of which the thinnest side is this, ascending: multiples, or the full one.

        Rows of codes are packed by 32.
        """
        if self.ranks_for is RanksFor.VLLM:
            return [rank for rank in VLLM_RANKS if rank <= thinnest] or [thinnest]
        step = RANK_STEP if bits == FULL_BITS else CODES_A_ROW
        ranks = list(range(step, thinnest + 1, step))
        return ranks if ranks and ranks[-1] == thinnest else [*ranks, thinnest]

    @property
    def saves_bytes(self) -> bool:
        """As its base."""
        return self.base.saves_bytes

    @abstractmethod
    def rounding(self, bits: int) -> Quantiser:
        """What stores factors in so many bits."""

    def correction_bytes(self, shape: tuple[int, int], rank: int, bits: int) -> int:
        """Bytes of the two factors of a correction for a weight (o, i), as the native format stores them."""
        if bits == FULL_BITS:
            return rank * sum(shape) * FACTOR_BYTES
        if rank == 0:
            return 0
        quantiser, (o, i) = self.rounding(bits), shape
        return quantiser.planned_bytes((o, rank)) + quantiser.planned_bytes((rank, i))

    def adapter_bytes(self, shape: tuple[int, int]) -> int:
        """The same in a PEFT adapter, which holds 16 bits whatever the correction was rounded to."""
        return self.correction_bytes(shape, self.rank, FULL_BITS)

    def planned_bytes(self, shape: tuple[int, int]) -> int:
        """The base's bytes and the two factors'."""
        bits = int(self.adapter_bits)
        return self.base.planned_bytes(shape) + self.correction_bytes(shape, self.rank, bits)


# A correction of a correction has one closed form, which is the correction of a higher rank.
CorrectionOptions.refused_choices = (CorrectionOptions,)
