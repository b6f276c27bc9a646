"""The log-probabilities of a few tokens, as OpenVINO computes them: a program of its own that imports no toolkit.

Called with the paths of a request and of the answer that it writes, both JSON; see `compress/engines/base.py`. Weights
that compressed-tensors holds in few bits stay so in the graph, whose constants are counted by type.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any


def main(request_path: str, answer_path: str) -> None:
    """Convert the model that transformers makes of the folder, compile it for exact products, and ask it."""
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    import numpy
    import openvino
    import torch

    model = loaded(request["model"])
    ids = torch.tensor([request["input_ids"]])
    with torch.inference_mode():
        graph = openvino.convert_model(logits_of(model), example_input=ids)
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    compiled = openvino.Core().compile_model(graph, "CPU", exact)
    logits = torch.from_numpy(numpy.array(compiled(ids.numpy())[0]))[0, :-1]
    found = logits.double().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].tolist()
    constants = Counter(
        node.get_element_type().get_type_name()
        for node in graph.get_ops()
        if node.get_type_name() == "Constant"
        and node.get_output_size()
        and node.get_byte_size() > 4096
    )
    answer = {
        "version": openvino.__version__.partition("-")[0],
        "log_probabilities": found,
        "constants": dict(constants),
    }
    Path(answer_path).write_text(json.dumps(answer), encoding="utf-8")


def loaded(folder: str) -> Any:
    """The model in float32; codes of compressed-tensors are left packed, for the conversion to read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    settings = getattr(config, "quantization_config", None)
    if settings is not None:
        stay_packed()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    return model.eval()


def logits_of(model: Any) -> Any:
    """A module of the logits alone, without a cache."""
    from torch import nn

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any) -> Any:
            return self.model(input_ids=input_ids, use_cache=False).logits

    return Logits().eval()


def stay_packed() -> None:
    """Keep transformers from expanding the codes after loading, and before the first product."""
    from compressed_tensors.compressors import ModelCompressor
    from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

    def nothing(*_: object, **__: object) -> None:
        """Leave the codes as they are."""

    quantiser: Any = CompressedTensorsHfQuantizer
    quantiser._process_model_after_weight_loading = nothing
    compressor: Any = ModelCompressor
    compressor.add_decompress_hook = nothing


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
