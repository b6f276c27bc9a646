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

    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    model = by_gptqmodel(request) if request["loader"] == "gptqmodel" else by_transformers(request)
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


def by_transformers(request: dict[str, Any]) -> Any:
    """The model as `from_pretrained` makes it."""
    import torch
    import transformers

    kind = "AutoModelForImageTextToText" if request["sees"] else "AutoModelForCausalLM"
    further = {}
    if request["expand"]:
        further = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    return getattr(transformers, kind).from_pretrained(
        request["model"],
        dtype=getattr(torch, request["dtype"]),
        trust_remote_code=request["own_code"],
        local_files_only=True,
        **further,
    )


def by_gptqmodel(request: dict[str, Any]) -> Any:
    """The model as gptqmodel makes it, which keeps experts apart."""
    from gptqmodel import GPTQModel

    return GPTQModel.load(request["model"], device="cpu").model


def versions(packages: list[str]) -> str:
    """The first package's, and in brackets those of the others: "7.7.0 (transformers 5.23.0)"."""
    first, *others = packages
    told = [f"{name} {metadata.version(name)}" for name in others]
    return metadata.version(first) + (f" ({', '.join(told)})" if told else "")


def products(model: Any, request: dict[str, Any]) -> str:
    """The narrowest dtype in products: of what was asked, and of matrices that stay narrower.

    Kernels for packed weights that cast inputs to bfloat16 have cast the scales.
    """
    held = {str(each.dtype).removeprefix("torch.") for each in model.parameters() if each.ndim > 1}
    scales = (getattr(module, "scales", None) for module in model.modules())
    packed = {str(getattr(each, "dtype", "")).removeprefix("torch.") for each in scales}
    found = held | {request["dtype"]} | (packed & {"bfloat16"})
    return next((name for name in ("bfloat16", "float16") if name in found), "float32")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
