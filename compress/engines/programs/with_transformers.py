"""The log-probabilities of a few tokens, as transformers computes them: a program of its own that imports no toolkit.

Called with the paths of a request and of the answer that it writes, both JSON; see `compress/engines/base.py`.
"""

import json
import sys
from pathlib import Path


def main(request_path: str, answer_path: str) -> None:
    """Load the folder as its users do, and write what it makes of the tokens."""
    for name in ("compress", "calibration", "eval"):
        sys.modules[name] = None  # type: ignore[assignment]  # what makes an import fail
    import torch
    import transformers

    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    kind = "AutoModelForImageTextToText" if request["sees"] else "AutoModelForCausalLM"
    model = getattr(transformers, kind).from_pretrained(
        request["model"],
        dtype=getattr(torch, request["dtype"]),
        trust_remote_code=request["own_code"],
        local_files_only=True,
    )
    version = transformers.__version__
    if request["adapter"]:
        import peft

        model = peft.PeftModel.from_pretrained(model, request["adapter"])
        version = f"{version} with peft {peft.__version__}"
    ids = torch.tensor([request["input_ids"]], device=model.device)
    with torch.inference_mode():
        logits = model.eval()(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    found = logits.gather(1, ids[0, 1:, None])[:, 0].tolist()
    answer = {"version": version, "log_probabilities": found, "dtype": request["dtype"]}
    Path(answer_path).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
