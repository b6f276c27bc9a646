"""CoSpaDi: a dictionary instead of a subspace, every line of the weight a sparse combination of its atoms.

Shopkhoev et al. 2025, arXiv:2509.22075 (CoSpaDi: calibration-guided sparse dictionary learning). Needs: Gram. For
W (o, i) and G = L L^T it looks for W' = Z D with the least ||(W - Z D) L||_F, D (k, i), and s nonzeros in every row of
Z (o, k) (equations 2, 5, 6, of the transposed weight); or W' = D Z, D (o, k), and s nonzeros in every column of
Z (k, i), where that dictionary is the smaller one. Cost: one Cholesky of G, or one eigendecomposition of it, for each
input, and for each round some three products of k x k by k x n.

Differs from the paper, whose code is not public: bytes are those on disk, the mask included (theirs leave it out unless
codes have 14 bits); the solver is ADMM for the codes and least squares for the atoms (theirs, batched matching pursuit
and K-SVD, is `--solver ksvd`); codes of inputs are ours; after rounding the codes the dictionary is refitted.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from calibration.stats import Gram, Statistics
from compress.code_storage import CodeBits, CodeStorage, joined
from compress.coding import CoupledLines, FreeLines, Lines, Pattern, solved
from compress.compressor import Compressor, LayerShape, refuse_damping
from compress.dictionary import alternating, oneshot
from compress.errors import RecipeError
from compress.factors import FactorDtype
from compress.forms import Along, Form, Sparse
from compress.linalg import add_ridge_, cholesky
from compress.quantities import parse_bytes

ATOM_MULTIPLE = 4
"""Of atoms: what a 2:4 pattern needs."""


class Solver(enum.StrEnum):
    """How codes and atoms are found."""

    ADMM = "admm"
    """Codes by ADMM, atoms by least squares, in turn."""
    ONESHOT = "oneshot"
    """Principal components, their largest coefficients, one fit."""


class Coded(enum.StrEnum):
    """Which side of the weight has the sparse codes."""

    AUTO = "auto"
    """The longer one: the dictionary is then the smaller."""
    OUTPUTS = "outputs"
    """A code for every output, as in the paper."""
    INPUTS = "inputs"
    """A code for every input."""


@dataclass(frozen=True, kw_only=True)
class CoSpaDi(Compressor, name="cospadi"):
    """A dictionary and sparse codes, fitted to the layer's outputs."""

    paper: ClassVar[str] = "Shopkhoev et al. 2025 (CoSpaDi), arXiv:2509.22075"

    keep: float = field(
        default=0.8,
        metadata={
            "help": "share of the compressed layers' bytes that is kept, above 0 and below 1"
        },
    )
    budget: str | None = field(
        default=None,
        metadata={"help": "bytes of the whole checkpoint (120MB); takes the place of --keep"},
    )
    atoms: int | None = field(
        default=None,
        metadata={"help": "atoms of every dictionary; takes the place of --keep"},
    )
    ratio: float = field(
        default=2.5, metadata={"help": "atoms for each nonzero of a code (k / s), 1 or more"}
    )
    pattern: Pattern = field(
        default=Pattern.FREE,
        metadata={"help": "where nonzeros may be: anywhere in a line, or two of every four"},
    )
    coded: Coded = field(
        default=Coded.AUTO,
        metadata={"help": "what has a code each: outputs, inputs, or the more numerous"},
    )
    solver: Solver = field(
        default=Solver.ADMM, metadata={"help": "how the dictionary and the codes are found"}
    )
    rounds: int = field(default=20, metadata={"help": "rounds of codes and dictionary in turn"})
    dictionary_dtype: FactorDtype = field(
        default=FactorDtype.AUTO,
        metadata={"help": "dtype of the stored dictionary; auto: the weight's own"},
    )
    code_bits: CodeBits = field(
        default=CodeBits.AUTO,
        metadata={"help": "bits of a nonzero of the codes; auto: as the dictionary"},
    )
    damping: float = field(
        default=0.01, metadata={"help": "ridge on the Gram, as a share of its median diagonal"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_damping(self.damping)
        if not 0 < self.keep < 1:
            raise RecipeError(
                f"method.keep: {self.keep} is no share of the bytes that is kept; above 0 and below 1, 0.8 say"
            )
        if self.budget is not None:
            parse_bytes(self.budget, "method.budget")
        if not 1 <= self.ratio < 1000:
            raise RecipeError(
                f"method.ratio: {self.ratio} atoms for each nonzero; 1 or more, 2.5 say"
            )
        for name in ("rounds", "atoms"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"method.{name}: {value} is too small; 1 or more")
        self._refuse_idle()

    def _refuse_idle(self) -> None:
        """Raises RecipeError for an option that others would leave without effect."""
        if self.pattern is Pattern.TWO_OF_FOUR and self.ratio not in (2.0, 2.5):
            raise RecipeError(
                f"method.ratio: {self.ratio} does nothing where two of every four are nonzero"
            )
        if self.solver is Solver.ONESHOT and self.rounds != 20:
            raise RecipeError(f"method.rounds: {self.rounds} does nothing with --solver oneshot")
        if self.atoms is not None and self.budget is not None:
            raise RecipeError(
                f"method.budget: {self.budget} does nothing beside --atoms {self.atoms}"
            )

    def plan(self, layers: Mapping[str, LayerShape], rest_bytes: int = 0) -> dict[str, Compressor]:
        """Settle each layer's atoms, side and dtypes. Raises RecipeError naming the layer that gets no atom."""
        share = self._share(layers, rest_bytes)
        planned: dict[str, Compressor] = {}
        for name, layer in layers.items():
            settled = self._settled(layer)
            k = settled.atoms or settled._paid(layer.shape, share * layer.n_bytes)
            if k == 0:
                raise RecipeError(
                    f"method.keep: {share:.3g} of the bytes of {name} {layer.shape} does not pay for {ATOM_MULTIPLE} "
                    "atoms and their codes; keep more, or --exclude it"
                )
            planned[name] = replace(settled, atoms=k, budget=None)
        return planned

    def _share(self, layers: Mapping[str, LayerShape], rest_bytes: int) -> float:
        """Of every layer's bytes."""
        if self.budget is None:
            return self.keep
        before = sum(layer.n_bytes for layer in layers.values())
        whole = parse_bytes(self.budget, "method.budget")
        if not rest_bytes < whole < before + rest_bytes:
            raise RecipeError(
                f"method.budget: {whole} bytes for the whole checkpoint, which takes {before + rest_bytes} now, "
                f"{rest_bytes} of them outside the layers to be compressed; give something between"
            )
        return (whole - rest_bytes) / before

    def _settled(self, layer: LayerShape) -> CoSpaDi:
        """With this layer's dtypes and side."""
        o, i = layer.shape
        dtype, bits, coded = self.dictionary_dtype, self.code_bits, self.coded
        if dtype is FactorDtype.AUTO:
            name = str(layer.dtype).removeprefix("torch.")
            if name not in list(FactorDtype):
                raise RecipeError(
                    f"method.dictionary_dtype: auto would store it as the weights are, in {name}; give bfloat16 say"
                )
            dtype = FactorDtype(name)
        if bits is CodeBits.AUTO:
            bits = CodeBits.FULL if dtype is FactorDtype.FLOAT32 else CodeBits.HALF
        if coded is Coded.AUTO:
            coded = Coded.OUTPUTS if o >= i else Coded.INPUTS
        return replace(self, dictionary_dtype=dtype, code_bits=bits, coded=coded)

    def _paid(self, shape: tuple[int, int], n_bytes: float) -> int:
        """The most atoms, a multiple of 4, that so many bytes pay for; 0 if for none."""
        low, high = 0, max(shape) * 8 // ATOM_MULTIPLE
        while low < high:
            middle = (low + high + 1) // 2
            fits = self._bytes_of(shape, middle * ATOM_MULTIPLE) <= n_bytes
            low, high = (middle, high) if fits else (low, middle - 1)
        return low * ATOM_MULTIPLE

    def nonzeros(self, k: int) -> int:
        """Of a line, with k atoms."""
        if self.pattern is Pattern.TWO_OF_FOUR:
            return k // 2
        return max(1, round(k / self.ratio))

    @property
    def storage(self) -> CodeStorage:
        """What is stored in what, once planned."""
        return CodeStorage(getattr(torch, self.dictionary_dtype.value), self.code_bits)

    def planned_bytes(self, shape: tuple[int, int]) -> int:
        """The dictionary, the values of the codes, and their mask."""
        return self._bytes_of(shape, self.atoms or 0)

    def _bytes_of(self, shape: tuple[int, int], k: int) -> int:
        n, d = shape if self.coded is Coded.OUTPUTS else shape[::-1]
        storage = self.storage
        return storage.dictionary_bytes(k, d) + storage.code_bytes(n, k, self.nonzeros(k))

    def compress(self, weights: Sequence[Tensor], stats: Statistics) -> list[Form]:
        """Each weight's own dictionary and codes."""
        return [self._fitted(weight, stats) for weight in weights]

    def _fitted(self, weight_oi: Tensor, stats: Statistics) -> Form:
        k = self.atoms or 0
        s = self.nonzeros(k)
        lines, scale_n = self._lines(weight_oi, stats)
        if self.solver is Solver.ONESHOT:
            codes, _ = oneshot(lines, k, s, self.pattern)
        else:
            codes, _ = alternating(lines, k, s, self.pattern, self.rounds)
        along = Along.ROWS if self.coded is Coded.OUTPUTS else Along.COLUMNS
        stored = self.storage.codes(codes / scale_n[:, None], s, self.pattern, along)
        return joined(stored, self.storage.dictionary(self._refitted(weight_oi, stored, stats)))

    def _lines(self, weight_oi: Tensor, stats: Statistics) -> tuple[Lines, Tensor]:
        """The problem, and what its lines were multiplied by: (n,)."""
        if self.coded is Coded.OUTPUTS:
            chol_ii = stats.once(
                ("whitening", self.damping), lambda: cholesky(self._gram(stats)).float()
            )
            return FreeLines(weight_oi @ chol_ii), weight_oi.new_ones(len(weight_oi))
        gram, root_i, eigen = stats.once(("scaled gram", self.damping), lambda: self._scaled(stats))
        return CoupledLines((weight_oi * root_i).T.contiguous(), gram, eigen), root_i

    def _gram(self, stats: Statistics) -> Tensor:
        return add_ridge_(stats[Gram].mean_ii(), self.damping)

    def _scaled(self, stats: Statistics) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """The Gram with a diagonal of ones, the roots of the one it had, and its eigendecomposition."""
        gram_ii = self._gram(stats)
        root_i = gram_ii.diagonal().sqrt()
        gram_ii /= root_i * root_i[:, None]
        return gram_ii.float(), root_i.float(), torch.linalg.eigh(gram_ii)

    def _refitted(self, weight_oi: Tensor, stored: Sparse, stats: Statistics) -> Tensor:
        """The best dictionary for the codes as they are stored, fp64.

        For codes of outputs the inputs drop out: (Z^T Z)^-1 Z^T W.
        """
        weight, codes = weight_oi.double(), stored.dense().double()
        if self.coded is Coded.OUTPUTS:
            return solved(codes.T @ codes, codes.T @ weight)
        gram_ii = stats.once(("damped gram", self.damping), lambda: self._gram(stats))
        image_ki = codes @ gram_ii
        return solved(image_ki @ codes.T, image_ki @ weight.T).T
