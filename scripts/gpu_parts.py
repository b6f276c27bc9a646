"""What `scripts/gpu_check` measures besides whole runs: ceilings, methods, algebra and the layers of an 8B model."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from calibration.statistics import always_collected
from calibration.statistics.base import InputStatistic
from calibration.statistics.collection import Statistics
from calibration.statistics.fisher import Fisher
from calibration.statistics.gram import Gram
from compress.families.base import METHODS, Compressor, LayerShape
from compress.forms.quantised import Quantised
from compress.methods.gptq import GPTQ
from compress.solvers.linalg import cholesky, conditioned_, inverse_factor, output_energy

SAME_ERROR, SAME_CODES = 0.01, 0.99
"""Relative difference of a layer's error, and share of equal codes, that rounding on another device explains."""


LOCAL_OPTIMA, LOCAL_ERROR = ("cospadi",), 1.1
"""Alternations that end in another optimum after a rounding error: its error may be so many times the CPU's."""

N_EXPERTS = 32


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    part: str
    name: str
    value: str
    passed: bool | None = None
    """None: a figure that nothing is asked of."""


@dataclass(frozen=True)
class Job:
    """Where to measure, and how large."""

    device: torch.device
    is_small: bool

    def width(self, full: int) -> int:
        """A layer's width, or a small one in its place."""
        return full // 16 if self.is_small else full


def ceilings(job: Job) -> Iterator[Row]:
    """What the device copies and multiplies in a second."""
    n = job.width(8192)
    words = torch.empty(job.width(1 << 28), device=job.device)
    seconds = seconds_of(job, words.clone)
    yield Row("ceilings", "copy, read and written", f"{2 * words.nbytes / seconds / 1e9:,.0f} GB/s")
    for dtype, tf32 in (
        (torch.bfloat16, "ieee"),
        (torch.float32, "tf32"),
        (torch.float32, "ieee"),
        (torch.float64, "ieee"),
    ):
        torch.backends.cuda.matmul.fp32_precision = tf32
        a = torch.randn(n, n, device=job.device, dtype=dtype)
        seconds = seconds_of(job, partial(torch.matmul, a, a))
        name = f"product of {n:,}, {str(dtype).removeprefix('torch.')}" + (
            " in TF32" if tf32 == "tf32" else ""
        )
        yield Row("ceilings", name, f"{2 * n**3 / seconds / 1e12:,.1f} TFLOP/s")
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    host = torch.empty(job.width(1 << 27), dtype=torch.float32)
    seconds = seconds_of(job, partial(host.to, job.device))
    yield Row("ceilings", "host to device, pageable", f"{host.nbytes / seconds / 1e9:,.1f} GB/s")


VARIANTS: dict[str, tuple[dict[str, object], ...]] = {
    "rtn": ({"bits": 4}, {"bits": 3}),
    "gptq": ({"bits": 4}, {"bits": 3, "act_order": "desc_act"}),
    "sparsegpt": ({}, {"pattern": "2:4"}, {"pattern": "2:4", "value_bits": "4"}),
    "eora": ({"rank": 8}, {"rank": 8, "base_rounds": 2}, {"rank": 16, "adapter_bits": "4"}),
    "svd_residual": ({"rank": 8},),
    "lqer": ({"rank": 8},),
    "wanda": ({}, {"pattern": "2:4"}),
    "cospadi": ({"keep": 0.6, "share": "none"}, {"keep": 0.6, "share": "none", "code_bits": "8"}),
}
"""Options of methods whose computations differ; others run once, with `keep` 0.5 where they have it."""


def methods(job: Job) -> Iterator[Row]:
    """Every method on the device beside the CPU, from the same statistics and weights."""
    weights, stats = problem(128, (192, 64))
    for name in sorted(METHODS):
        for options in VARIANTS.get(name, (default_options(name),)):
            yield _beside_cpu(job, name, options, weights, stats)


def _made(name: str, options: Mapping[str, object]) -> Compressor:
    """A method by its name."""
    kind: Any = METHODS[name]
    found: Compressor = kind(**options)
    return found


def default_options(name: str) -> dict[str, object]:
    """Small settings for a method without variants of its own."""
    kind: Any = METHODS[name]
    fields = {field.name for field in dataclasses.fields(kind)}
    return {k: v for k, v in {"keep": 0.5, "rank_multiple": 1}.items() if k in fields}


