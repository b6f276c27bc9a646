"""The options, plan and storage that all pruning methods share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from calibration.statistics.collection import Statistics
from compress.errors import RecipeError
from compress.families.base import Compressor, LayerShape
from compress.families.budget import refuse_keep
from compress.families.low_rank import FactorDtype, settled_dtype
from compress.families.sparse_storage import CodeBits, CodeStorage
from compress.forms.base import Form
from compress.forms.sparse import Along, Sparse
from compress.solvers.masks import Pattern

SPARSITY = 0.5


@dataclass(frozen=True, kw_only=True)
class Pruner(Compressor, ABC):
    """Options of every method that keeps some weights of every row and makes the others zero."""

    sparsity: float | None = field(
        default=None,
        metadata={
            "resolves_to": SPARSITY,
            "help": "share of zeros in every row, above 0 and below 1",
        },
    )
    keep: float | None = field(
        default=None,
        metadata={
            "metavar": "SHARE",
            "help": "share of the layers' bytes that is kept; takes the place of --sparsity",
        },
    )
    per_row: int | None = field(
        default=None,
        metadata={"metavar": "N", "help": "weights kept in a row; takes the place of --sparsity"},
    )
    pattern: Pattern = field(
        default=Pattern.FREE,
        metadata={"help": "where weights may stay: anywhere in a row, or two of every four"},
    )
    value_dtype: FactorDtype | None = field(
        default=None,
        metadata={
            "resolves_to": FactorDtype.AUTO,
            "help": "dtype of the weights that stay; auto: the weight's own",
        },
    )
    value_bits: CodeBits = field(
        default=CodeBits.AUTO, metadata={"help": "bits of a weight that stays; auto: as its dtype"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise RecipeError(
                f"must be between 0 and 1 (e.g. {SPARSITY}), got {self.sparsity}", option="sparsity"
            )
        refuse_keep(self.keep)
        if self.per_row is not None and self.per_row < 1:
            raise RecipeError(f"must be 1 or more, got {self.per_row}", option="per_row")
        if self.value_bits is CodeBits.HALF and self.value_dtype is FactorDtype.FLOAT32:
            raise RecipeError(
                "float32 has 32 bits, and --value-bits says 16; give one of the two",
                option="value_dtype",
            )

    def idle(self) -> Mapping[str, str]:
        """The options without effect: all that say how many weights stay, but the first that was given, and a dtype.

        A dtype has an effect where it says the bits, and beside 16 bits, of which there are two kinds.
        """
        found = {}
        if self.value_bits not in (CodeBits.AUTO, CodeBits.HALF):
            found["value_dtype"] = (
                f"beside --value-bits {self.value_bits}, which says how values are stored; give one of the two"
            )
        # A planned layer has its number, `per_row`, beside the pattern 2:4; another number is refused in the plan.
        says = {
            "pattern": self.pattern if self.pattern is Pattern.TWO_OF_FOUR else None,
            "keep": self.keep,
            "per_row": self.per_row,
            "sparsity": self.sparsity,
        }
        given = [name for name, value in says.items() if value is not None]
        if not given:
            return found
        first = given[0]
        flag = first.replace("_", "-")
        reason = (
            f"beside --{flag} {says[first]}, which says how many weights stay; give one of the two"
        )
        others = [name for name in says if name not in (first, "pattern")]
        if first == "pattern":
            others.remove("per_row")
        return found | dict.fromkeys(others, reason)

    @property
    def resolved_sparsity(self) -> float:
        """The share of zeros in a row: the given one, or the default."""
        return SPARSITY if self.sparsity is None else self.sparsity

    def plan(
        self,
        layers: Mapping[str, LayerShape],
        rest_bytes: int = 0,  # noqa: ARG002  (shares decide the bytes, not a budget)
    ) -> dict[str, Compressor]:
        """Each layer's method with the number of weights that stay in a row, and their dtype, settled.

        Raises RecipeError naming a layer whose bytes pay for no weight, or whose inputs are no multiple of 4.
        """
        return {name: self.settled(name, layer) for name, layer in layers.items()}

    def settled(self, name: str, layer: LayerShape) -> Pruner:
        """The method of one layer, with the number of weights that stay in a row, and their dtype, settled."""
        asked = self.value_dtype or FactorDtype.AUTO
        dtype = settled_dtype(asked, layer.dtype, "value_dtype")
        bits = self.value_bits.beside(dtype)
        half = FactorDtype.BFLOAT16 if dtype is FactorDtype.FLOAT32 else dtype
        settled = replace(
            self, value_dtype=half if bits is CodeBits.HALF else None, value_bits=bits
        )
        return replace(settled, per_row=settled._row(name, layer), keep=None, sparsity=None)

    def _row(self, name: str, layer: LayerShape) -> int:
        """The number of weights that stay in a row of a layer."""
        i = layer.shape[1]
        if self.pattern is Pattern.TWO_OF_FOUR:
            if i % 4:
                raise RecipeError(
                    f"{self.pattern} needs inputs in multiples of 4, and {name} has {i}; --exclude it",
                    option="pattern",
                )
            if self.per_row not in (None, i // 2):
                raise RecipeError(
                    f"--pattern 2:4 keeps {i // 2} weights in a row of {name}, got {self.per_row}",
                    option="per_row",
                )
            return i // 2
        if self.per_row is not None:
            return min(self.per_row, i)
        if self.keep is None:
            return max(1, round((1 - self.resolved_sparsity) * i))
        budget = self.keep * layer.n_bytes
        paid = [s for s in range(1, i + 1) if self._bytes_of(layer.shape, s) <= budget]
        if not paid:
            raise RecipeError(
                f"{self.keep} of the bytes of {name} {layer.shape} does not pay for its mask; keep more",
                option="keep",
            )
        return paid[-1]

    @property
    def storage(self) -> CodeStorage:
        """The storage of values and masks, once planned."""
        settled = self.value_dtype or FactorDtype.FLOAT32  # of no effect but beside 16 bits
        return CodeStorage(getattr(torch, settled.value), self.value_bits, "--value-dtype")

    def planned_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of the values and the mask."""
        return self._bytes_of(shape, self.per_row or 0)

    def _bytes_of(self, shape: tuple[int, int], s: int) -> int:
        return self.storage.code_bytes(*shape, s, self.pattern)

    @property
    def rounds_as_it_prunes(self) -> bool:
        """Whether values are rounded during pruning, so that the result is not `pruned` rounded afterwards."""
        return False

    def compress(self, weights: Sequence[Tensor], stats: Statistics) -> list[Form]:
        """The sparse forms of the weights, each pruned by itself."""
        return [self.stored(self.pruned(weight, self.per_row or 0, stats)) for weight in weights]

    def stored(self, pruned_oi: Tensor) -> Sparse:
        """The form of a pruned weight (o, i). Raises LayerError for values that do not fit their storage."""
        return self.storage.codes(pruned_oi, self.per_row or 0, self.pattern, Along.ROWS)

    @abstractmethod
    def pruned(self, weight_oi: Tensor, s: int, stats: Statistics) -> Tensor:
        """The weight (o, i) with at most s nonzeros in every row. Raises LayerError if it cannot be pruned."""
