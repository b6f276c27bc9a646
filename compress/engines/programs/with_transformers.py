"""The log-probabilities of a few tokens, as transformers computes them: a program of its own that imports no toolkit.

Called with the paths of a request and of the answer that it writes, both JSON; see `compress/engines/base.py`.
"""

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any


def main(request_path: str, answer_path: str) -> None:
    """Load the folder as its users do, and write what it makes of the tokens."""
    for name in ("compress", "calibration", "eval"):
        sys.modules[name] = None  # type: ignore[assignment]  # what makes an import fail
    import torch
    import transformers

    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    kind = "AutoModelForImageTextToText" if request["sees"] else "AutoModelForCausalLM"
    expanded = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    model = getattr(transformers, kind).from_pretrained(
        request["model"],
        dtype=getattr(torch, request["dtype"]),
        trust_remote_code=request["own_code"],
        local_files_only=True,
        **(expanded if request["expand"] else {}),
    )
    if request["adapter"]:
        import peft

        model = peft.PeftModel.from_pretrained(model, request["adapter"])
    ids = torch.tensor([request["input_ids"]], device=model.device)
    with torch.inference_mode():
        logits = model.eval()(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    found = logits.gather(1, ids[0, 1:, None])[:, 0].tolist()
    answer = {
        "version": versions(request["packages"]),
        "log_probabilities": found,
        "dtype": products(model, request),
    }
    Path(answer_path).write_text(json.dumps(answer), encoding="utf-8")


def versions(packages: list[str]) -> str:
    """The first package's, and in brackets those of the others: "7.7.0 (transformers 5.23.0)"."""
    first, *others = packages
    told = [f"{name} {metadata.version(name)}" for name in others]
    return metadata.version(first) + (f" ({', '.join(told)})" if told else "")


def products(model: Any, request: dict[str, Any]) -> str:
    """The narrowest dtype in products: kernels for packed weights that cast inputs to bfloat16 have cast the scales."""
    scales = (getattr(module, "scales", None) for module in model.modules())
    narrow = any(str(getattr(each, "dtype", "")) == "torch.bfloat16" for each in scales)
    return "bfloat16" if narrow else str(request["dtype"])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
