"""Layers of towers beside the language model: each compressed from its weight alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from calibration.skeleton import decoder_blocks
from calibration.statistics.collection import Statistics
from calibration.walk import Block
from compress.models.layers import refuse_not_finite
from compress.pipeline.blocks import Finished, Job, compress_group
from compress.planning.groups import Group


def compress_beside(job: Job) -> Iterator[Finished]:
    """Every planned layer that no decoder block holds, finished, as if its inputs were white noise.

    The layer itself stays in the model: calibration text does not reach it. Raises LayerError.
    """
    model, (prefix, _) = job.loader.model, decoder_blocks(job.loader.model)
    for layer in job.plan.layers:
        if layer.name.startswith(f"{prefix}."):
            continue
        job.loader.load([f"{layer.name}."], job.device)
        module = model.get_submodule(layer.name)
        refuse_not_finite(module, layer.name)
        whole = Block(0, "", model, job.stream, {layer.name: module})
        white = torch.eye(layer.shape[1], device=job.device)
        stats = Statistics.of(white, 1, layer.compressor.needs)
        for finished in compress_group(job, whole, Group([layer], stats, [stats])):
            yield replace(finished, energies=(0.0, 0.0))
        parent, _, leaf = layer.name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)
        job.loader.unload(module)
