"""llama.cpp on processors, by the bindings that are installed: its own kernels, as ollama and LM Studio have them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from compress.engines.base import PROGRAMS, Arithmetic, Engine, Export
from compress.engines.running import interpreter
from compress.exports.base import EXPORTS
from compress.exports.gguf.adapter import FILE as ADAPTER_FILE
from compress.exports.gguf.adapter import least_rank
from compress.exports.gguf.blocks import BLOCK

_EXPERTS = ("num_local_experts", "num_experts")
_LEAST_RANK = 8
_WITH_OFFSETS = ("-Q4_1.gguf", "-Q5_1.gguf")


class LlamaCpp(Engine, name="llama.cpp"):
    """Products of blocks take inputs that are rounded to 8 bits in blocks of their own; keys and values are fp16."""

    module = "llama_cpp"
    """Of llama-cpp-python, which is built where it is installed."""
    stand_ins = ("ik_llama_cpp",)
    """Of a fork of llama.cpp whose bindings come built."""
    requirements = ("llama-cpp-python>=0.3.36",)
    program = PROGRAMS / "with_llama_cpp.py"

    @classmethod
    def modules(cls, export: Export) -> tuple[str, ...]:
        """The bindings that are installed, llama.cpp's own before the fork's."""
        del export
        known = (cls.module, *cls.stand_ins)
        found = (name for name in known if interpreter(cls.name, (name,)) is not None)
        return (next(found, known[-1]),)

    @classmethod
    def problem(cls, export: Export) -> str:
        """The fork's kernels are not asked for what they were seen to compute otherwise than llama.cpp's."""
        if cls.modules(export) != cls.stand_ins:
            return ""
        if any(export.config.get(name) for name in _EXPERTS):
            return (
                "ik-llama-cpp-python computes some mixtures otherwise than llama.cpp (Mixtral, and experts in Q4_1); "
                "llama-cpp-python is llama.cpp itself"
            )
        if str(EXPORTS[export.format].file_in(export.folder)).endswith(_WITH_OFFSETS):
            return (
                "ik-llama-cpp-python computes blocks with offsets otherwise than llama.cpp; llama-cpp-python is "
                "llama.cpp itself"
            )
        rank = least_rank(export.folder)
        if rank is not None and rank < _LEAST_RANK:
            return (
                f"its adapter has layers of rank {rank}, of which ik-llama-cpp-python makes NaN (below {_LEAST_RANK}); "
                "llama-cpp-python does not"
            )
        return ""

    @classmethod
    def request(cls, export: Export) -> dict[str, Any]:
        """The model's file, and the adapter's if there is one."""
        adapter = export.folder / ADAPTER_FILE
        return {
            "bindings": cls.modules(export)[0],
            "model": str(export.folder / str(EXPORTS[export.format].file_in(export.folder))),
            "adapter": str(adapter) if adapter.is_file() else None,
        }

    @classmethod
    def arithmetic(cls, export: Export, answer: Mapping[str, Any]) -> Arithmetic:
        """Sums in fp32; one number of a block of inputs may outweigh all others, as massive activations do."""
        del export, answer
        return Arithmetic(
            activations="float32",
            cache="float16",
            activation_bits=8,
            activation_peak=math.sqrt(BLOCK),
        )
