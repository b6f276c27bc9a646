"""Has an export loaded by the engines that it is for, and compares their log-probabilities with its probe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.engines.asked import AUTO
from compress.engines.base import ENGINES, Arithmetic, Engine, Export, Origin
from compress.engines.bounds import Bound, bound_of
from compress.engines.running import SECONDS, SECONDS_A_GIGABYTE, answer_of, interpreter
from compress.errors import CheckpointError
from compress.exports.base import Exporter
from compress.exports.peft import CONFIG as ADAPTER_CONFIG
from compress.exports.verification.probe import Probe, kind_of, read_probe
from eval.footprint import bytes_on_disk

_NARROWEST_FIRST = ("bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What came of having an export loaded by an engine."""

    engine: str
    version: str | None = None
    """The engine's; None if it was not tried."""
    largest_difference: float | None = None
    """Of the log-probabilities, absolute; None if it computed none."""
    mean_difference: float | None = None
    bound: float | None = None
    """The largest difference that its arithmetic explains."""
    arithmetic: str | None = None
    """That arithmetic in words: "activations in bfloat16, 30 blocks"."""
    reason: str | None = None
    """Why it was not tried, or how far it came; None if it computed."""


def engines_of(folder: Path, asked: Sequence[str] = AUTO) -> tuple[str, ...]:
    """The engines to try for an export: those that its format is for, of which `asked` may name some.

    Raises CheckpointError naming an engine that the format is not for.
    """
    kind = kind_of(folder)
    if tuple(asked) == AUTO:
        return kind.traits.engines
    strange = [name for name in asked if name not in kind.traits.engines]
    if strange:
        known = ", ".join(kind.traits.engines) or "none"
        raise CheckpointError(f"{folder}: {kind.name} is not for {strange[0]}; engines: {known}")
    return tuple(asked)


def try_engines(
    folder: Path, engines: Sequence[str], origin: Origin = Origin.ANYBODY
) -> Iterator[Trial]:
    """Each engine's trial, one after the other.

    Raises CheckpointError naming an engine that fails, or whose log-probabilities are not those of the probe.
    """
    probe, metadata = read_probe(folder)
    export = _export(folder, metadata.get("dtype"), origin)
    reference = _reference(export, kind_of(folder), metadata)
    for name in engines:
        yield _tried(name, export, probe, reference)


def _export(folder: Path, dtype: str | None, origin: Origin) -> Export:
    folder, kind = folder.resolve(), kind_of(folder)
    base = kind.base_of(folder)
    model = folder if base is None else base.resolve()
    place = kind.traits.adapter
    adapter = None if place is None else (folder / place).resolve()
    config = kind.config_in(model)
    # A native export has the sizes of its model in the configuration that it was made from.
    config = {**(config.get("base_config") or {}), **config}
    return Export(
        format=kind.name,
        folder=folder,
        traits=kind.traits,
        model=model,
        adapter=adapter if adapter and (adapter / ADAPTER_CONFIG).is_file() else None,
        config=config,
        origin=origin,
        dtype=dtype or str(config.get("dtype") or config.get("torch_dtype") or "float32"),
    )


def _reference(export: Export, kind: type[Exporter], metadata: Any) -> Arithmetic:
    """The probe's arithmetic, and what the format rounded that the probe did not see."""
    whole = kind.weights_dtype(export.folder)
    rounded = {metadata.get("rounded"), str(whole).removeprefix("torch.") if whole else None}
    weights = next((name for name in _NARROWEST_FIRST if name in rounded), "float32")
    return Arithmetic(activations=export.dtype, weights=weights)


def _tried(name: str, export: Export, probe: Probe, reference: Arithmetic) -> Trial:
    if name not in ENGINES:
        return Trial(engine=name, reason="this version knows no such engine")
    engine = ENGINES[name]
    if probe.log_probabilities is None:
        reason = "it has no log-probabilities to compare: an earlier version wrote it, or it predicts no next token"
        return Trial(engine=name, reason=reason)
    if reason := engine.problem(export):
        return Trial(engine=name, reason=reason)
    modules = engine.modules(export)
    python = interpreter(name, modules)
    if python is None:
        return Trial(engine=name, reason=f"{' with '.join(modules)} is not installed")
    answer = _answer(engine, export, probe, python)
    version = str(answer["version"])
    if "stopped" in answer:
        return Trial(engine=name, version=version, reason=str(answer["stopped"]))
    found = torch.tensor(answer["log_probabilities"], dtype=torch.float64)
    bound = bound_of(engine.arithmetic(export, answer), reference, export.config, probe.logits)
    return _compared(Trial(engine=name, version=version), export, (found, probe), bound)


def _answer(engine: type[Engine], export: Export, probe: Probe, python: Path) -> Any:
    request = engine.request(export) | {"input_ids": probe.input_ids[0].tolist()}
    gigabytes = bytes_on_disk(export.model) / 1e9
    try:
        return answer_of(python, engine.program, request, SECONDS + SECONDS_A_GIGABYTE * gigabytes)
    except CheckpointError as error:
        raise CheckpointError(f"{export.folder}: {engine.name} does not run it: {error}") from error


def _compared(
    trial: Trial, export: Export, found_and_probe: tuple[torch.Tensor, Probe], bound: Bound
) -> Trial:
    found, probe = found_and_probe
    assert probe.log_probabilities is not None
    expected = probe.log_probabilities.double()
    if found.shape != expected.shape:
        raise CheckpointError(
            f"{export.folder}: {trial.engine} {trial.version} gives {len(found)} log-probabilities for "
            f"{len(expected) + 1} tokens, not {len(expected)}"
        )
    difference = (found - expected).abs()
    largest = float(difference.max())
    if not largest <= bound.value:
        raise CheckpointError(
            f"{export.folder}: {trial.engine} {trial.version} computes something else than the compressed model: the "
            f"largest difference of log-probabilities is {largest:.2e}, and its arithmetic explains {bound.value:.1e} "
            f"({bound.text})"
        )
    return Trial(
        engine=trial.engine,
        version=trial.version,
        largest_difference=largest,
        mean_difference=float(difference.mean()),
        bound=bound.value,
        arithmetic=bound.text,
    )
