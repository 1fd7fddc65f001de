"""True-dimension checkpoints with random weights, for latency and memory when real weights cannot
be had.

The config carries `edgemed_random_weights: true`, which every engine, record and report repeats:
nothing made from such a checkpoint says anything about accuracy.
"""

from __future__ import annotations

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
    """The published config of a model ('biomedlm') or of a family's best-known one ('gpt2')."""
    families = all_families().values()
    known = {
        name: config
        for f in families
        for name, config in (
            (f.reference_name, f.reference_config),
            (f.name, f.reference_config),
            *f.other_references.items(),
        )
    }
    if name not in known:
        raise EdgemedError(f"no true dimensions are known for '{name}'", nearest(name, known))
    return dict(known[name])


def make_random(
    config: str | Mapping[str, Any], out: Path, dtype: str = "bfloat16", seed: int = 0
) -> Checkpoint:
    """Write a random checkpoint of the given model name or config to `out` (reused where it is
    already there).

    dtype: 'float32', 'float16' or 'bfloat16'. Matrices ~ N(0, initializer_range), norms 1, biases
    0, as at initialisation.
    """
    torch = need("torch", "build")
    config = reference_config(config) if isinstance(config, str) else dict(config)
    config |= {MARK: True, "torch_dtype": dtype}
    params = {"config": config, "dtype": dtype, "seed": seed}
    with store.building(Path(out), "checkpoint", "random-weights", params, {}) as work:
        if work is not None:
            family = family_of(config, "random weights")
            decoder = family.decoder(config, {})
            generator = torch.Generator().manual_seed(seed)
            writer = Writer(work.path, config)
            std = config.get("initializer_range", 0.02)
            written: set[str] = set()
            for part in track(
                list(
                    every_part(
                        family, decoder, family.vision(config, {}, {}) if family.vision else None
                    ).values()
                ),
                "random weights",
            ):
                for module, shape in part.stored():
                    if module in written:
                        continue
                    written.add(module)
                    if part.kind == "norm":
                        weight = torch.ones(shape)
                    else:
                        weight = torch.empty(shape).normal_(0, std, generator=generator)
                    writer.add(
                        f"{family.prefixes[0]}{part.weight(module)}",
                        weight.to(getattr(torch, dtype)),
                    )
                    if part.bias:
                        writer.add(
                            f"{family.prefixes[0]}{module}.bias",
                            torch.zeros(
                                shape[-1 if part.conv1d else 0], dtype=getattr(torch, dtype)
                            ),
                        )
            writer.close()
            work.notes[MARK] = True
    return open_checkpoint(out)
