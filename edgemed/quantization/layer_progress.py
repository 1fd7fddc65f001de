"""Work that is done layer by layer, kept on disk as it is finished, so that a killed step goes on
from its last finished layer.

The folder lies beside the step's hidden output and carries a digest of everything the result
depends on: what was begun with other inputs is thrown away, never continued.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from edgemed.artifacts import store
from edgemed.models.safetensors_file import read_tensors

STATE = "state.json"


class Layers:
    """Finished layers of a step writing to `out`, under `key`; facts: the notes of each.

    As a context it throws them away when the step is finished, where it failed before its first
    layer was, or where the disk is full: they hold the room that is missing.
    """

    def __init__(self, out: Path, key: str):
        self.folder = Path(out).with_name(f"{Path(out).name}-layers")
        self.facts: list[dict[str, Any]] = []
        self.key = key
        self.decided: dict[str, Any] = {}
        file = self.folder / STATE
        state = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if state.get("key") == key:
            self.facts = state["facts"]
            self.decided = state["decided"]
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()

    @property
    def done(self) -> int:
        """How many layers are finished."""
        return len(self.facts)

    def save(self, tensors: Mapping[str, torch.Tensor], facts: dict[str, Any]) -> None:
        """The next layer is finished. The state is written last, in one stroke: a kill leaves the
        layer done or not done.
        """
        # Written from here: the library's own error says nothing of a full disk that could be told
        # apart.
        data = safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()})
        with open(self._file(self.done), "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        self.facts = [*self.facts, facts]
        self._note()

    def once(self, name: str, decide: Callable[[], Any]) -> Any:
        """What decide() says (JSON), asked once: a run that goes on keeps the answer of the one
        that was killed.
        """
        if name not in self.decided:
            self.decided[name] = decide()
            self._note()
        return self.decided[name]

    def _note(self) -> None:
        store.write_json(
            self.folder / STATE, {"key": self.key, "facts": self.facts, "decided": self.decided}
        )

    def tensors(self, layer: int, names: Collection[str] | None = None) -> dict[str, torch.Tensor]:
        """What was saved of a layer; names: which of it, None for all."""
        return read_tensors(self._file(layer), names)

    def _file(self, layer: int) -> Path:
        return self.folder / f"{layer:05d}.safetensors"

    def __enter__(self) -> Layers:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        full = isinstance(error, OSError) and error.errno in store.FULL
        if kind is None or full or not self.done:
            # The state first: a kill while the rest goes must not leave a record of layers whose
            # files are gone.
            (self.folder / STATE).unlink(missing_ok=True)
            shutil.rmtree(self.folder, ignore_errors=True)