def _beside_cpu(
    job: Job, name: str, options: dict[str, object], weights: list[Tensor], stats: Statistics
) -> Row:
    text = name + "".join(
        f" {k}={v}" for k, v in options.items() if k not in ("keep", "rank_multiple", "rank")
    )
    layers = {
        f"layers.0.{k}": LayerShape((w.shape[0], w.shape[1]), w.nbytes)
        for k, w in enumerate(weights)
    }
    planned = _made(name, options).plan(layers)
    method = next(iter(planned.values()))
    there = [w.to(job.device) for w in weights]
    ours = errors_of(method, weights, stats)
    theirs = errors_of(method, there, stats.to(job.device))
    again = errors_of(method, there, stats.to(job.device))
    apart = max(
        abs(a.error - b.error) / max(b.error, 1e-6) for a, b in zip(theirs, ours, strict=True)
    )
    shares = [
        equal_codes(a.codes, b.codes)
        for a, b in zip(theirs, ours, strict=True)
        if b.codes is not None
    ]
    is_same = all(torch.equal(a.dense, b.dense) for a, b in zip(theirs, again, strict=True))
    told = f"error {theirs[0].error:.4f}, the CPU's {ours[0].error:.4f}, {apart:.1e} apart"
    if shares:
        told += f", {min(shares):.2%} of the codes equal"
    told += ", twice the same" if is_same else ", twice NOT the same"
    if name in LOCAL_OPTIMA:
        is_right = all(a.error < LOCAL_ERROR * b.error for a, b in zip(theirs, ours, strict=True))
    else:
        is_right = apart < SAME_ERROR and min(shares, default=1) >= SAME_CODES
    return Row("methods", text, told, is_right and is_same)


@dataclass(frozen=True)
class Solved:
    """What a method made of a weight."""

    error: float
    dense: Tensor
    codes: Tensor | None


def errors_of(method: Compressor, weights: list[Tensor], stats: Statistics) -> list[Solved]:
    """Relative output error, dense weight and codes of each weight's form."""
    gram = stats[Gram].mean_ii()
    found = []
    for weight in weights:
        [form] = method.compress([weight], stats)
        dense = form.dense()
        lost = output_energy(weight.double() - dense.double(), gram) / output_energy(
            weight.double(), gram
        )
        quantised = next((m for m in form.modules() if isinstance(m, Quantised)), None)
        codes = None if quantised is None else quantised.dense().cpu()
        found.append(Solved(max(lost, 0.0) ** 0.5, dense.cpu(), codes))
    return found


def equal_codes(a: Tensor | None, b: Tensor | None) -> float:
    """Share of the weights on a grid that are the same number."""
    assert a is not None
    assert b is not None
    return float(((a - b).abs() <= 1e-6 * b.abs().amax()).double().mean())


def problem(n_inputs: int, outputs: tuple[int, ...]) -> tuple[list[Tensor], Statistics]:
    """Weights (o, i) and statistics of correlated inputs with two large channels, all on the CPU."""
    generator = torch.Generator().manual_seed(0)
    mix = (
        torch.randn(n_inputs, n_inputs, generator=generator)
        * torch.logspace(0, -1.5, n_inputs)[:, None]
    )
    x = torch.randn(2048, n_inputs, generator=generator) @ mix
    x[:, :2] *= 20
    weights = [0.05 * torch.randn(o, n_inputs, generator=generator) for o in outputs]
    stats = Statistics.of(x, 16, InputStatistic.among(always_collected()))
    gradients = 1e-3 * torch.randn(2048, outputs[0], generator=generator)
    return weights, stats.joined(Statistics({Fisher: Fisher.of(x, gradients)}))


def algebra(job: Job) -> Iterator[Row]:
    """Products and factorisations of a Gram matrix at an 8B model's two widths."""
    for n in (job.width(4096), job.width(14336)):
        x = torch.randn(job.width(32768), n, device=job.device, dtype=torch.bfloat16)
        exact = x[:1024].double().T @ x[:1024].double()
        seconds = seconds_of(job, partial(Gram.of, x, 16))
        found = Gram.of(x[:1024], 1).sum_ii
        off = float((found - exact).norm() / exact.norm())
        yield Row(
            "algebra",
            f"Gram of {n:,} x {len(x):,} tokens",
            f"{seconds:.3f} s, {off:.1e} from fp64's",
            off < 1e-5,
        )
        gram = Gram.of(x, 16).mean_ii()
        del x, exact, found
        conditioned_(gram, 0.1, 0.01)
        yield Row(
            "algebra",
            f"Cholesky of {n:,}, fp64",
            f"{seconds_of(job, partial(_copied, cholesky, gram)):.3f} s",
        )
        yield Row(
            "algebra",
            f"inverse factor of {n:,}, fp64",
            f"{seconds_of(job, partial(_copied, inverse_factor, gram)):.3f} s",
        )
        if n <= 4096:
            yield Row(
                "algebra",
                f"eigh of {n:,}, fp64",
                f"{seconds_of(job, partial(torch.linalg.eigh, gram)):.3f} s",
            )
        del gram


