"""The llama.cpp target: a GGUF file written straight from the checkpoint, run through llama.cpp's C
interface.

The file equals llama-quantize's bit for bit (from a float32 GGUF of the folded checkpoint), or
carries a GPTQ checkpoint's very integers. llama.cpp knows only the plain attention scale, so
weights are read folded.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from edgemed.artifacts import hashing, store
from edgemed.console import say
from edgemed.engines.engine import Engine
from edgemed.errors import EdgemedError, need
from edgemed.gguf import (
    library,
    lora_files,
    metadata,
    mmproj,
    mtmd_vision,
    preserved_integers,
    tokenizer_metadata,
    writer,
)
from edgemed.gguf.ggml_session import ARCH, KEY, GgmlSession, refuses
from edgemed.gguf.ggml_session import FILE as GRAPH
from edgemed.gguf.llama_session import CACHE_BYTES, FILE, HEAD, LlamaSession, cache_type
from edgemed.gguf.quant_types import FILE_TYPES, FLOATS, Model, needs_imatrix, tensor_types
from edgemed.gguf.tensor_map import (
    ROPE,
    Centred,
    TensorReader,
    TensorSource,
    file_layout,
    graph_of,
    layout,
    own_graph,
    parts_with_biases,
    preserved_bits,
    rescaled,
)
from edgemed.hardware.child_process import run_child
from edgemed.models import lora
from edgemed.models.architecture import all_families
from edgemed.models.parameter_count import parameters, sizes
from edgemed.models.tokenizer import open_tokenizer
from edgemed.models.weights import CanonicalWeights
from edgemed.onnx.ort_dialect import OrtDialect
from edgemed.onnx.vision_encoder import TOLERANCES, OnnxVisionEncoder
from edgemed.onnx.vision_graph import TOWERS, build_vision
from edgemed.params import Doc, Range
from edgemed.planning import choices
from edgemed.planning.choices import Choice, Size
from edgemed.planning.roofline import Storage
from edgemed.provenance.model_card import front_licence

if TYPE_CHECKING:
    from edgemed.gguf.bit_allocation import TypeChoice
    from edgemed.gguf.tokenizer_metadata import TokenizerFacts
    from edgemed.hardware.device import Device
    from edgemed.inference.session import ImageEmbeddings, VisionEncoder
    from edgemed.models.checkpoint import Checkpoint

# Largest logit error against the float32 source: ggml computes GELU from a float16 table.
FP32_TOLERANCE = {"F32": 5e-3}
# The package that runs these engines, and the extra that installs it.
RUNTIME = ("llama_cpp", "llamacpp")
TITLE = "llama.cpp"
# Distribution -> extra; distribution -> others of the same package.
PACKAGES = {"gguf": "build", "llama-cpp-python": "llamacpp"}
PACKAGES_INSTEAD: dict[str, tuple[str, ...]] = {}
# A quantize step with a budget has nothing to choose for these engines: they have a budget of their
# own.
BUDGET_CHOICES: tuple[tuple[int, int], ...] = ()

# For the planner: see docs/add-a-target.md.
TABLE_ORDER = 3
ACTIVATION_BYTES = 4
BUILDS_ON_DEVICE = False
# Precisions of a vision tower that are planned -> bytes per weight while it runs: it runs on ONNX
# Runtime's CPU, which widens float16.
PLANNED_TOWERS = {"fp32": 4.0, "int8": 1.0}
# Bits per weight, scales included, of the formats llama.cpp's Q4_K_M mixes; rows 256 does not
# divide get the block-of-32 ones.
GGUF_BITS = {"F32": 32.0, "F16": 16.0, "Q8_0": 8.5, "Q6_K": 6.5625, "Q5_0": 5.5, "Q4_K": 4.5}
# Types of which llama.cpp keeps a second, rearranged copy for its CPU kernels.
REPACKED = ("Q4_K", "Q8_0")
KV_FORMATS: dict[str, tuple[float, dict[str, Any]]] = {
    "f16": (2.0, {}),
    "q8_0": (34 / 32, {"kv": "q8_0"}),
}
# The mixtures' bits depend on the shapes and are filled in by engine_bytes.
CHOICES = (
    Choice("llamacpp", "f16", {"type": "f16"}, Storage(16, 16, "fp16"), kv=KV_FORMATS),
    Choice("llamacpp", "q8_0", {"type": "q8_0"}, Storage(8.5, 8.5, "weight_only"), kv=KV_FORMATS),
    Choice(
        "llamacpp",
        "q4_k_m",
        {"type": "q4_k_m"},
        Storage(4.85, 6.5625, "weight_only"),
        kv=KV_FORMATS,
    ),
)
REBUILD = (
    "Build it without AMX: CMAKE_ARGS=\"-DCMAKE_C_FLAGS='-mno-amx-tile -mno-amx-int8 -mno-amx-bf16'"
    " -DCMAKE_CXX_FLAGS='-mno-amx-tile -mno-amx-int8 -mno-amx-bf16'\" pip install --force-reinstall"
    " --no-cache-dir --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36"
)


@dataclass(frozen=True)
class Params:
    """Parameters of the target llamacpp. Every field says what it is for."""

    type: Annotated[
        Literal[
            "f32",
            "f16",
            "bf16",
            "q8_0",
            "q4_0",
            "q4_1",
            "q5_0",
            "q5_1",
            "q2_k",
            "q2_k_s",
            "q3_k_s",
            "q3_k_m",
            "q3_k_l",
            "q4_k_s",
            "q4_k_m",
            "q5_k_s",
            "q5_k_m",
            "q6_k",
            "iq4_xs",
            "iq4_nl",
            "iq3_m",
            "iq3_s",
            "iq3_xs",
            "iq3_xxs",
            "iq2_m",
            "iq2_s",
            "iq2_xs",
            "iq2_xxs",
        ]
        | None,
        Doc(
            "llama.cpp's file type. None is q4_k_m, or with from_checkpoint q8_0, the type of the"
            " output matrix."
        ),
    ] = None
    from_checkpoint: Annotated[
        bool,
        Doc(
            "Carry a GPTQ checkpoint's integers (Q4_0 or Q8_0). `type` is then that of the output"
            " matrix, and the embedding stays float16."
        ),
    ] = False
    imatrix: Annotated[
        str | None,
        Doc(
            "An importance .npz, or a calibration card's name, of which `samples` sequences of"
            " `length` tokens are run."
        ),
    ] = None
    budget: Annotated[
        str | None,
        Doc(
            "'4.5bpw' (bits per weight of the whole file) or '1.6GB': every layer matrix then gets"
            " its own type, the others that of `type`. It is measured on the text of `imatrix`."
        ),
    ] = None
    rounding: Annotated[
        Literal["nearest", "gptq"],
        Doc(
            "'nearest' is llama.cpp's own routine, weight by weight. 'gptq' moves each column's"
            " error into the later ones, on the text of `imatrix`: the same types and bytes, but"
            " nearer to the source."
        ),
    ] = "nearest"
    samples: Annotated[int, Range(1), Doc("Sequences of the text of `imatrix`.")] = 32
    length: Annotated[int, Range(1), Doc("Tokens of each of these sequences.")] = 256
    context: Annotated[
        int | None, Range(1), Doc("Tokens of the KV cache. Where none is given, the model's.")
    ] = None
    kv: Annotated[
        Literal["auto", "f32", "f16", "q8_0"],
        Doc("Type of the KV cache. 'auto' is f32 for an f32 file, else f16."),
    ] = "auto"
    repack: Annotated[
        bool,
        Doc(
            "Let llama.cpp keep a second, faster copy of the weights (edgemed's ggml graph: of"
            " those that every token reads)."
        ),
    ] = True
    vision: Annotated[
        Literal["onnx", "mtmd"],
        Doc(
            "What computes a vision tower and projector: ONNX Runtime, in the precision `tower`, or"
            " llama.cpp's own libmtmd (not CLIP towers, which it has wrong)."
        ),
    ] = "onnx"
    tower: Annotated[
        Literal["fp32", "fp16", "int8", "w8a8"],
        Doc("Precision of the vision tower and projector on ONNX Runtime."),
    ] = "fp32"
    mmproj: Annotated[
        Literal["f32", "f16", "q8_0"] | None,
        Doc(
            "Type of mmproj.gguf, which libmtmd reads (None is then f16). Given without libmtmd,"
            " the file is written for llama.cpp's own programs, which resize images in another way."
        ),
    ] = None
    tokenizer: Annotated[
        Literal["same", "edgemed"],
        Doc(
            "'same' refuses a file if llama.cpp's own programs would read texts otherwise than the"
            " model's tokenizer does. 'edgemed' writes it, for edgemed's engine alone."
        ),
    ] = "same"
    min_pixels: Annotated[
        int | None, Range(1), Doc("Pixels that a smaller image is enlarged to. None: the model's.")
    ] = None
    max_pixels: Annotated[
        int | None, Range(1), Doc("Pixels that a larger image is reduced to. None: the model's.")
    ] = None
    adapters: Annotated[
        dict[str, str] | None,
        Doc(
            "LoRA adapters that travel along unmerged: name -> PEFT directory. A session uses one"
            " of them or none."
        ),
    ] = None


def label(params: Params) -> str:
    """A short engine name."""
    return (
        "llamacpp-checkpoint"
        if params.from_checkpoint
        else f"llamacpp-{params.budget or file_type(params)}"
    )


def file_type(params: Params) -> str:
    return params.type or ("q8_0" if params.from_checkpoint else "q4_k_m")


def inputs(params: Params) -> dict[str, str]:
    """sha256 of the adapters and of the importance file, or of the text it is to be measured on.
    Raises EdgemedError where one is missing.
    """
    digests = lora.inputs(params.adapters)
    if params.imatrix is None:
        return digests
    if params.imatrix.endswith(".npz"):
        from edgemed.quantization import importance_matrix

        return digests | {"imatrix": importance_matrix.digest(Path(params.imatrix))}
    from edgemed.data.image_sets import calibration_digests

    return digests | {
        name.replace("calibration", "imatrix"): sha
        for name, sha in calibration_digests(params.imatrix).items()
    }


def supports(weights: CanonicalWeights, params: Params) -> str | None:
    """Why this model cannot become this engine, or None. Raises EdgemedError for an adapter that
    does not belong to it.
    """
    checks = (
        _adapters_refused,
        _graph_refused,
        _checkpoint_integers_refused,
        _calibration_refused,
    )
    for check in checks:
        if reason := check(weights, params):
            return reason
    return None


def _adapters_refused(weights: CanonicalWeights, params: Params) -> str | None:
    if lora.carried_adapters(weights.checkpoint, params.adapters) and (
        reason := lora_files.adapter_refused(weights)
    ):
        return reason
    lora.read_loras(weights, params.adapters)
    return None


def _graph_refused(weights: CanonicalWeights, params: Params) -> str | None:
    """Why no graph of llama.cpp, or edgemed's own, computes this model."""
    d = weights.unfolded
    experts = d.experts
    if params.from_checkpoint and experts and experts.has_shared_base:
        return (
            "experts that share a matrix become whole ones here, whose sums have no integers of the"
            " checkpoint; leave from_checkpoint out"
        )
    if d.activation == "gelu":
        return (
            f"llama.cpp's {weights.family.gguf_arch} graph computes the tanh form of GELU, this"
            " model the exact one"
        )
    if rescaled(d) is not None and not graph_of(weights.family, d)[1]:
        return f"llama.cpp's {weights.family.gguf_arch} graph knows no rescaled rotary frequencies"
    runs_own_graph = own_graph(weights.family, d)
    if runs_own_graph and (reason := refuses(d)):
        return reason
    if not runs_own_graph and (reason := _shape_refused(weights)):
        return reason
    if runs_own_graph and params.kv != "auto":
        return (
            "the cache of edgemed's ggml graph is f32 for an f32 file and f16 otherwise; leave"
            " kv out"
        )
    if params.kv == "q8_0" and d.head_dim % 32:
        return (
            f"a q8_0 cache has blocks of 32, and this model's heads have {d.head_dim} elements;"
            " leave kv out"
        )
    if params.context and params.context > d.context:
        return f"context {params.context} is longer than the model's {d.context}"
    if params.vision == "mtmd" or params.mmproj:
        return mmproj.mmproj_refused(weights)
    return None


