"""Decoding through edgemed's Session against a bare onnxruntime loop with bound inputs and outputs,
on the same file.

The two take turns in one process; the ratio shows what the Session's bookkeeping costs. Run: python
bench/decode_peer_onnx.py ENGINE
"""

from __future__ import annotations

import time

import numpy as np
import onnxruntime as ort
from decode_turns import START, arguments, in_turns, record

from edgemed.engines.engine import Engine, open_engine
from edgemed.onnx.ort_dialect import ROPE
from edgemed.onnx.ort_session import rope_tables


class Bare:
    """What a user would write: bind everything once, change four numbers per token, run. start:
    tokens in the cache before; session: a loaded one to share.
    """

    def __init__(
        self,
        engine: Engine,
        threads: int,
        start: int = START,
        session: ort.InferenceSession | None = None,
    ):
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.start = start
        self.session = session or ort.InferenceSession(
            str(engine.path / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self.binding = self.session.io_binding()
        self.buffers = {}
        for value in self.session.get_inputs():
            if value.name.startswith("past."):
                cache = ort.OrtValue.ortvalue_from_numpy(
                    np.zeros((1, value.shape[1], engine.context, value.shape[3]), np.float32)
                )
                self.binding.bind_ortvalue_input(value.name, cache)
                self.binding.bind_ortvalue_output(value.name.replace("past", "present"), cache)
                continue
            array = self.array(engine, value)
            self.buffers[value.name] = array
            self.binding.bind_ortvalue_input(value.name, ort.OrtValue.ortvalue_from_numpy(array))
        self.scores = np.zeros((1, 1, engine.width), np.float32)
        self.binding.bind_ortvalue_output("scores", ort.OrtValue.ortvalue_from_numpy(self.scores))

    @staticmethod
    def array(engine: Engine, value: ort.NodeArg) -> np.ndarray:
        """What one input holds; of a vision model, no image."""
        if value.name in ROPE:
            return rope_tables(engine)[ROPE.index(value.name)].astype(np.float32)
        if value.name == "features":
            return np.zeros((1, value.shape[1]), np.float32)
        if value.name == "feature_rows":
            return np.full((1, 1), -1)
        return np.zeros(
            (1, 1) if value.name in ("tokens", "positions") else 1,
            np.int64 if "int64" in value.type else np.int32,
        )

    def run(self, new: int) -> float:
        started = time.perf_counter()
        buffers = self.buffers
        token = 1
        for position in range(self.start, self.start + new):
            buffers["tokens"][0, 0] = token
            buffers["positions"][0, 0] = position
            buffers["last_index"][0] = position
            buffers["total"][0] = position + 1
            self.session.run_with_iobinding(self.binding)
            token = int(self.scores[0, 0].argmax())
        return time.perf_counter() - started


def main() -> None:
    args = arguments(__doc__)
    engine = open_engine(args.engine)
    bare = Bare(engine, args.threads)
    session = engine.open(args.threads)
    times = in_turns(bare, session, args.new, args.rounds, pause=0.3)
    record("decode_peer_onnx", engine, args, times)


if __name__ == "__main__":
    main()
