"""The log-probabilities of a few tokens, as vLLM computes them: a program of its own that imports no toolkit.

Called with the paths of a request and of the answer that it writes, both JSON; see `compress/engines/base.py`. The
tokens are one prompt, whose log-probabilities vLLM gives (`prompt_logprobs`); with an adapter it is right for one
sequence at a time.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

KERNEL_BITS = [4]
"""What its kernel for processors with AVX512 computes with, in layers of no expert."""


def main(request_path: str, answer_path: str) -> None:
    """Load the folder as its users do, and write what it makes of the tokens."""
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    # One process, which ends with its last lines where loading fails; little room for the cache of a short prompt.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    import vllm

    try:
        answer = computed(request)
    except (AttributeError, KeyError, NotImplementedError, RuntimeError, ValueError) as error:
        if not lacks_kernel(request):
            raise
        told = str(error).strip().splitlines() or [type(error).__name__]
        kind = f"{request['packed']} in {request['bits']} bits"
        answer = {"stopped": f"no kernel here for {kind}: {told[0].strip()}"}
    answer["version"] = vllm.__version__
    Path(answer_path).write_text(json.dumps(answer), encoding="utf-8")


def computed(request: dict[str, Any]) -> dict[str, Any]:
    """The log-probabilities, and the dtype that it computed in."""
    import vllm
    from vllm.lora.request import LoRARequest

    ids, adapter = request["input_ids"], request["adapter"]
    options = {"enable_lora": True, "max_lora_rank": request["rank"]} if adapter else {}
    model = vllm.LLM(
        model=request["model"],
        dtype=request["dtype"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=len(ids) + 16,
        max_num_seqs=1,
        gpu_memory_utilization=0.5,
        **options,
    )
    lora = LoRARequest("corrected", 1, adapter) if adapter else None
    asked = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    output = model.generate({"prompt_token_ids": ids}, asked, lora_request=lora, use_tqdm=False)
    found = output[0].prompt_logprobs
    return {
        "log_probabilities": [found[k][ids[k]].logprob for k in range(1, len(ids))],
        "dtype": str(model.model_config.dtype),
    }


def lacks_kernel(request: dict[str, Any]) -> bool:
    """Whether this is a processor, and vLLM has no product with such packed weights on it."""
    import torch
    from vllm.platforms import current_platform

    able = request["bits"] == KERNEL_BITS and torch.cpu._is_avx512_supported()
    if request["packed"] == "experts":
        able = False
    return bool(request["bits"]) and current_platform.is_cpu() and not able


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
