"""Decoding through edgemed's Session against a bare llama_decode loop on the same loaded file.

The two take turns in one process, each with a context and cache of its own; the ratio shows what
the Session's bookkeeping costs. Run: python bench/decode_peer_llamacpp.py ENGINE
"""

from __future__ import annotations

import os
import time

import numpy as np
from decode_turns import START, arguments, in_turns, record

from edgemed.engines.engine import Engine, open_engine
from edgemed.gguf.llama_session import LlamaSession


class Bare:
    """What a user would write: a batch of one token, llama_decode, the largest score, and again.
    start: tokens in the cache before.
    """

    def __init__(self, session: LlamaSession, engine: Engine, threads: int, start: int = START):
        self.lib = session.lib
        self.width = engine.width
        self.start = start
        self.ctx = self.lib.llama_init_from_model(session.model, session._settings(engine, threads))
        self.memory = self.lib.llama_get_memory(self.ctx)
        self.batch = self.lib.llama_batch_init(start, 0, 1)
        self.fill([1] * start, 0)
        self.lib.llama_decode(self.ctx, self.batch)

    def fill(self, tokens: list[int], start: int) -> None:
        self.batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            self.batch.token[i] = token
            self.batch.pos[i] = start + i
            self.batch.n_seq_id[i] = 1
            self.batch.seq_id[i][0] = 0
            self.batch.logits[i] = i + 1 == len(tokens)

    def run(self, new: int) -> float:
        self.lib.llama_memory_seq_rm(self.memory, 0, self.start, -1)
        self.fill([1], self.start)
        scores = None
        batch = self.batch
        started = time.perf_counter()
        for position in range(self.start, self.start + new):
            batch.pos[0] = position
            self.lib.llama_decode(self.ctx, batch)
            if scores is None:
                scores = np.ctypeslib.as_array(self.lib.llama_get_logits(self.ctx), (self.width,))
            else:
                self.lib.llama_get_logits(self.ctx)
            batch.token[0] = int(scores.argmax())
        return time.perf_counter() - started


def main() -> None:
    args = arguments(__doc__)
    engine = open_engine(args.engine)
    session = engine.open(args.threads)
    if not isinstance(session, LlamaSession):
        raise SystemExit(f"{args.engine} is not an engine of llama.cpp")
    bare = Bare(session, engine, args.threads)
    times = in_turns(bare, session, args.new, args.rounds)
    spinning = os.environ.get("GOMP_SPINCOUNT")
    record("decode_peer_llamacpp", engine, args, times, spinning=spinning)


if __name__ == "__main__":
    main()
