"""The report of a run as typed data: report.json.

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
    """Singular values, thinned out, of the matrix that a layer's low-rank part approximates."""

    ranks: tuple[int, ...]
    """Indices of the values, from 1 for the largest; the last is the number of singular values."""
    shares: tuple[float, ...]
    """Singular values at these indices, divided by the largest."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LayerReport:
    """Result of compressing one weight."""

    name: str
    shape: tuple[int, int]
    """Shape of the weight, (out, in)."""
    method: str
    form: str
    """The stored form in short: "4-bit g64 + rank 32"."""
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
    """Relative output error of the base checkpoint's layer without the correction; None without a base checkpoint."""
    rank: int | None = None
    """Rank of the low-rank part; None for a layer without one (the atoms of a dictionary are no rank)."""
    spectrum: Spectrum | None = None
    """Spectrum of what the low-rank part approximates (the weight less the other parts), weighted by the inputs."""
    correction_bits: int | None = None
    """Bits of the numbers in the factors of the correction, before an adapter widens them; None without one."""
    stored_with: str | None = None
    """The layer that stores, in its own bytes, what this one shares with it; None if it stores all of its own."""
    failure: str | None = None
    """The error after which it was left as it was (--on-failure keep); None for a layer that was compressed."""
    tokens: int | None = None
    """Calibration tokens that the router sent to it; None for a layer of no expert."""
    pooled: float | None = None
    """The weight, 0 to 1, of the layer's other experts in its statistics; None for a layer of no expert."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BaseReport:
    """The compressed checkpoint that corrections were added to."""

    checkpoint: str
    """The checkpoint as the recipe names it."""
    format: str
    """"gptq, 4 bits, groups of 128"."""
    producer: str | None
    """The tool that wrote it, if it says so."""
    fingerprint: str
    """Sha256 of the base checkpoint."""
    tensor_bytes: int
    n_packed: int
    """Number of layers that are stored packed."""
    revision: str | None = None
    """The commit, for a checkpoint of the hub."""
    kind: str | None = None
    """The name of its format: "gptq"; None if it was not recorded."""
    unserved: tuple[str, ...] = ()
    """Reasons for which the servers of its format refuse it."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class KeptTensor:
    """A tensor that was not compressed."""

    name: str
    shape: tuple[int, ...]
    reason: str
    n_bytes: int


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EngineReport:
    """What came of having an export loaded by an engine."""

    engine: str
    version: str | None
    """The engine's; None if it was not tried."""
    largest_difference: float | None
    """Of the log-probabilities of the next token, absolute; None if it computed none."""
    mean_difference: float | None
    bound: float | None
    """The largest difference that the engine's arithmetic explains."""
    arithmetic: str | None
    """That arithmetic in words."""
    reason: str | None
    """Why it was not tried, or why it loaded the export and computed nothing; None if it computed."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExportReport:
    """One export: its format, and how its logits in a fresh process differ from the compressed model's."""

    format: str
    folder: str
    """Relative to the output folder."""
    tensor_bytes: int
    loader: str
    relative_difference: float
    """L2 norm of the difference of the logits over the norm of the logits."""
    max_abs_difference: float
    top1_agreement: float
    tolerance: float
    """Largest relative difference that verification accepts."""
    adapter: str | None
    """Folder of the PEFT adapter, relative to the output folder; None if there is none."""
    repository: str | None = None
    """Id of the repository on the hub that it is to be; None if none was given."""
    bits: int | None = None
    """Bits of its codes; None if it has none, or of several widths, or they were not recorded."""
    refusals: tuple[str, ...] | None = None
    """Reasons for which servers refuse it, known before the run; None if they were not recorded."""
    file: str | None = None
    """Name of the file in its folder that holds the weights, for a format that is one file; None for any other."""
    engines: tuple[EngineReport, ...] = ()
    """The engines that its format is for, those included that were not tried."""


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
    """Continuations that both models wrote after the same prompts; empty for models that write nothing."""
    text_sha256: str | None = None
    """Sha256 of the token ids of the held-out text; None if no text was read."""
    prefix: str | None = None
    """Special tokens that each window of the held-out text begins with, empty for none; None if no text was cut into
    windows, or it was not recorded."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Report:
    """Everything that a reader needs to judge a compressed model and to make it again."""

    schema: Literal[1] = SCHEMA
    """Number of the schema; a report with another one is refused."""
    recipe: dict[str, Any]
    model: str
    """The source as it was resolved: a name, and a revision or a hash."""
    licence: str | None
    """Licence that was given, or else that of the source's README: an id of the hub, or another licence's name."""
    licence_link: str | None = None
    """Link to the licence in the source's README."""
    fingerprint: str
    """Sha256 of the source checkpoint."""
    environment: Environment
    calibration: dict[str, Any]
    """Calibration text: paths, hashes, rows, tokens, seed."""
    layers: tuple[LayerReport, ...]
    embeddings: tuple[LayerReport, ...] = ()
    """Embeddings and heads that are stored otherwise than in the source; not among the layers, nor in their totals."""
    kept: tuple[KeptTensor, ...]
    exports: tuple[ExportReport, ...]
    totals: Totals
    scores: Comparison | None
    """Evaluation of both models; None if nothing was evaluated."""
    timings: dict[str, float]
    """Seconds of each stage, in order."""
    base: BaseReport | None = None
    """Base checkpoint that was corrected; None if the model itself was compressed."""
    revision: str | None = None
    """The commit of the source, for one that came from the hub."""
    head: str = Head.NEXT_TOKEN.value
    """Kind of output of the model: next token, classes or features."""
    peak_memory: dict[str, int] = field(default_factory=dict)
    """Peak resident memory in bytes in each stage; on macOS, in this stage or an earlier one."""
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
                f"report: {_short(text)} is no report that `run` wrote; download it again"
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
            raise CheckpointError(f"{path}: not UTF-8 text ({error}); download it again") from error
        try:
            return cls.from_json(text)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error


def _short(text: str) -> str:
    return text.strip() if len(text) < 40 else f"{text.strip()[:40]}..."


def n_weights(layer: LayerReport) -> int:
    """Number of weights of a layer."""
    return layer.shape[0] * layer.shape[1]