def _shape_refused(weights: CanonicalWeights) -> str | None:
    """Why llama.cpp's graph has no place for this model's heads or biases."""
    d = weights.unfolded
    graph, interleaved = graph_of(weights.family, d)
    # Of the graphs in use, the one of interleaved rows reads a head's size and takes biases on
    # every matrix.
    if interleaved:
        return None
    if d.q_size != d.hidden:
        return (
            f"llama.cpp's {graph} graph takes a head to be {d.hidden} / {d.heads} wide, this"
            f" model's are {d.head_dim} (head_dim in config.json)"
        )
    for name, part in parts_with_biases(weights).items():
        matrix = name.startswith("layers.") and part.kind == "matrix"
        if matrix and part.bias and not weights.parts[name].bias:
            return (
                f"llama.cpp's {graph} graph has no bias for {name}, and the checkpoint stores one"
            )
    return None


def _checkpoint_integers_refused(weights: CanonicalWeights, params: Params) -> str | None:
    """Why a checkpoint's integers cannot be carried."""
    if not params.from_checkpoint:
        return None
    if not weights.quantization:
        return (
            "from_checkpoint needs a GPTQ checkpoint, which this one is not; put a quantize step"
            " before it"
        )
    if weights.family.gguf_centred and not own_graph(weights.family, weights.unfolded):
        return (
            f"llama.cpp's {weights.family.gguf_arch} graph gets this model's weights with their"
            " mean taken out, which other integers hold; leave from_checkpoint out"
        )
    if params.imatrix:
        return "an importance matrix has no effect with from_checkpoint; leave one of them out"
    if params.budget:
        return (
            "a budget cannot change the integers of a checkpoint; give the budget to the quantize"
            " step, or leave from_checkpoint out"
        )
    return None


