"""Checkpoints as old versions of AutoGPTQ wrote them, which today's tools no longer make."""

from __future__ import annotations

from pathlib import Path

import torch

from edgemed.models.checkpoint import Checkpoint, Writer, open_checkpoint
from edgemed.models.gptq_packing import pack
from edgemed.models.weights import CanonicalWeights


def old_checkpoint(
    model: Path, out: Path, bits: int, asymmetric: bool, act_order: bool
) -> Checkpoint:
    """What AutoGPTQ wrote for desc_act and asymmetric quantization, made by hand: zeros of their
    own, groups numbered freely.
    """
    source = CanonicalWeights(open_checkpoint(model))
    group = 32
    random = torch.Generator().manual_seed(3)
    config = {
        **source.checkpoint.config,
        "quantization_config": {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group,
            "desc_act": act_order,
            "sym": not asymmetric,
            "checkpoint_format": "gptq",
        },
    }
    out.mkdir()
    writer = Writer(out, config, model)
    matrices = {
        source.keys[f"layers.{n}.{name}"][0]
        for n in range(source.decoder.layers)
        for name in source.decoder.matrices(n)
    }
    for key in source.checkpoint.tensors:
        module, _, kind = key.rpartition(".")
        tensor = source.checkpoint.read(key)
        if module not in matrices or kind == "bias":
            writer.add(key, tensor)
            continue
        columns, rows = tensor.shape
        q = torch.randint(1 << bits, (columns, rows), generator=random, dtype=torch.uint8)
        zeros = (
            torch.randint(
                1, 1 << bits, (columns // group, rows), generator=random, dtype=torch.uint8
            )
            if asymmetric
            else torch.full((columns // group, rows), 1 << bits - 1, dtype=torch.uint8)
        )
        g_idx = torch.arange(columns) // group
        writer.add(f"{module}.qweight", pack(q, bits, 0))
        writer.add(f"{module}.qzeros", pack(zeros - 1, bits, 1))
        writer.add(
            f"{module}.scales",
            (torch.rand(columns // group, rows, generator=random) * 0.4 / (1 << bits)).half(),
        )
        writer.add(
            f"{module}.g_idx",
            (g_idx[torch.randperm(columns, generator=random)] if act_order else g_idx).to(
                torch.int32
            ),
        )
    writer.close()
    return open_checkpoint(out)
