"""Writes a vision tower and its projector as the GGUF file that llama.cpp's programs call mmproj.
A llama.cpp engine with it is a vision model without ONNX Runtime.

Names, types and metadata are those of llama.cpp's own converter (conversion/qwenvl.py and
clip-impl.h of the version inside llama-cpp-python 0.3.36); the file is written tensor by tensor
like the text model's.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgemed.errors import need
from edgemed.gguf import writer
from edgemed.gguf.quant_types import FILE_TYPES
from edgemed.gguf.tensor_map import TensorReader, TensorSource
from edgemed.models.rope import plain_frequencies

if TYPE_CHECKING:
    from edgemed.models.architecture import VisionConfig
    from edgemed.models.weights import CanonicalWeights

FILE = "mmproj.gguf"
ARCH = "clip"
# canonical part -> llama.cpp's tensor
LAYER = {
    "attn_norm": "ln1",
    "qkv": "attn_qkv",
    "o": "attn_out",
    "mlp_norm": "ln2",
    "up": "ffn_up",
    "down": "ffn_down",
}
AROUND = {"projector.norm": "v.post_ln", "projector.first": "mm.0", "projector.second": "mm.2"}
# The convolution over patches of a still image: one tensor for each of the two frames it is stacked
# in.
PATCH = ("v.patch_embd.weight", "v.patch_embd.weight.1")
# llama.cpp asks every tower for the side of its images; of Qwen2-VL's, which takes any, its
# converter says this and nothing reads it.
SIDE = 560


def mmproj_refused(weights: CanonicalWeights) -> str | None:
    """Why this model's tower cannot be an mmproj file that llama.cpp computes rightly, or None."""
    v = weights.vision
    if not v:
        return "this model reads text only, so there is nothing to write an mmproj file from"
    if not v.frequencies:
        return (
            "llama.cpp computes CLIP towers wrongly: it puts the class token behind the patches and"
            " shifts their positions (llama.cpp issue 25814); use vision=onnx, which is exact"
        )
    if not weights.family.gguf_projector:
        return f"llama.cpp knows no projector of family {weights.family.name}; use vision=onnx"
    if missing := [name for name, holds in built_in(v).items() if not holds]:
        return (
            f"llama.cpp's {weights.family.gguf_projector} graph needs {', '.join(missing)}; use"
            " vision=onnx"
        )
    return None


def built_in(v: VisionConfig) -> dict[str, bool]:
    """What clip_graph_qwen2vl of llama.cpp has built in -> whether it holds of this tower."""
    plain = plain_frequencies(v.width // v.heads // 2, 1e4)
    return {
        "merge 2": v.merge == 2,
        "temporal 2": v.temporal == 2,
        "activation quick_gelu": v.activation == "quick_gelu",
        "no norm before the first layer": not v.pre_norm,
        "a norm before the projector": v.projector_norm,
        "images of any size": not v.size,
        "rotary theta 10000": np.allclose(v.frequencies, plain),
        # It takes up and down for swapped where their shapes cannot tell.
        "an MLP wider than its input": v.ffn != v.width,
    }


def write_mmproj(
    weights: CanonicalWeights, out: Path, wanted: Literal["f32", "f16", "q8_0"]
) -> int:
    """Write mmproj.gguf into `out`; returns its weight bytes. wanted: type of the matrices; norms
    and biases stay float32.
    """
    tensors = vision_tensors(weights, wanted)
    writer.write_gguf(
        out / FILE, ARCH, lambda writer: write_vision_metadata(writer, weights, wanted), tensors
    )
    return sum(t.nbytes for t in tensors)


def vision_tensors(weights: CanonicalWeights, wanted: str) -> list[writer.Tensor]:
    """Every tensor of the file in order.

    The patch convolution is float16 in an f16 file, else float32. A row that Q8_0 does not divide
    is float16.
    """
    reader = TensorReader(weights)
    v = weights.require_vision()
    kind = FILE_TYPES[wanted][1]
    tensors = []
    for frame, name in enumerate(PATCH):
        tensors.append(
            writer.Tensor(
                name=name,
                shape=(v.width, 3, v.patch, v.patch),
                type="F16" if kind == "F16" else "F32",
                read=partial(_frame, weights, frame),
            )
        )
    for n in range(v.layers):
        for last, tensor in LAYER.items():
            part = f"vision.layers.{n}.{last}"
            stem = f"v.blk.{n}.{tensor}"
            if last == "qkv":
                for number, letter in enumerate("qkv"):
                    rows = TensorSource(part, (v.width, v.width), number * v.width)
                    tensors += _pair(reader, stem.replace("qkv", letter), rows, kind)
            else:
                tensors += _whole_part(reader, stem, part, kind)
    for last, stem in AROUND.items():
        tensors += _whole_part(reader, stem, f"vision.{last}", kind)
    return tensors


def _whole_part(reader: TensorReader, stem: str, part: str, kind: str) -> list[writer.Tensor]:
    """Weight and bias of a canonical part that is one tensor of the file."""
    spec = reader.weights.parts[part]
    return _pair(
        reader, stem, TensorSource(part, spec.shape), "F32" if spec.kind == "norm" else kind
    )


def _pair(reader: TensorReader, stem: str, source: TensorSource, kind: str) -> list[writer.Tensor]:
    """Weight, in type `kind` where its blocks divide a row, and bias."""
    if kind == "Q8_0" and source.shape[-1] % 32:
        kind = "F16"
    weight = writer.Tensor(
        name=f"{stem}.weight",
        shape=source.shape,
        type=kind,
        read=partial(reader.read, source, False, 0),
    )
    bias = writer.Tensor(
        name=f"{stem}.bias",
        shape=source.shape[:1],
        type="F32",
        read=partial(reader.read, source, True, 0),
    )
    return [weight, bias]


def _frame(weights: CanonicalWeights, frame: int) -> np.ndarray:
    """The patch convolution's weight for one frame, float32 [width, 3, patch, patch]."""
    v = weights.require_vision()
    weight = weights.matrix("vision.patch").dense().numpy()
    by_frame = weight.reshape(v.width, 3, v.temporal, v.patch, v.patch)
    return np.ascontiguousarray(by_frame[:, :, frame])


def write_vision_metadata(writer: Any, weights: CanonicalWeights, wanted: str) -> None:
    """GGUF metadata: the tower's numbers."""
    gguf = need("gguf", "build")
    v = weights.require_vision()
    checkpoint = weights.checkpoint
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_name(str(checkpoint.config.get("_name_or_path") or checkpoint.path.name))
    writer.add_file_type(FILE_TYPES[wanted][0])
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(weights.family.gguf_projector)
    writer.add_vision_projection_dim(weights.decoder.hidden)
    writer.add_vision_image_size(SIDE)
    writer.add_vision_patch_size(v.patch)
    writer.add_vision_embedding_length(v.width)
    writer.add_vision_feed_forward_length(v.ffn)
    writer.add_vision_block_count(v.layers)
    writer.add_vision_head_count(v.heads)
    writer.add_vision_attention_layernorm_eps(v.norm_eps)
    writer.add_vision_image_mean(list(v.mean))
    writer.add_vision_image_std(list(v.std))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