def _calibration_refused(weights: CanonicalWeights, params: Params) -> str | None:
    """Why a budget or GPTQ cannot work with the text that is given."""
    textless = params.imatrix is None or params.imatrix.endswith(".npz")
    if params.budget and textless:
        return (
            "a budget is shared out by what calibration text shows; give imatrix a card's name or a"
            " text file"
        )
    if params.rounding != "gptq":
        return None
    floats = not params.budget and FILE_TYPES[file_type(params)][1] in FLOATS
    if params.from_checkpoint or floats:
        return "rounding: gptq has no effect where no integers are chosen; leave it out"
    if textless:
        return "rounding: gptq needs calibration text; give imatrix a card's name or a text file"
    return None


def build(weights: CanonicalWeights, out: Path, params: Params) -> dict[str, Any]:
    """Write model.gguf (and head.npz); returns the facts for engine.json and the manifest."""
    weights = type(weights)(weights.checkpoint, sum_experts=True)
    runs_own_graph = own_graph(weights.family, weights.unfolded)
    centred = weights.family.gguf_centred and not runs_own_graph
    folded = (Centred if centred else type(weights))(
        weights.checkpoint, fold=True, sum_experts=True
    )
    facts = _tokenizer(folded)
    columns = _importance(folded, params)
    chosen = _budgeted(folded, params, columns, out) if params.budget else None
    tensors, fallbacks = file_tensors(folded, params, columns, chosen.types if chosen else None)
    with _rounded(folded, params, columns, tensors, out) as (rounded, errors):
        writer.write_gguf(
            out / (GRAPH if runs_own_graph else FILE),
            ARCH if runs_own_graph else graph_of(folded.family, folded.decoder)[0],
            lambda writer: write_metadata(writer, folded, file_type(params), facts),
            rounded,
        )
    tokenizer_notes: dict[str, Any] = {}
    if facts is not None and not runs_own_graph:
        allowed = params.tokenizer == "edgemed"
        tokenizer_notes["tokenizer"] = _check_tokenizer(out / FILE, facts, allowed)
    if folded.decoder.head != "lm":
        head = folded.matrix("head")
        bias = head.bias if head.bias is not None else np.zeros(folded.decoder.head_size)
        np.savez(
            out / HEAD,
            weight=np.asarray(head.dense(), np.float32),
            bias=np.asarray(bias, np.float32),
        )
    vision_notes: dict[str, Any] = {}
    if weights.vision:
        vision_notes = build_vision_files(weights, out, params)
    factors = {
        one.name: lora_files.write_gguf_adapter(out, one, folded)
        for one in lora.read_loras(folded, params.adapters)
    }
    adapter = weights.checkpoint.adapter
    adapter_bytes = factors[adapter.name] if adapter else 0
    context = params.context or weights.decoder.context
    kv = cache_type(params.kv, file_type(params) == "f32")
    notes: dict[str, Any] = {
        "precision": _precision(weights, params, chosen),
        "bytes_per_token": round(_bytes_per_token(weights, tensors)) + adapter_bytes,
        "context": context,
        "kv_cache": {
            "type": kv,
            "bytes": round(weights.decoder.cache_elements(context) * CACHE_BYTES[kv]),
        },
        "types": dict(Counter(t.type for t in tensors)),
        "fallbacks": fallbacks,
        **vision_notes,
        **tokenizer_notes,
        "integers": _integers(weights, params),
    }
    if chosen:
        notes["allocation"] = chosen.facts
    if errors:
        notes["integers"] = "gptq, on llama.cpp's types"
        notes["errors"] = errors
    if runs_own_graph:
        notes["construction"] = (
            "llama.cpp has no graph of this model: edgemed's own runs on its tensor library, and"
            " llama.cpp's programs cannot open the file"
        )
    if centred:
        notes["centred"] = True
        notes["construction"] = (
            "the mean is taken out of everything added to the residual stream, so that RMS norms"
            " do; dense layers are equal experts behind a router of zeros"
        )
    if columns:
        notes["imatrix"] = {"source": params.imatrix, "matrices": len(columns)}
    return notes


