"""The log-probabilities of a few tokens, as llama.cpp computes them: a program of its own that imports no toolkit.

Called with the paths of a request and of the answer that it writes, both JSON; see `compress/engines/base.py`.
"""

import ctypes
import importlib
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

_DISTRIBUTIONS = {"llama_cpp": "llama-cpp-python", "ik_llama_cpp": "ik-llama-cpp-python"}
_LEAST_TOKENS = 32


def main(request_path: str, answer_path: str) -> None:
    """Load the file as its users do, and write what it makes of the tokens."""
    import numpy as np

    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    name, ids = request["bindings"], request["input_ids"]
    api = importlib.import_module(name if name == "llama_cpp" else f"{name}._ctypes_api")
    api.llama_backend_init()
    model_options = api.llama_model_default_params()
    model_options.n_gpu_layers = 0
    model = api.llama_model_load_from_file(request["model"].encode(), model_options)
    if not model:
        raise SystemExit(f"{name} does not load {request['model']}")
    context = _context(api, model, len(ids))
    if request["adapter"]:
        _add_adapter(api, (model, context), request["adapter"])
    batch = _batch(api, ids)
    if api.llama_decode(context, batch) != 0:
        raise SystemExit(f"{name} does not compute {len(ids)} tokens at once")
    n_tokens = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    found = []
    for place, following in enumerate(ids[1:]):
        row = api.llama_get_logits_ith(context, place)
        logits = np.ctypeslib.as_array(row, shape=(n_tokens,)).astype(np.float64)
        logits -= logits.max()
        found.append(float(logits[following] - np.log(np.exp(logits).sum())))
    version = f"{importlib.metadata.version(_DISTRIBUTIONS[name])} ({_DISTRIBUTIONS[name]})"
    answer = {"version": version, "log_probabilities": found}
    Path(answer_path).write_text(json.dumps(answer), encoding="utf-8")


def _context(api: Any, model: Any, n_tokens: int) -> Any:
    options = api.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = max(n_tokens, _LEAST_TOKENS)
    options.n_threads = options.n_threads_batch = 1
    for name in ("fused_up_gate", "flash_attn"):
        if hasattr(options, name):
            setattr(
                options, name, False
            )  # the fork's kernels of these leave adapters out, or refuse them
    context = api.llama_init_from_model(model, options)
    if not context:
        raise SystemExit("it makes no context of the model")
    return context


def _add_adapter(api: Any, model_and_context: tuple[Any, Any], path: str) -> None:
    model, context = model_and_context
    if hasattr(api, "llama_adapter_lora_init"):
        adapter = api.llama_adapter_lora_init(model, path.encode())
        adapters = (api.llama_adapter_lora_p_ctypes * 1)(adapter)
        scales = (ctypes.c_float * 1)(1.0)
        status = api.llama_set_adapters_lora(context, adapters, 1, scales) if adapter else -1
    else:
        library = api._lib
        library.llama_lora_adapter_init.restype = ctypes.c_void_p
        library.llama_lora_adapter_init.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        library.llama_lora_adapter_set.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float]
        adapter = library.llama_lora_adapter_init(model, path.encode())
        status = library.llama_lora_adapter_set(context, adapter, 1.0) if adapter else -1
    if status != 0:
        raise SystemExit(f"it does not load the adapter {path}")


def _batch(api: Any, ids: list[int]) -> Any:
    """All tokens of one sequence, with the logits of each."""
    batch = api.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for place, token in enumerate(ids):
        batch.token[place], batch.pos[place] = token, place
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        batch.logits[place] = 1
    return batch


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
