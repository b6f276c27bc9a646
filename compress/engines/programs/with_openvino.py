"""The log-probabilities of a few tokens, as OpenVINO computes them: a program of its own that imports no toolkit.

Called with the paths of a request and of the answer that it writes, both JSON; see `compress/engines/base.py`. The
model that transformers makes is converted; a mixture of plain weights is loaded by optimum-intel, which knows its
routers. What compressed-tensors holds in few bits is converted as it is, without being expanded first, and the
constants of the graph are counted by type.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
"""Products in float32, and inputs of products as they are."""
BYTES = 4096
"""Constants of fewer bytes are not counted."""


def main(request_path: str, answer_path: str) -> None:
    """Load the folder, and write what it makes of the tokens."""
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    import openvino
    import torch

    ids = torch.tensor([request["input_ids"]])
    if request["packed"]:
        stay_packed()
    compute = by_optimum if request["mixture"] else converted
    logits, graph = compute(request["model"], ids)
    scores = logits[0, :-1].double().log_softmax(-1)
    answer = {
        "version": openvino.__version__.partition("-")[0],
        "log_probabilities": scores.gather(1, ids[0, 1:, None])[:, 0].tolist(),
        "constants": dict(constants(graph)),
    }
    Path(answer_path).write_text(json.dumps(answer), encoding="utf-8")


def constants(graph: Any) -> Counter[str]:
    """Number of large constants of each type."""
    return Counter(
        node.get_element_type().get_type_name()
        for node in graph.get_ops()
        if node.get_type_name() == "Constant" and node.get_byte_size() > BYTES
    )


def by_optimum(folder: str, ids: Any) -> tuple[Any, Any]:
    """Logits (1, t, v) and graph, as optimum-intel makes it."""
    import torch
    from optimum.intel import OVModelForCausalLM

    options = {"ov_config": EXACT | {"KV_CACHE_PRECISION": "f32"}, "load_in_8bit": False}
    model = OVModelForCausalLM.from_pretrained(folder, export=True, device="CPU", **options)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, model.model


def converted(folder: str, ids: Any) -> tuple[Any, Any]:
    """Logits (1, t, v) and graph of the model that transformers makes."""
    import numpy
    import openvino
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    inputs = (ids, *masks(ids.shape[1], model.config), torch.arange(ids.shape[1])[None])
    with torch.inference_mode():
        graph = openvino.convert_model(logits_of(model), example_input=inputs)
    compiled = openvino.Core().compile_model(graph, "CPU", EXACT)
    found = compiled([tensor.numpy() for tensor in inputs])[0]
    return torch.from_numpy(numpy.array(found)), graph


def masks(t: int, config: Any) -> tuple[Any, Any]:
    """What is added to the scores of attention, (1, 1, t, t): over all tokens, and over those of a sliding window."""
    import torch

    allowed = torch.ones(t, t).tril().bool()
    window = getattr(config.get_text_config(), "sliding_window", None) or t
    near = allowed & torch.ones(t, t).triu(1 - window).bool()
    low = torch.finfo(torch.float32).min
    whole, sliding = (
        torch.zeros(t, t).masked_fill(~mask, low)[None, None] for mask in (allowed, near)
    )
    return whole, sliding


def logits_of(model: Any) -> Any:
    """A module of the logits alone, without a cache, whose masks are inputs."""
    from torch import nn

    mixed = "sliding_attention" in (
        getattr(model.config.get_text_config(), "layer_types", None) or ()
    )

    class Logits(nn.Module):
        """The model."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, whole: Any, sliding: Any, position_ids: Any) -> Any:
            """(1, t, v)."""
            both = {"full_attention": whole, "sliding_attention": sliding}
            mask = both if mixed else whole
            asked = {"attention_mask": mask, "position_ids": position_ids, "use_cache": False}
            return self.model(input_ids=input_ids, **asked).logits

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