def _precision(weights: CanonicalWeights, params: Params, chosen: TypeChoice | None) -> str:
    """The precision of an engine as reports name it."""
    if params.from_checkpoint:
        types = {preserved_integers.preserved_type(bits) for bits, _ in weights.packings()}
        return f"{'/'.join(sorted(types))} carried"
    if chosen:
        return f"GGUF {chosen.facts['bits_per_weight']:.2f} bpw"
    return file_type(params).upper()


def _integers(weights: CanonicalWeights, params: Params) -> str:
    """Who chose the integers of an engine that GPTQ on llama.cpp's types did not make."""
    if params.from_checkpoint:
        return "gptq checkpoint"
    if weights.quantization:
        return "llama.cpp, from the gptq checkpoint's rounded weights"
    return "llama.cpp"


def _bytes_per_token(weights: CanonicalWeights, tensors: Sequence[writer.Tensor]) -> float:
    """Weight bytes that one token reads: without embedding rows, and of the experts those it
    chooses.
    """
    embeddings = {"position_embd.weight"}
    if any(tensor.name == "output.weight" for tensor in tensors):
        embeddings.add("token_embd.weight")
    share = 1.0
    if experts := weights.unfolded.experts:
        share = experts.active / experts.count
    total = 0.0
    for tensor in tensors:
        if tensor.name not in embeddings:
            total += tensor.nbytes * (share if "_exps." in tensor.name else 1)
    return total