LAYERS = {
    "q, k, v": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate, up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
SOLVERS: dict[str, dict[str, object]] = {
    "gptq": {"bits": 4, "group_size": 128},
    "sparsegpt": {"pattern": "2:4"},
    "eora": {"rank": 64},
    "svd_llm": {"keep": 0.8},
}


def _copied(solve: Callable[[Tensor], Tensor], gram: Tensor) -> Tensor:
    """Solvers that overwrite what they are given get a copy."""
    return solve(gram.clone())


def layers(job: Job) -> Iterator[Row]:
    """Solvers on the layers of one decoder block of an 8B model."""
    total = dict.fromkeys(SOLVERS, 0.0)
    for layer, (full, outputs) in LAYERS.items():
        n = job.width(full)
        x = torch.randn(2 * n, n, device=job.device) @ (
            torch.randn(n, n, device=job.device) / n**0.5
        )
        stats = Statistics.of(x, 16, InputStatistic.among(always_collected()))
        del x
        weights = [0.02 * torch.randn(job.width(o), n, device=job.device) for o in outputs]
        for name, options in SOLVERS.items():
            shapes = {
                f"layers.0.{k}": LayerShape((w.shape[0], w.shape[1]), w.nbytes)
                for k, w in enumerate(weights)
            }
            planned = _made(name, options).plan(shapes)
            method = next(iter(planned.values()))
            reset_peak(job)
            started = time.perf_counter()
            if name in ("gptq", "eora"):
                method.compress(weights, stats)
            else:
                for key, weight in zip(shapes, weights, strict=True):
                    planned[key].compress([weight], stats)
            settle(job)
            seconds = time.perf_counter() - started
            total[name] += seconds
            stats.forget()
            yield Row(
                "layers", f"{name}, {layer}", f"{seconds:.2f} s, peak {peak(job) / 1e9:.1f} GB"
            )
    for name, seconds in total.items():
        yield Row(
            "layers", f"{name}, one block", f"{seconds:.2f} s; 32 blocks {32 * seconds:,.0f} s"
        )


def experts(job: Job) -> Iterator[Row]:
    """GPTQ of experts as wide as a 30B mixture's: one after another, and as stacks of so many."""
    method = GPTQ(group_size=128)
    for o, i in ((1536, 2048), (2048, 768)):
        problems = [_expert(job, (job.width(o), max(job.width(i), 128))) for _ in range(N_EXPERTS)]
        for at_once in (1, 4, 16):
            reset_peak(job)
            started = time.perf_counter()
            for first in range(0, N_EXPERTS, at_once):
                method.compress_alike(problems[first : first + at_once])
            settle(job)
            told = f"{time.perf_counter() - started:.2f} s, peak {peak(job) / 1e9:.1f} GB"
            yield Row("experts", f"{N_EXPERTS} of {o:,} x {i:,}, {at_once} at once", told)


def _expert(job: Job, shape: tuple[int, int]) -> tuple[list[Tensor], Statistics]:
    """A random weight (o, i) and the Gram of its random inputs."""
    x = torch.randn(2 * shape[1], shape[1], device=job.device)
    return [0.02 * torch.randn(shape, device=job.device)], Statistics({Gram: Gram.of(x, 1)})


def decode(job: Job) -> Iterator[Row]:
    """One token through packed 4-bit layers beside dense ones."""
    n, o = job.width(4096), job.width(14336)
    weight = 0.02 * torch.randn(o, n, device=job.device)
    stats = Statistics.of(
        torch.randn(2 * n, n, device=job.device), 1, InputStatistic.among(always_collected())
    )
    [form] = (
        _made("rtn", {"bits": 4, "group_size": 128})
        .plan({"layer": LayerShape((o, n), weight.nbytes)})["layer"]
        .compress([weight], stats)
    )
    form = form.to(job.device)
    dtype = torch.bfloat16
    x, dense = torch.randn(1, 1, n, device=job.device, dtype=dtype), weight.to(dtype)
    with torch.inference_mode():
        packed = seconds_of(job, partial(form, x))
        plain = seconds_of(job, partial(torch.nn.functional.linear, x, dense))
    yield Row(
        "decode",
        f"{o:,} x {n:,}, packed beside dense",
        f"{1e6 * packed:,.0f} us and {1e6 * plain:,.0f} us, {packed / plain:.1f} times",
    )


def seconds_of(job: Job, call: Callable[[], object]) -> float:
    """Median of five calls after one."""
    call()
    found = []
    for _ in range(5):
        settle(job)
        started = time.perf_counter()
        call()
        settle(job)
        found.append(time.perf_counter() - started)
    return sorted(found)[2]


def settle(job: Job) -> None:
    """Wait for the device."""
    if job.device.type == "cuda":
        torch.cuda.synchronize(job.device)


def reset_peak(job: Job) -> None:
    """Forget the highest mark of the device's memory."""
    if job.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(job.device)


def peak(job: Job) -> int:
    """The highest mark of the device's memory since it was forgotten, in bytes."""
    return torch.cuda.max_memory_allocated(job.device) if job.device.type == "cuda" else 0
