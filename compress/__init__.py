"""Post-training compression of language models.

After `import compress`, transformers' AutoModelForCausalLM.from_pretrained loads the checkpoints
that this toolkit writes. What users need is here: run, plan, calibrate, load_export,
load_unpacked, Recipe, Report, the errors, and every method by name in METHODS.

Importing it costs next to nothing. The format is registered when transformers' table of configs is imported, or at
once if transformers is there already; everything else is imported when it is first used. (Registering at import was
simpler, and cost torch and transformers, seconds of `compress --help` and of every shell completion. The hook waits
for one module, leaves when that has run, and without it a native checkpoint fails to load as any unknown one does.)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from compress.shadows import refuse_strangers

refuse_strangers()

from compress.forms.import_hook import after_import  # noqa: E402

if TYPE_CHECKING:
    from compress.config.recipe import Recipe
    from compress.errors import CheckpointError, LayerError, RecipeError
    from compress.exports.load import load_export, load_unpacked
    from compress.families.base import METHODS
    from compress.pipeline.main import calibrate, evaluate, plan, run
    from compress.report.report import Report
    from compress.training import save_trained, trainable_factors

_HOMES = {
    "METHODS": "compress.families.base",
    "CheckpointError": "compress.errors",
    "LayerError": "compress.errors",
    "Recipe": "compress.config.recipe",
    "RecipeError": "compress.errors",
    "Report": "compress.report.report",
    "calibrate": "compress.pipeline.main",
    "evaluate": "compress.pipeline.main",
    "load_export": "compress.exports.load",
    "load_unpacked": "compress.exports.load",
    "plan": "compress.pipeline.main",
    "run": "compress.pipeline.main",
    "save_trained": "compress.training",
    "trainable_factors": "compress.training",
}

__all__ = [
    "METHODS",
    "CheckpointError",
    "LayerError",
    "Recipe",
    "RecipeError",
    "Report",
    "calibrate",
    "evaluate",
    "load_export",
    "load_unpacked",
    "plan",
    "run",
    "save_trained",
    "trainable_factors",
]


def _register_native_format() -> None:
    from compress.forms.auto_config import register

    register()


after_import("transformers.models.auto.configuration_auto", _register_native_format)


def __getattr__(name: str) -> Any:
    """The public name, imported from its home when first used. Raises MissingExtraError if that needs an extra."""
    if name not in _HOMES:
        raise AttributeError(f"module 'compress' has no attribute {name!r}")
    if _HOMES[name].startswith("compress.pipeline."):
        from compress.extras import require

        require(f"compress.{name}")
    return getattr(import_module(_HOMES[name]), name)
