"""A program that reads a native checkpoint's configuration and builds its forms without the toolkit.

Run in a fresh process as a file, with the checkpoint's folder; it prints what went wrong to stderr, and ends with 0 if
nothing did. No weight is read.
"""

import sys

HIDDEN = ("compress", "calibration", "eval")


def main(folder: str) -> None:
    """Load the shipped code as `trust_remote_code=True` does, and build every form on the meta device."""
    for name in HIDDEN:
        sys.modules[name] = None  # type: ignore[assignment]  # what makes an import fail
    import torch
    from transformers import AutoConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    reading = get_class_from_dynamic_module("loading.CompressedConfig", folder)
    empty = sys.modules[reading.__module__].empty
    for layer in config.quantization_config.layers.values():
        empty(layer["form"], tuple(layer["shape"]), torch.float32, "meta")


if __name__ == "__main__":
    main(sys.argv[1])
