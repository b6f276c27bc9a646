"""What a run did and reached, as typed data: report.json.

The schema is versioned and strict: a report with unknown or missing keys is refused. A field that came later has a
default, so that the reports of earlier versions are still read.
"""

import json
from dataclasses import asdict, field
from pathlib import Path
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from calibration.heads import Head
from compress.errors import CheckpointError
from compress.report.environment import Environment
from compress.report.recorded_recipe import refuse_unreadable
from compress.report.strict import STRICT, read_strictly
from eval.scores import Sample, Scores

SCHEMA: Literal[1] = 1


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Spectrum:
    """Singular values, thinned out, of what a layer's low-rank part approximates."""

    ranks: tuple[int, ...]
    """1 = the largest value; the last is the number of values that there are."""
    shares: tuple[float, ...]
    """The singular values of these ranks over the first."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LayerReport:
    """What became of one weight."""

    name: str
    shape: tuple[int, int]
    """(out, in)."""
    method: str
    form: str
    """What is stored, in short: "4-bit g64 + rank 32"."""
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    relative_error: float | None
    """||(W - W') X|| / ||W X|| on the calibration tokens (Frobenius); None if not measured."""
    seconds: float
    """Time of the solver; layers that are solved together share it equally."""
    note: str
    """A fallback that was taken and why; empty if none was."""
    base_error: float | None = None
    """The relative error of a base checkpoint's layer without the path; None without such a checkpoint."""
    rank: int | None = None
    """Of its low-rank part; None if it has none (the atoms of a dictionary are no rank)."""
    spectrum: Spectrum | None = None
    """In the outputs on the calibration tokens, of the weight less everything but the low-rank part."""
    correction_bits: int | None = None
    """Bits of a number in the factors of its low-rank correction, before an adapter widens them; None without one."""
    stored_with: str | None = None
    """The layer that stores, in its own bytes, what this one shares with it; None if it stores all of its own."""
    failure: str | None = None
    """The error after which it was left as it was (--on-failure keep); None for a layer that was compressed."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BaseReport:
    """The compressed checkpoint that paths were added to."""

    checkpoint: str
    """As the recipe names it."""
    format: str
    """"gptq, 4 bits, groups of 128"."""
    producer: str | None
    """The tool that wrote it, if it says so."""
    fingerprint: str
    """Sha256 of it."""
    tensor_bytes: int
    n_packed: int
    """Layers that it holds as something else than their weight."""
    revision: str | None = None
    """The commit, for a checkpoint of the hub."""
    kind: str | None = None
    """The name of its format: "gptq"; None if it was not recorded."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class KeptTensor:
    """A tensor that is in the output as it was."""

    name: str
    shape: tuple[int, ...]
    reason: str
    n_bytes: int


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExportReport:
    """One written format, and its logits in a fresh process beside the compressed model's."""

    format: str
    folder: str
    """Relative to the output folder."""
    tensor_bytes: int
    loader: str
    relative_difference: float
    """Of the logits, L2."""
    max_abs_difference: float
    top1_agreement: float
    tolerance: float
    """Of the relative difference."""
    adapter: str | None
    """Folder of the PEFT adapter, relative to the output folder; None if there is none."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Totals:
    """Sums over the layers and over the whole checkpoint."""

    n_layers: int
    layer_bytes_before: int
    layer_bytes_after: int
    tensor_bytes_before: int
    tensor_bytes_after: int
    layer_bits_per_weight: float
    relative_error: float | None
    """Root of the summed squared output errors over that of the outputs; None if not measured."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Comparison:
    """The original and the export read back from disk, on the same text and items."""

    before: Scores
    after: Scores
    samples: tuple[Sample, ...] = ()
    """What both wrote after the same prompts; empty for models that write nothing."""
    text_sha256: str | None = None
    """Of the token ids of the held-out text that both read; None without one."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Report:
    """Everything that a reader needs to judge a compressed model and to make it again."""

    schema: Literal[1] = SCHEMA
    """Number of the schema; a report with another one is refused."""
    recipe: dict[str, Any]
    model: str
    """The source as it was resolved: a name, and a revision or a hash."""
    licence: str | None
    """As the source's README names it: an id of the hub, or the name of another one."""
    licence_link: str | None = None
    """Where the source's README says that its licence is."""
    fingerprint: str
    """Sha256 of the source checkpoint."""
    environment: Environment
    calibration: dict[str, Any]
    """What was read: paths, hashes, rows, tokens, seed."""
    layers: tuple[LayerReport, ...]
    kept: tuple[KeptTensor, ...]
    exports: tuple[ExportReport, ...]
    totals: Totals
    scores: Comparison | None
    """None if nothing was evaluated."""
    timings: dict[str, float]
    """Seconds of each stage, in order."""
    base: BaseReport | None = None
    """None: the model itself was compressed."""
    revision: str | None = None
    """The commit of the source, for one that came from the hub."""
    head: str = Head.NEXT_TOKEN.value
    """What the model puts out: next token, classes or features."""
    peak_memory: dict[str, int] = field(default_factory=dict)
    """Most bytes that the process held in memory in each stage; on macOS in it or before."""
    notes: tuple[str, ...]
    """Anything chosen or found on the way: statistics used again, tensors that were not read."""

    def bits_by_layer(self) -> dict[str, float]:
        """Bits per weight by layer's name; layers that share what one of them stores have those of all together."""
        groups: dict[str, list[LayerReport]] = {}
        for layer in self.layers:
            groups.setdefault(layer.stored_with or layer.name, []).append(layer)
        return {
            layer.name: 8 * sum(one.bytes_after for one in group) / sum(map(n_weights, group))
            if len(group) > 1
            else layer.bits_per_weight
            for group in groups.values()
            for layer in group
        }

    def to_json(self) -> str:
        """The text of report.json. Raises ValueError for NaN and infinity: JSON has neither."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The report in the text of a report.json.

        Raises:
            CheckpointError: not JSON, another schema, a key that is unknown, missing or wrong, or no recipe.
        """
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise CheckpointError(f"report: not JSON: {error}") from error
        if not isinstance(data, dict):
            raise CheckpointError(
                f"report: {_short(text)} is no report that `run` wrote; get it again"
            )
        schema = data.get("schema")
        if schema != SCHEMA:
            raise CheckpointError(f"report.schema: {schema!r}; this version reads {SCHEMA}")
        report = read_strictly(cls, text, "report")
        refuse_unreadable(report.recipe, "report.recipe")
        return report

    @classmethod
    def load(cls, folder: Path) -> "Report":
        """The report of an output folder.

        Raises:
            CheckpointError: there is none, or it is not one of ours (naming the file).
        """
        if folder.is_file():
            raise CheckpointError(f"{folder}: a file; name the folder that `run` wrote it into")
        path = folder / "report.json"
        if not path.is_file():
            raise CheckpointError(f"{folder}: no report.json in it; name a folder that `run` wrote")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path}: not UTF-8 text ({error}); get it again") from error
        try:
            return cls.from_json(text)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error


def _short(text: str) -> str:
    return text.strip() if len(text) < 40 else f"{text.strip()[:40]}..."


def n_weights(layer: LayerReport) -> int:
    """Of the layer as it was."""
    return layer.shape[0] * layer.shape[1]
