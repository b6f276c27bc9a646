"""An engine: transformers without a cache, one token after the other; and its program, which is this file too."""

import json
import sys
from pathlib import Path


def main(request_path: str, answer_path: str) -> None:
    """The program: load the folder, and write what it makes of the tokens."""
    import torch
    import transformers

    request = json.loads(Path(request_path).read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32)
    ids, found = request["input_ids"], []
    with torch.inference_mode():
        for k in range(1, len(ids)):
            logits = model(torch.tensor([ids[:k]])).logits[0, -1]
            found.append(float(logits.log_softmax(-1)[ids[k]]))
    answer = {"version": transformers.__version__, "log_probabilities": found}
    Path(answer_path).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
else:
    from collections.abc import Mapping
    from typing import Any

    from compress.engines.base import Arithmetic, Engine, Export

    class Slow(Engine, name="slow"):
        """Loads ordinary weights in float32."""

        module = "transformers"
        requirements = ("torch", "transformers")
        program = Path(__file__)

        @classmethod
        def request(cls, export: Export) -> dict[str, Any]:
            """The folder."""
            return {"model": str(export.model)}

        @classmethod
        def arithmetic(cls, export: Export, answer: Mapping[str, Any]) -> Arithmetic:
            """Everything in float32."""
            del export, answer
            return Arithmetic(activations="float32")