def build_vision_files(weights: CanonicalWeights, out: Path, params: Params) -> dict[str, Any]:
    """Write what `vision` and `mmproj` ask for. tower_bytes: weight bytes of what the engine itself
    sees with; mmproj_bytes: of a file that only llama.cpp's programs read.
    """
    written = {}
    if params.mmproj or params.vision == "mtmd":
        written["mtmd"] = mmproj.write_mmproj(weights, out, params.mmproj or "f16")
    if params.vision == "onnx":
        written["onnx"] = build_vision(weights, out, OrtDialect(), **TOWERS[params.tower])
    notes = {"tower_bytes": written[params.vision]}
    if "mtmd" in written and params.vision != "mtmd":
        notes["mmproj_bytes"] = written["mtmd"]
    return notes


def file_tensors(
    weights: CanonicalWeights,
    params: Params,
    columns: Mapping[str, np.ndarray],
    chosen: Mapping[str, str] | None = None,
) -> tuple[list[writer.Tensor], dict[str, str]]:
    """Every tensor of the file in order, and which of them could not have the wanted type (tensor
    -> 'wanted -> given').

    chosen: types that override the mixture's. Raises EdgemedError where a type needs an importance
    matrix and there is none.
    """
    d = weights.decoder
    parts = weights.parts
    wanted = file_type(params)
    places = file_layout(weights)
    # As in the other engines of one quantization: embedding rows in float16, only the output matrix
    # in integers.
    apart = params.from_checkpoint and FILE_TYPES[wanted][1] not in FLOATS
    if apart and "lm_head" in parts and "output.weight" not in places:
        places["output.weight"] = TensorSource("lm_head", parts["lm_head"].shape)
    shapes = {t: place.shape for t, place in places.items()}
    types, fallbacks = tensor_types(
        Model(
            shapes,
            d.layers,
            d.heads // d.kv_heads,
            bool(columns),
        ),
        wanted,
    )
    packed = {
        t: preserved_bits(weights, p)
        for t, p in places.items()
        if params.from_checkpoint
        and t.endswith("weight")
        and p.part
        and parts[p.part].kind == "matrix"
        and p.part != "lm_head"
    }
    if apart:
        types["token_embd.weight"] = "F16"
    types |= {t: preserved_integers.preserved_type(bits) for t, bits in packed.items()} | dict(
        chosen or {}
    )
    fallbacks = {t: change for t, change in fallbacks.items() if change.endswith(types[t])}
    blind = [
        t
        for t in types
        if t not in packed and needs_imatrix(t, types[t], wanted) and places[t].part not in columns
    ]
    if blind:
        raise EdgemedError(
            f"type {wanted} needs an importance matrix (first for {blind[0]}: {types[blind[0]]})",
            "Give imatrix: a calibration card's name, or choose q3_k_s, iq4_xs or larger",
        )
    reader = TensorReader(weights)
    tensors = [
        writer.Tensor(
            t,
            place.shape,
            types[t],
            partial(reader.read, place, t.endswith("bias"), packed.get(t, 0)),
            t in packed,
            _columns(columns, place) if t.endswith("weight") else None,
        )
        for t, place in places.items()
    ]
    factors = rescaled(d)
    if factors is not None:
        tensors.insert(0, writer.Tensor(ROPE, factors.shape, "F32", factors.copy))
    return tensors, fallbacks


