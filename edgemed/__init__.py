"""edgemed takes a medical checkpoint to small-device engines and proves that they did not get
worse.

    import edgemed as em

    em.inspect("./BioMedLM")
    em.run("recipes/quickstart.yaml")
    em.export("./BioMedLM", "onnx", "engine")
    with em.load("engine") as engine:  # stays open: the runtime starts once
        em.generate(engine, "Anemia is", max_tokens=32)
        em.evaluate(engine, "pubmedqa", limit=100)

The names are loaded when they are first used, so that importing edgemed needs no runtime and no
torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = [
    "EdgemedError",
    "bench",
    "chat",
    "evaluate",
    "export",
    "generate",
    "import_gguf",
    "inspect",
    "load",
    "open_engine",
    "plan",
    "run",
    "verify",
]
_WHERE = {
    "inspect": "edgemed.api",
    "run": "edgemed.api",
    "export": "edgemed.api",
    "import_gguf": "edgemed.api",
    "open_engine": "edgemed.engines.engine",
    "load": "edgemed.engines.loaded_engine",
    **dict.fromkeys(
        ("bench", "chat", "evaluate", "generate", "plan", "verify"), "edgemed.functions"
    ),
    "EdgemedError": "edgemed.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'edgemed' has no attribute '{name}'")
    return getattr(importlib.import_module(_WHERE[name]), name)
