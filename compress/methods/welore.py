"""WeLore: adaptive ranks from one threshold on all weights' normalised singular values.

Jaiswal et al. 2024, arXiv:2407.11239 (ICML 2025), section 3: of each weight's own spectrum, scaled to 0 .. 1, what lies
below a global threshold goes. Layers whose spectrum has a heavy tail get low ranks (low-rank components, LRC, which the
paper fine-tunes alone), the others stay dense (N-LRC). Needs: nothing but the weights. Cost: two symmetric
eigenproblems of min(o, i) for each weight.

Differs from the authors' code: the threshold is searched for the bytes asked for (theirs is a table for two models, in
ranks removed), and a layer whose rank would save nothing stays dense (by default theirs factorises it and the model
grows). `svd_llm --allocation welore` selects in the same way on whitened spectra.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from compress.methods.svd import SVD
from compress.solvers.rank_allocation import Allocation


@dataclass(frozen=True, kw_only=True)
class WeLore(SVD, name="welore"):
    """Plain SVD with ranks from one threshold on normalised spectra; the rest stays dense."""

    paper: ClassVar[str] = "Jaiswal et al. 2024 (WeLore), arXiv:2407.11239"

    allocation: Allocation | None = field(
        default=None,
        metadata={
            "resolves_to": Allocation.WELORE,
            "help": "how ranks are spread over the layers; all but uniform need a survey of the layers' spectra",
        },
    )