def _budgeted(
    weights: CanonicalWeights, params: Params, columns: Mapping[str, np.ndarray], out: Path
) -> TypeChoice:
    # Here and not at the top, because a device opens engines without torch.
    from edgemed.gguf import bit_allocation

    places = file_layout(weights)
    shapes = {t: place.shape for t, place in places.items()}
    types, _ = tensor_types(
        Model(
            shapes,
            weights.decoder.layers,
            weights.decoder.heads // weights.decoder.kv_heads,
            bool(columns),
        ),
        file_type(params),
    )
    return bit_allocation.choose_types(
        weights,
        _calibration(weights, params),
        places,
        types,
        columns,
        params.budget or "",
        params.rounding == "gptq",
        out,
    )


def _rounded(
    weights: CanonicalWeights,
    params: Params,
    columns: Mapping[str, np.ndarray],
    tensors: list[writer.Tensor],
    out: Path,
) -> AbstractContextManager[tuple[list[writer.Tensor], dict[str, Any]]]:
    """The tensors to write and what rounding them changed; by llama.cpp's own routine they are
    rounded as they are written.
    """
    if params.rounding == "nearest":
        return nullcontext((tensors, {}))
    from edgemed.gguf import gptq

    key = hashing.digest(
        {
            "params": asdict(params),
            "inputs": weights.checkpoint.hashes() | inputs(params),
            "versions": store.versions(),
        }
    )
    places = file_layout(weights)
    samples = _calibration(weights, params)
    return gptq.gptq_tensors(weights, samples, places, tensors, columns, out, key)


def _calibration(
    weights: CanonicalWeights, params: Params
) -> list[tuple[list[int], ImageEmbeddings | None]]:
    from edgemed.data.image_text_windows import calibration_samples

    return calibration_samples(
        weights, params.imatrix or "", params.samples, min(params.length, weights.decoder.context)
    )


def _columns(columns: Mapping[str, np.ndarray], place: TensorSource) -> np.ndarray | None:
    return (
        np.stack([columns[part] for part in place.stack])
        if place.stack and columns
        else columns.get(place.part)
    )


def _importance(weights: CanonicalWeights, params: Params) -> dict[str, np.ndarray]:
    if params.imatrix is None:
        return {}
    from edgemed.quantization import importance_matrix

    if params.imatrix.endswith(".npz"):
        columns = importance_matrix.load(Path(params.imatrix))
    else:
        columns = importance_matrix.importance(weights, _calibration(weights, params))
    for name, part in weights.parts.items():
        if (
            name.startswith("layers.")
            and part.kind == "matrix"
            and (name not in columns or columns[name].shape != part.shape[1:])
        ):
            raise EdgemedError(
                f"{params.imatrix} has no importance of {part.shape[1]} columns for {name}",
                "It was made for another model",
            )
    return columns


def write_metadata(
    writer: Any, weights: CanonicalWeights, wanted: str, facts: TokenizerFacts | None
) -> None:
    """GGUF metadata: origin, the graph's numbers and the tokenizer. facts: None for a model of
    random weights, to which there is none.
    """
    checkpoint = weights.checkpoint
    d = (
        replace(weights.decoder, norm="rmsnorm")
        if isinstance(weights, Centred)
        else weights.decoder
    )
    if own_graph(weights.family, weights.unfolded):
        numbers = asdict(d)
        # Where a text ends is the session's matter, not the graph's.
        del numbers["stop_tokens"]
        writer.add_string(KEY, json.dumps(numbers))
    metadata.describe_origin(
        writer,
        model_name(checkpoint),
        parameters(weights),
        front_licence(checkpoint.path),
    )
    metadata.describe_decoder(writer, d, FILE_TYPES[wanted][0])
    if facts is not None:
        tokenizer_metadata.describe_tokenizer(writer, facts, d.vocab)
    elif weights.vision:
        metadata.describe_bytes(writer, d.vocab)
    else:
        # llama.cpp takes token ids all the same.
        writer.add_tokenizer_model("no_vocab")


def model_name(checkpoint: Checkpoint) -> str:
    """What the model is called: as config.json has it, but never a path of somebody's machine; else
    its directory.
    """
    name = str(checkpoint.config.get("_name_or_path") or "")
    if not name or name.startswith((".", "/", "~")):
        return Path(name or checkpoint.path.resolve()).name
    return name


