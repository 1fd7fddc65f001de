"""What llama.cpp itself reads from a GGUF file: token ids of texts, special tokens, scores.

llama.cpp ends the process where a file is not as it expects, or where a vocabulary has no token for
a byte of a text. So it reads in a process of its own, and the end of that process is one line here.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgemed.errors import EdgemedError
from edgemed.gguf.float_twin import write_float_twin
from edgemed.gguf.llama_session import ERRORS, llama_library
from edgemed.hardware.child_process import die_with_the_parent, run_child

# Seconds for a foreign file: to open it, and for each 10^9 bytes of it.
OPENING = 60.0
PER_GIGABYTE = 120.0
REQUEST = "request.json"
READING = "reading.json"
SCORES = "scores.npz"
TWIN = "twin.gguf"


@dataclass(frozen=True)
class LlamaReading:
    """A file as llama.cpp reads it.

    ids: of each text, special tokens in it taken as such. framed: the same with what llama.cpp
    puts before and behind a text. add_bos, add_eos: whether it does so. bos, eos, eot, pad: ids, -1
    for none. ends: every id at which its programs stop. template: the chat template, '' for none.
    """

    ids: list[list[int]]
    framed: list[list[int]]
    add_bos: bool
    add_eos: bool
    bos: int
    eos: int
    eot: int
    pad: int
    ends: list[int]
    template: str


def read_tokens(file: Path, texts: Sequence[str]) -> LlamaReading:
    """The vocabulary of a file and its ids of `texts`, in this process, which llama.cpp may end.
    Raises EdgemedError where llama.cpp cannot load it.
    """
    lib = llama_library()
    params = lib.llama_model_default_params()
    params.vocab_only = True
    model = _load(lib, file, params)
    try:
        return _reading(lib, model, texts)
    finally:
        lib.llama_model_free(model)


def read_in_child(
    file: Path, texts: Sequence[str], scored: Sequence[int] = (), blocks: int = 0
) -> tuple[LlamaReading, list[np.ndarray], list[np.ndarray]]:
    """The same in a process of its own, and float32 scores [tokens, vocab] of the texts with the
    numbers `scored`, after what llama.cpp puts before them: of the file, and of its first `blocks`
    layers with floats for integers (none where that is 0).

    Raises EdgemedError where llama.cpp refuses the file, dies of it or takes too long.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        request = {
            "file": str(Path(file).resolve()),
            "texts": list(texts),
            "scored": list(scored),
            "blocks": blocks,
        }
        (folder / REQUEST).write_text(json.dumps(request), encoding="utf-8")
        code = "import sys; from edgemed.gguf.llama_reading import main; main(sys.argv[1])"
        # Only this edgemed and what is installed: nothing from the folder a person stands in.
        paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            # Where it dies no debugger is to be called.
            "GGML_NO_BACKTRACE": "1",
        }
        limit = OPENING + PER_GIGABYTE * Path(file).stat().st_size / 1e9
        try:
            command = [sys.executable, "-P", "-c", code, name]
            done = run_child(command, env=environment, timeout=limit)
        except subprocess.TimeoutExpired:
            raise EdgemedError(
                f"llama.cpp did not finish reading {file} within {limit:.0f} s",
                "The file is damaged, or the machine is busy",
            ) from None
        if not (folder / READING).is_file():
            raise EdgemedError(f"llama.cpp cannot read {file}: {_cause(done)}", "Get it again")
        document = json.loads((folder / READING).read_text(encoding="utf-8"))
        if "error" in document:
            raise EdgemedError(document["error"], "Get the file again")
        scores = []
        if scored:
            with np.load(folder / SCORES) as arrays:
                scores = [arrays[f"arr_{place}"] for place in range(len(arrays.files))]
        count = len(scored)
        return LlamaReading(**document), scores[:count], scores[count:]


