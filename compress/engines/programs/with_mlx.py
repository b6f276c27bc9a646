"""The log-probabilities of a few tokens, as mlx-lm computes them: a program of its own that imports no toolkit.

Called with the paths of a request and of the answer that it writes, both JSON; see `compress/engines/base.py`.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path


def main(request_path: str, answer_path: str) -> None:
    """Load the folder as its users do, and write what it makes of the tokens."""
    import mlx.core as mx
    import mlx_lm

    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    model, _ = mlx_lm.load(request["model"], adapter_path=request["adapter"])
    model.set_dtype(mx.float32)
    ids = mx.array([request["input_ids"]])
    logits = model(ids)[0, :-1]
    shifted = logits.astype(mx.float32)
    shifted = shifted - mx.logsumexp(shifted, axis=-1, keepdims=True)
    found = mx.take_along_axis(shifted, ids[0, 1:, None], axis=-1)[:, 0].tolist()
    answer = {
        "version": f"{version('mlx-lm')} with mlx {mx.__version__}",
        "log_probabilities": found,
        "dtype": str(logits.dtype).rpartition(".")[2],
    }
    Path(answer_path).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
