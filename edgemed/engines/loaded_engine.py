"""An engine that stays open: its sessions are started once and used again.

Starting a session reads all weights, which takes longer than many answers. A loaded engine gives
the same session to everybody who opens one, wound back, and closes all of them in the end.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from edgemed.engines.engine import Engine
from edgemed.engines.engine import open_engine as open_directory
from edgemed.inference.session import Session


@dataclass(frozen=True)
class LoadedEngine(Engine):
    """An engine whose sessions stay open until close(); also a context manager. used_threads,
    used_adapter: what open() takes where it is told nothing.
    """

    used_threads: int | None = None
    used_adapter: str | None = None
    # (threads, adapter) -> (session, its own close)
    sessions: dict[tuple[int | None, str | None], tuple[Session, Any]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def open(self, threads: int | None = None, adapter: str | None = None) -> Session:
        """The session of these threads and this adapter, started where it was not yet, with nothing
        read. Its close() does nothing. Raises EdgemedError as Engine.open.
        """
        setting = (threads or self.used_threads, adapter or self.used_adapter)
        if setting not in self.sessions:
            session = super().open(*setting)
            self.sessions[setting] = (session, session.close)
            # Whoever borrows a session closes it when done.
            session.close = _nothing  # type: ignore[method-assign]
        session, _ = self.sessions[setting]
        session.rewind(0)
        return session

    def close(self) -> None:
        """Close every session. The engine can be opened again."""
        while self.sessions:
            _, (_, close) = self.sessions.popitem()
            close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _nothing() -> None:
    pass


def load(
    engine: str | Path | Engine, threads: int | None = None, adapter: str | None = None
) -> LoadedEngine:
    """An engine that stays open, with a session started. Use it in a `with` statement, or close it.

    threads: None for the physical cores; adapter: one of the engine's. Raises EdgemedError where
    the directory holds no engine, a file was altered, or the runtime does not start.
    """
    opened = open_engine(engine, check=True)
    values = {entry.name: getattr(opened, entry.name) for entry in fields(Engine)}
    loaded = LoadedEngine(**values, used_threads=threads, used_adapter=adapter)
    loaded.open()
    return loaded


def open_engine(engine: str | Path | Engine, check: bool = False) -> Engine:
    """An engine by its directory, or the one that is given. check: hash every file of a directory.

    Raises EdgemedError as engine.open_engine.
    """
    return engine if isinstance(engine, Engine) else open_directory(engine, check)