def _tokenizer(weights: CanonicalWeights) -> TokenizerFacts | None:
    checkpoint = weights.checkpoint
    if checkpoint.random_weights:
        return None
    text = {**checkpoint.config, **(checkpoint.config.get("text_config") or {})}
    tokenizer = open_tokenizer(checkpoint.path, weights.decoder.vocab)
    return tokenizer_metadata.tokenizer_facts(checkpoint.path, tokenizer, text)


def _check_tokenizer(file: Path, facts: TokenizerFacts, allowed: bool) -> dict[str, Any]:
    """What the manifest says of the file's tokenizer, which is compared with llama.cpp's reading.

    Raises EdgemedError where they differ and that is not allowed.
    """
    problem = tokenizer_metadata.difference(file, facts)
    notes: dict[str, Any] = {"pre": facts.pre, "same_as_llama_cpp": problem is None}
    if facts.tokenizer.normalizer is not None:
        notes["normalizer"] = "llama.cpp takes texts as they are, characters not composed"
    if problem is None:
        return notes
    if not allowed:
        raise EdgemedError(
            f"llama.cpp's programs would read texts otherwise than the tokenizer: {problem}",
            "edgemed's own engine reads tokenizer.json and is right; to write the file for it alone"
            " set tokenizer: edgemed",
        )
    say(f"tokenizer: only for edgemed's own engine, {problem}")
    return notes | {"difference": problem}


def open(engine: Engine, threads: int | None) -> LlamaSession | GgmlSession:
    return (
        GgmlSession(engine, threads)
        if (engine.path / GRAPH).is_file()
        else LlamaSession(engine, threads)
    )


def open_vision(engine: Engine, threads: int | None) -> VisionEncoder:
    """The vision encoder the engine was exported with: ONNX Runtime's or libmtmd's. Raises
    EdgemedError where the model reads text only.
    """
    if engine.params.get("vision") == "mtmd":
        return mtmd_vision.MtmdVisionEncoder(engine, threads)
    return OnnxVisionEncoder(engine, threads)


def vision_tolerance(engine: Engine) -> tuple[str, float]:
    """The precision of an engine's tower and projector, and the limit on their relative error."""
    if engine.params.get("vision") == "mtmd":
        precision = engine.params["mmproj"] or "f16"
        return precision, mtmd_vision.TOLERANCES[precision]
    precision = engine.params["tower"]
    return precision, TOLERANCES[precision]