def _cause(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    # A C library says why in its first line and then where in many.
    reason = next((line for line in lines if "GGML_ASSERT" in line or "error" in line.lower()), "")
    reason = reason or (lines[-1] if lines else "no reason given")
    if done.returncode < 0:
        return f"it ends with signal {-done.returncode} ({reason.strip()})"
    return reason.strip()


def main(folder: str) -> None:
    """The child process: read the request in `folder`, write the reading beside it."""
    die_with_the_parent()
    work = Path(folder)
    request = json.loads((work / REQUEST).read_text(encoding="utf-8"))
    texts = request["texts"]
    try:
        lib = llama_library()
        reading = read_tokens(Path(request["file"]), texts)
        if request["scored"]:
            params = lib.llama_model_default_params()
            # The plain kernels: no second copy of the weights for a few tokens.
            params.use_extra_bufts = False
            model = _load(lib, Path(request["file"]), params)
            texts_ids = [reading.framed[n] for n in request["scored"]]
            scores = [_scores(lib, model, ids) for ids in texts_ids]
            if request["blocks"]:
                write_float_twin(Path(request["file"]), work / TWIN, request["blocks"])
                twin = _load(lib, work / TWIN, params)
                scores += [_scores(lib, twin, ids) for ids in texts_ids]
            np.savez(work / SCORES, *scores)
    except EdgemedError as error:
        document: dict[str, Any] = {"error": error.problem}
    else:
        document = asdict(reading)
    (work / READING).write_text(json.dumps(document), encoding="utf-8")


def _load(lib: Any, file: Path, params: Any) -> Any:
    ERRORS.clear()
    model = lib.llama_model_load_from_file(str(file).encode(), params)
    if not model:
        reason = "; ".join(ERRORS) or "no reason given"
        raise EdgemedError(f"llama.cpp cannot load {file}: {reason}", "Get the file again")
    return model


def _reading(lib: Any, model: Any, texts: Sequence[str]) -> LlamaReading:
    vocab = lib.llama_model_get_vocab(model)
    count = lib.llama_vocab_n_tokens(vocab)
    template = lib.llama_model_chat_template(model, None)
    return LlamaReading(
        ids=[_ids(lib, vocab, text, False) for text in texts],
        framed=[_ids(lib, vocab, text, True) for text in texts],
        add_bos=bool(lib.llama_vocab_get_add_bos(vocab)),
        add_eos=bool(lib.llama_vocab_get_add_eos(vocab)),
        bos=int(lib.llama_vocab_bos(vocab)),
        eos=int(lib.llama_vocab_eos(vocab)),
        eot=int(lib.llama_vocab_eot(vocab)),
        pad=int(lib.llama_vocab_pad(vocab)),
        ends=[i for i in range(count) if lib.llama_vocab_is_eog(vocab, i)],
        template=(template or b"").decode(errors="replace"),
    )


def _ids(lib: Any, vocab: Any, text: str, framed: bool) -> list[int]:
    data = text.encode()
    room = len(data) + 8
    tokens = (ctypes.c_int32 * room)()
    count = lib.llama_tokenize(vocab, data, len(data), tokens, room, framed, True)
    if count < 0:
        raise EdgemedError(f"llama.cpp cannot tokenize {text!r}", "Get the file again")
    return list(tokens[:count])


def _scores(lib: Any, model: Any, tokens: Sequence[int]) -> np.ndarray:
    """float32 [tokens, vocab] after each of the tokens, with a float32 cache."""
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = len(tokens)
    params.n_outputs_max = params.n_outputs_max_per_seq = len(tokens)
    params.type_k = params.type_v = lib.GGML_TYPE_F32
    params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.no_perf = True
    context = lib.llama_init_from_model(model, params)
    if not context:
        raise EdgemedError(f"llama.cpp cannot start: {'; '.join(ERRORS)}", "Get the file again")
    batch = lib.llama_batch_init(len(tokens), 0, 1)
    for place, token in enumerate(tokens):
        batch.token[place] = token
        batch.pos[place] = place
        batch.n_seq_id[place] = 1
        batch.seq_id[place][0] = 0
        batch.logits[place] = 1
    batch.n_tokens = len(tokens)
    if code := lib.llama_decode(context, batch):
        raise EdgemedError(f"llama_decode gave {code}", "Get the file again")
    width = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    scores = np.ctypeslib.as_array(lib.llama_get_logits(context), (len(tokens), width)).copy()
    lib.llama_batch_free(batch)
    lib.llama_free(context)
    return scores
