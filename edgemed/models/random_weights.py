"""True-dimension checkpoints with random weights, for latency and memory when real weights cannot
be had.

The config carries `edgemed_random_weights: true`, which every engine, record and report repeats:
nothing made from such a checkpoint says anything about accuracy.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgemed.artifacts import store
from edgemed.console import track
from edgemed.errors import EdgemedError, nearest, need
from edgemed.models.architecture import all_families, every_part, family_of
from edgemed.models.checkpoint import Checkpoint, Writer, open_checkpoint

MARK = "edgemed_random_weights"


def reference_config(name: str) -> dict[str, Any]:
    """The published config of a model ('biomedlm') or of a family's best-known one ('gpt2'), the
    caller's own.
    """
    configs: dict[str, Mapping[str, Any]] = {}
    for family in all_families().values():
        configs[family.reference_name] = family.reference_config
        configs[family.name] = family.reference_config
        configs.update(family.other_references)
    if name not in configs:
        raise EdgemedError(f"no true dimensions are known for '{name}'", nearest(name, configs))
    # A copy of all of it, because transformers' config classes write into the mappings they get.
    return copy.deepcopy(dict(configs[name]))


def make_random(
    config: str | Mapping[str, Any], out: Path, dtype: str = "bfloat16", seed: int = 0
) -> Checkpoint:
    """Write a random checkpoint of the given model name or config to `out` (reused where it is
    already there).

    dtype: 'float32', 'float16' or 'bfloat16'. Matrices ~ N(0, initializer_range), norms 1, biases
    0, as at initialisation.
    """
    config = reference_config(config) if isinstance(config, str) else dict(config)
    config |= {MARK: True, "torch_dtype": dtype}
    params = {"config": config, "dtype": dtype, "seed": seed}
    with store.building(Path(out), "checkpoint", "random-weights", params, {}) as work:
        if work is not None:
            _write(work.path, config, dtype, seed)
            work.notes[MARK] = True
    return open_checkpoint(out)


def _write(path: Path, config: Mapping[str, Any], dtype: str, seed: int) -> None:
    torch = need("torch", "build")
    family = family_of(config, "random weights")
    decoder = family.decoder(config, {})
    vision = family.vision(config, {}, {}) if family.vision else None
    generator = torch.Generator().manual_seed(seed)
    writer = Writer(path, config)
    std = config.get("initializer_range", 0.02)
    stored_dtype = getattr(torch, dtype)
    prefix = family.prefixes[0]
    written: set[str] = set()
    for part in track(list(every_part(family, decoder, vision).values()), "random weights"):
        for module, shape in part.stored():
            # Tied modules are written once.
            if module in written:
                continue
            written.add(module)
            if part.kind == "norm":
                weight = torch.ones(shape)
            else:
                weight = torch.empty(shape).normal_(0, std, generator=generator)
            writer.add(f"{prefix}{part.weight(module)}", weight.to(stored_dtype))
            if part.bias:
                rows = shape[-1 if part.conv1d else 0]
                writer.add(f"{prefix}{module}.bias", torch.zeros(rows, dtype=stored_dtype))
    writer.close()