def engine_bytes(weights: CanonicalWeights, precision: str) -> Size:
    """The tensors of a GGUF file, by llama.cpp's own rules for which matrix gets which type; a
    vision tower lies in a file of its own.
    """
    weights = CanonicalWeights(weights.checkpoint, sum_experts=True)
    d = weights.unfolded
    shapes = {
        tensor: place.shape
        for tensor, place in layout(weights.family, d, weights.parts).items()
        if tensor.endswith("weight") and len(place.shape) > 1
    }
    elements = {tensor: math.prod(shape) for tensor, shape in shapes.items()}
    types, _ = tensor_types(Model(shapes, d.layers, d.heads // d.kv_heads), precision)
    bits = {tensor: GGUF_BITS[types[tensor]] * elements[tensor] for tensor in elements}
    # Norms, biases and the few rows of a classification head are float32.
    rest = 0
    for name, (kind, weight, bias) in sizes(weights).items():
        if not name.startswith("vision."):
            rest += bias
            if kind == "norm" or name == "head":
                rest += weight
    layers = [tensor for tensor in elements if tensor.startswith("blk.")]
    head = "output.weight" if "output.weight" in types else "token_embd.weight"
    copy = sum(bits[tensor] for tensor in layers if types[tensor] in REPACKED)
    return Size(
        round((sum(bits.values()) + 32 * rest) / 8),
        layer_bits=sum(bits[tensor] for tensor in layers)
        / sum(elements[tensor] for tensor in layers),
        head_bits=GGUF_BITS[types[head]],
        copy=round(copy / 8),
        tower=4 * choices.vision_parameters(weights),
    )


def inspected_sizes(weights: CanonicalWeights) -> Iterator[tuple[str, tuple[int, int]]]:
    """The row of `edgemed inspect`: (precision, (weight bytes with a vision tower beside the file,
    bytes of a float16 KV cache at the full context)).
    """
    size = engine_bytes(weights, "q4_k_m")
    yield "Q4_K_M", (size.total + size.tower, choices.kv_cache(weights.unfolded, 2))


def unsuitable(device: Device) -> str | None:
    """Why these engines are not planned on a device, or None."""
    return None


def runs_on_cpu(weights: CanonicalWeights) -> str | None:
    """Why an engine of this model runs on the CPU of a device with a GPU, or None."""
    if own_graph(weights.family, weights.unfolded):
        return "edgemed's own ggml graph of this model runs on the CPU, whose speed is not known"
    return None


def build_bytes(weights: CanonicalWeights, size: Size) -> float:
    """Memory of a build."""
    return choices.streamed_build_bytes(weights)


def tower_elsewhere(device: Device) -> str | None:
    """A note where the vision tower runs on the CPU of a device whose GPU runs the decoder, or
    None: nothing is known of such a CPU's speed.
    """
    if not device.compute_capability:
        return None
    return (
        "llama.cpp engines see through ONNX Runtime on the CPU, whose speed there is not known:"
        " the time of the vision tower is missing from every first token."
    )


def plan_notes(device: Device) -> list[str]:
    """What a person must know to read a plan of these engines."""
    if not device.compute_capability:
        return []
    return ["llama.cpp on CUDA: one published decoding speed stands behind this, and no prefill."]


def recipe_params(device: Device) -> dict[str, Any]:
    """Parameters that a recipe for this device needs besides those of the choice."""
    return {}


def quantize_group(bits: int) -> int:
    """The group of the quantize step that a planned recipe puts before these engines."""
    return choices.GROUP


def self_check() -> str:
    """Decode a long prompt with tiny quantized models in a process of its own; a sentence saying
    that it works.

    Raises EdgemedError where llama.cpp crashes or answers nonsense: gcc 12 builds with AMX die on
    the first quantized prompt.
    """
    need("gguf", "build")
    version = library.runtime().__version__
    with tempfile.TemporaryDirectory() as folder:
        for wanted in PROBES:
            write_probe(Path(folder), wanted)
        command = [
            sys.executable,
            "-c",
            "import sys; from edgemed.targets.llamacpp import run_probes; run_probes(sys.argv[1])",
            folder,
        ]
        done = run_child(command)
    reached = done.stdout.split()
    if done.returncode < 0 or len(reached) < 2 * len(PROBES):
        how = (
            f"dies with signal {-done.returncode}"
            if done.returncode < 0
            else f"fails ({(done.stderr.strip().splitlines() or ['no message'])[-1]})"
        )
        raise EdgemedError(
            f"llama-cpp-python {version} {how} on a quantized prompt of {PROBE_TOKENS} tokens"
            f" ({reached[-1] if reached else 'loading'})",
            REBUILD,
        )
    return (
        f"llama-cpp-python {version} decodes quantized prompts of {PROBE_TOKENS} tokens"
        f" ({', '.join(PROBES)})"
    )


PROBES = ("q4_0", "q8_0", "q4_k_m")
PROBE_TOKENS = 384


def write_probe(folder: Path, wanted: str) -> Engine:
    """A tiny random engine; numpy and gguf suffice. The first family lends its graph."""
    family = next(iter(all_families().values()))
    d = replace(
        family.decoder(family.reference_config, {}),
        hidden=256,
        layers=2,
        heads=4,
        kv_heads=4,
        head_dim=64,
        ffn=1024,
        vocab=512,
        context=512,
    )
    shapes = {t: place.shape for t, place in layout(family, d, family.parts(d)).items()}
    types, _ = tensor_types(Model(shapes, d.layers), wanted)
    random = np.random.default_rng(0)
    tensors = [
        writer.Tensor(
            t,
            s,
            types[t],
            partial(_noise, random, s),
        )
        for t, s in shapes.items()
    ]
    (folder / wanted).mkdir()

    def described(writer: Any) -> None:
        metadata.describe_decoder(writer, d, FILE_TYPES[wanted][0])
        writer.add_tokenizer_model("no_vocab")

    writer.write_gguf(folder / wanted / FILE, family.gguf_arch, described, tensors, threads=1)
    return probe_engine(folder, wanted)


def _noise(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return random.normal(0, 0.05, shape)


def probe_engine(folder: Path, wanted: str) -> Engine:
    return Engine(
        folder / wanted,
        wanted,
        "llamacpp",
        "",
        "lm",
        512,
        512,
        512,
        wanted.upper(),
        0,
        None,
        True,
        {**asdict(Params()), "type": wanted},
    )


def run_probes(folder: str) -> None:
    """What the child process of self_check does: name each type before and after decoding it."""
    for wanted in PROBES:
        print(wanted, flush=True)
        session = open(probe_engine(Path(folder), wanted), None)
        scores = session.prefill([i % 512 for i in range(PROBE_TOKENS)])
        if not np.isfinite(scores).all():
            raise RuntimeError(f"{wanted}: the scores are not finite")
        print("decoded", flush=True)
        session.close()
