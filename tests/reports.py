"""A report as a run writes it, with made-up figures."""

import math
from dataclasses import replace

from compress.config.recipe import Recipe
from compress.prepare.texts import DEFAULT_TASKS
from compress.report.environment import describe_environment
from compress.report.report import Comparison, ExportReport, KeptTensor, LayerReport, Report, Totals
from eval.scores import Fidelity, Footprint, Sample, Scores, TaskScore, WindowSums

RECIPE = Recipe(model="org/tiny", seed=3, tasks=DEFAULT_TASKS)
"""As a run settles it: with the tasks that `auto` stands for."""


def layer(name: str, error: float | None, note: str = "") -> LayerReport:
    return LayerReport(
        name=name,
        shape=(64, 32),
        method="eora",
        form="4-bit g32 + rank 8",
        bytes_before=8192,
        bytes_after=2000,
        bits_per_weight=7.8,
        relative_error=error,
        seconds=0.25,
        note=note,
    )


def windows(perplexity: float) -> tuple[WindowSums, ...]:
    """Sixteen of 511 tokens, some harder than others, of this perplexity."""
    harder = [math.sin(index) for index in range(16)]
    mean = sum(harder) / len(harder)
    nlls = [511 * (math.log(perplexity) * (1 + 0.02 * (each - mean))) for each in harder]
    return tuple(WindowSums(511, nll, 0.0, 511) for nll in nlls)


def scores(perplexity: float, kl: float, accuracy: float) -> Scores:
    task = TaskScore(
        task="offline_piqa",
        metric="acc_norm",
        value=accuracy,
        stderr=0.05,
        n_items=40,
        version="1.0",
        higher_is_better=True,
        per_item=tuple(float(item < round(40 * accuracy)) for item in range(40)),
        n_shot=0,
    )
    return Scores(
        fidelity=Fidelity(perplexity, 0.5, kl, 0.001, 1.0 - kl, None, 8176, windows(perplexity)),
        tasks=(replace(task, metric="acc", value=0.1), task),
        footprint=Footprint(10_500_000, 10_000_000, 2_500_000, 4.25, 512.4, 31.26, None, "cpu"),
    )


def make_report() -> Report:
    return Report(
        recipe=RECIPE.to_mapping(),
        model="org/tiny at 0123abc",
        revision="0123abc",
        licence="apache-2.0",
        fingerprint="f" * 64,
        environment=describe_environment("cpu"),
        calibration={"sources": [{"name": "python-docs", "n_tokens": 32768}], "seed": 3},
        layers=(*(layer(f"blocks.{n}", n / 100) for n in range(9)), layer("odd", None, "kept")),
        kept=(
            KeptTensor(name="embed", shape=(99, 32), reason="outside", n_bytes=3_000_000),
            KeptTensor(name="norm", shape=(32,), reason="outside", n_bytes=1_000_000),
        ),
        exports=tuple(
            ExportReport(
                format=name,
                folder=name,
                tensor_bytes=100,
                loader="AutoModelForCausalLM",
                relative_difference=2e-7,
                max_abs_difference=1e-5,
                top1_agreement=1.0,
                tolerance=1e-4,
                adapter="gptq/adapter" if name == "gptq" else None,
                bits=None if name == "dense" else 4,
                refusals=(),
            )
            for name in ("native", "gptq", "dense")
        ),
        totals=Totals(
            n_layers=10,
            layer_bytes_before=81920,
            layer_bytes_after=20000,
            tensor_bytes_before=538_000_000,
            tensor_bytes_after=101_300_000,
            layer_bits_per_weight=7.8,
            relative_error=0.04,
        ),
        scores=Comparison(
            before=scores(27.8, 0.0, 0.7),
            after=scores(29.1, 0.06, 0.65),
            samples=(Sample(prompt="Once", framing="chat", before="upon a", after="there\nwas"),),
        ),
        timings={"calibrate": 1.5, "compress": 3.0},
        notes=("statistics of an equal run were used again",),
    )
