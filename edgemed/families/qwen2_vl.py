"""Qwen2-VL and with it MedVLM-R1: Qwen2's text model with positions of three parts, and a vision
tower for images of any size.

Rotary positions of an image's features count time, row and column in different pairs of each head;
text counts all three alike. Both layouts of the keys that exist (visual.* beside model.*, and
model.visual.* beside model.language_model.*) are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from edgemed.errors import EdgemedError
from edgemed.models.architecture import Architecture, DecoderConfig, ParamSpec, VisionConfig
from edgemed.models.conversation import CHATML, user_turn
from edgemed.models.family_helpers import (
    inverse_frequencies,
    require,
    size_in,
    usual_decoder,
    usual_parts,
)

TEXT = ("model.", "model.language_model.")
TOWER = ("visual.", "model.visual.")


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text model's numbers: in a mapping of their own in recent configs, beside the others in
    the published one.
    """
    return {**config, **config.get("text_config", {})}


def decoder(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> DecoderConfig:
    text = text_config(config)
    require(text, {"hidden_act": "silu", "use_sliding_window": False})
    head_dim = size_in(text, "hidden_size") // size_in(text, "num_attention_heads")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    sections = rope.get("mrope_section")
    if not sections or 2 * sum(sections) != head_dim:
        raise EdgemedError(
            f"config.json: mrope_section {sections} does not divide a head of {head_dim}",
            "The config is damaged",
        )
    axes: list[int] = []
    for axis, pairs in enumerate(sections):
        axes += [axis] * pairs
    # The published config calls the rope type 'mrope'. Its frequencies are the default ones.
    plain = {
        **text,
        "rope_scaling": {},
        "rope_parameters": {**rope, "rope_type": "default", "type": "default"},
    }
    return usual_decoder(
        plain,
        shapes={},
        norm="rmsnorm",
        norm_eps=text.get("rms_norm_eps", 1e-6),
        activation="silu",
        gated=True,
        tied=text.get("tie_word_embeddings", config.get("tie_word_embeddings", False)),
        rope_axes=tuple(axes),
    )


def parts(d: DecoderConfig) -> dict[str, ParamSpec]:
    return usual_parts(
        d, {"norm": False, "qkv": True, "o": False, "mlp": False, "lm_head": False}, roots=TEXT
    )


def vision(
    config: Mapping[str, Any],
    preprocessor: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
) -> VisionConfig:
    tower = config["vision_config"]
    width = size_in(tower, "embed_dim")
    heads = size_in(tower, "num_heads")
    size = preprocessor.get("size") or {}
    pixels = (
        preprocessor.get("min_pixels") or size.get("shortest_edge") or 56 * 56,
        preprocessor.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280,
    )
    half = width // heads // 2
    return VisionConfig(
        width=width,
        layers=size_in(tower, "depth"),
        heads=heads,
        ffn=int(width * tower.get("mlp_ratio", 4)),
        norm_eps=1e-6,
        activation=tower.get("hidden_act", "quick_gelu"),
        patch=tower.get("patch_size", 14),
        temporal=tower.get("temporal_patch_size", 2),
        merge=tower.get("spatial_merge_size", 2),
        pixels=pixels,
        frequencies=inverse_frequencies(
            half, tower.get("rope_parameters", {}).get("rope_theta", 10000.0)
        ),
        projector_hidden=width * tower.get("spatial_merge_size", 2) ** 2,
        projector_norm=True,
        token=size_in(config, "image_token_id"),
        before=(size_in(config, "vision_start_token_id"),),
        after=(size_in(config, "vision_end_token_id"),),
        mean=tuple(preprocessor.get("image_mean") or (0.48145466, 0.4578275, 0.40821073)),
        std=tuple(preprocessor.get("image_std") or (0.26862954, 0.26130258, 0.27577711)),
    )


def vision_parts(v: VisionConfig, d: DecoderConfig) -> dict[str, ParamSpec]:
    def at(module: str) -> tuple[str]:
        return ("|".join(root + module for root in TOWER),)

    specs = {
        "vision.patch": ParamSpec(
            at("patch_embed.proj"),
            "matrix",
            (v.width, v.patch_size),
            stored_shape=(v.width, 3, v.temporal, v.patch, v.patch),
        )
    }
    for n in range(v.layers):
        name = f"vision.layers.{n}"
        specs |= {
            f"{name}.attn_norm": ParamSpec(
                at(f"blocks.{n}.norm1"),
                "norm",
                (v.width,),
                bias=True,
            ),
            f"{name}.qkv": ParamSpec(
                at(f"blocks.{n}.attn.qkv"),
                "matrix",
                (3 * v.width, v.width),
                bias=True,
            ),
            f"{name}.o": ParamSpec(
                at(f"blocks.{n}.attn.proj"),
                "matrix",
                (v.width, v.width),
                bias=True,
            ),
            f"{name}.mlp_norm": ParamSpec(
                at(f"blocks.{n}.norm2"),
                "norm",
                (v.width,),
                bias=True,
            ),
            f"{name}.up": ParamSpec(
                at(f"blocks.{n}.mlp.fc1"),
                "matrix",
                (v.ffn, v.width),
                bias=True,
            ),
            f"{name}.down": ParamSpec(
                at(f"blocks.{n}.mlp.fc2"),
                "matrix",
                (v.width, v.ffn),
                bias=True,
            ),
        }
    merged = v.width * v.merge**2
    return specs | {
        "vision.projector.norm": ParamSpec(
            at("merger.ln_q"),
            "norm",
            (v.width,),
            bias=True,
        ),
        "vision.projector.first": ParamSpec(
            at("merger.mlp.0"),
            "matrix",
            (v.projector_hidden, merged),
            bias=True,
        ),
        "vision.projector.second": ParamSpec(
            at("merger.mlp.2"),
            "matrix",
            (d.hidden, v.projector_hidden),
            bias=True,
        ),
    }


def chat(text: str, images: int, conversation: str = "") -> str:
    """Qwen2-VL's chat template for one user turn, images first."""
    return user_turn(CHATML, text, images, image="<|vision_start|><|image_pad|><|vision_end|>")


def reasoning(question: str) -> str:
    """MedVLM-R1's question template, to the letter (its README; the blanks at the ends of lines are
    part of it).
    """
    return (
        f"\n    {question} \n    Your task: \n    1. Think through the question step by step,"
        " enclose your reasoning process in <think>...</think> tags. \n    2. Then provide the"
        " correct single-letter choice (A, B, C, D,...) inside <answer>...</answer> tags.\n    3."
        " No extra information or text outside of these tags.\n    "
    )


def answer(text: str) -> str | None:
    """The letter inside the answer tags, as MedVLM-R1 is evaluated: without tags there is no
    answer.
    """
    match = re.search(r"<answer>\s*([A-Z])\s*</answer>", text)
    return match[1] if match else None


FAMILY = Architecture(
    name="qwen2_vl",
    model_types=("qwen2_vl",),
    decoder=decoder,
    parts=parts,
    prefixes=("",),
    ignored=(".rotary_emb.inv_freq",),
    folded=dict,
    gguf_arch="qwen2vl",
    gguf_pre="qwen2",
    gguf_projector="qwen2vl_merger",
    reference_name="medvlm-r1",
    # JZPeterPan/MedVLM-R1 config.json (Qwen2-VL-2B-Instruct's)
    reference_config={
        "model_type": "qwen2_vl",
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_config": {
            "depth": 32,
            "embed_dim": 1280,
            "num_heads": 16,
            "hidden_size": 1536,
            "mlp_ratio": 4,
            "in_channels": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "hidden_act": "quick_gelu",
        },
    },
    auto_classes={"lm": "AutoModelForImageTextToText"},
    vision=vision,
    vision_parts=vision_parts,
    chat=chat,
    several_images=True,
    reasoning=reasoning,
    answer=answer,
    opening="<answer>",
)
