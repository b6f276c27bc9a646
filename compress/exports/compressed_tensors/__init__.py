"""compressed-tensors checkpoints, which vLLM, SGLang, transformers and OpenVINO read."""
