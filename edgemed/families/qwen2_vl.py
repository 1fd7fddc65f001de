"""Qwen2-VL and with it MedVLM-R1: Qwen2's text model with positions of three parts, and a vision
tower for images of any size.

Rotary positions of an image's features count time, row and column in different pairs of each head;
text counts all three alike. Both layouts of the keys that exist (visual.* beside model.*, and
model.visual.* beside model.language_model.*) are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgemed.errors import EdgemedError
from edgemed.models.architecture import Architecture, DecoderConfig, ParamSpec, VisionConfig
from edgemed.models.config_keys import ELSEWHERE, FIXED, HARMLESS, text_keys
from edgemed.models.config_reader import (
    HEADS,
    LAYERS,
    ConfigKeys,
    ConfigReader,
    Section,
    accepted_in,
    short,
)
from edgemed.models.conversation import CHATML, user_turn
from edgemed.models.family_helpers import (
    SILU,
    check_full_attention,
    head_size,
    rotary,
    usual_decoder,
    usual_parts,
)
from edgemed.models.preprocessor_keys import pixel_statistics, preprocessor_keys
from edgemed.models.rope import (
    ROPE_DEFAULTS,
    plain_frequencies,
    read_rope,
    unscaled_rope,
)

TEXT = ("model.", "model.language_model.")
TOWER = ("visual.", "model.visual.")
# transformers' Qwen2VLTextConfig
TEXT_KEYS = text_keys(
    {
        **ROPE_DEFAULTS,
        "rope_theta": 1000000.0,
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": None,
        "intermediate_size": 29568,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 80,
        "layer_types": None,
        "eos_token_id": 151645,
    },
    fixed={"partial_rotary_factor": (1.0,)},
)
# transformers' Qwen2VLConfig
KEYS = ConfigKeys(
    defaults={
        "text_config": None,
        "vision_config": None,
        "image_token_id": 151655,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "tie_word_embeddings": False,
    },
    fixed=FIXED,
    harmless={
        **HARMLESS,
        "video_token_id": "films are not read",
        "vision_token_id": "no prompt has this token",
    },
    elsewhere={**ELSEWHERE, **dict.fromkeys(TEXT_KEYS.defaults, "the text model")},
)
# transformers' Qwen2VLVisionConfig
VISION_KEYS = text_keys(
    {
        "rope_parameters": None,
        "depth": 32,
        "embed_dim": 1280,
        "num_heads": 16,
        "hidden_size": 3584,
        "hidden_act": "quick_gelu",
        "mlp_ratio": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    fixed={"in_channels": (3,), "in_chans": (3,)},
    harmless={
        "spatial_patch_size": "transformers reads patch_size",
        "tie_word_embeddings": "no words are embedded here",
    },
)
# Rows and columns turn alike, which transformers calls axial.
VISION_ROPE_KEYS = ConfigKeys(
    {"rope_theta": 10000.0},
    fixed={"rope_type": ("axial", "default"), "type": ("axial", "default")},
)
PREPROCESSOR_KEYS = preprocessor_keys(
    {
        "min_pixels": None,
        "max_pixels": None,
        "size": None,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
    },
    types=("Qwen2VLImageProcessor",),
)
TOP_ONLY = {*KEYS.defaults, "video_token_id", "vision_token_id"} - {"tie_word_embeddings"}


def readers(config: Mapping[str, Any]) -> tuple[ConfigReader, ConfigReader]:
    """(of the whole config, of the text model's numbers): in a mapping of their own in recent
    configs, beside the others in the published one.

    Raises EdgemedError where both stand there and contradict each other.
    """
    whole = ConfigReader(config, KEYS)
    beside = {key: value for key, value in config.items() if key not in TOP_ONLY}
    if not whole.states("text_config"):
        return whole, ConfigReader(
            Section(beside, whole.place, accepted_in(config, "config.json")), TEXT_KEYS
        )
    text = ConfigReader(whole.section("text_config"), TEXT_KEYS)
    for key in beside.keys() & TEXT_KEYS.defaults.keys():
        if key in ("eos_token_id", "tie_word_embeddings"):
            continue
        if beside[key] is not None and beside[key] != text.raw(key):
            raise EdgemedError(
                f"config.json: {key} {short(beside[key])} and text_config.{key}"
                f" {short(text.raw(key))} contradict each other",
                "Keep the right one; transformers reads text_config",
            )
    return whole, text


def decoder(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> DecoderConfig:
    whole, text = readers(config)
    heads = text.size("num_attention_heads", HEADS)
    head_dim = head_size(text, text.size("hidden_size", 1 << 20), heads)
    # transformers' attention knows no head size of its own, but rotates by one that a config has.
    if text.optional_size("head_dim", HEADS) not in (None, head_dim):
        raise text.unsupported("head_dim", text.raw("head_dim"), (head_dim,))
    context = text.size("max_position_embeddings")
    rope, section = read_rope(text, head_dim, context, extra={"mrope_section": [16, 24, 24]})
    axes = axes_of(section, head_dim)
    d = usual_decoder(
        ConfigReader(without_rope(text), TEXT_KEYS),
        shapes={},
        norm="rmsnorm",
        norm_eps=text.number("rms_norm_eps", most=1.0),
        activation=text.choice("hidden_act", SILU),
        gated=True,
        tied=whole.flag("tie_word_embeddings") or text.flag("tie_word_embeddings"),
        rope_axes=axes,
        **rotary(text, rope, head_dim, text.size("num_hidden_layers", LAYERS)),
    )
    check_full_attention(text, d.layers, d.context)
    # What stands at the top comes first, as in transformers' GenerationConfig.from_model_config.
    if not whole.states("text_config") or config.get("eos_token_id") is None:
        return d
    top = ConfigReader(
        Section({"eos_token_id": config["eos_token_id"]}, whole.place, frozenset()), TEXT_KEYS
    )
    stop_tokens = top.tokens("eos_token_id")
    return replace(d, eos=next(iter(stop_tokens), None), stop_tokens=stop_tokens)


def axes_of(rope: ConfigReader, head_dim: int) -> tuple[int, ...]:
    """DecoderConfig.rope_axes from mrope_section: how many pairs of a head count time, row and
    column.
    """
    sections = rope.raw("mrope_section")
    axes: list[int] = []
    for axis, pairs in enumerate(sections if isinstance(sections, list) else []):
        is_count = isinstance(pairs, int) and not isinstance(pairs, bool)
        if axis > 2 or not is_count or not 0 <= pairs <= head_dim:
            axes = []
            break
        axes += [axis] * pairs
    if 2 * len(axes) != head_dim:
        raise EdgemedError(
            f"{rope.place}mrope_section {short(sections)} does not divide a head of {head_dim}",
            "The config is damaged",
        )
    return tuple(axes)


def without_rope(text: ConfigReader) -> Section:
    """The numbers of a text model without those of its positions, which have three parts here."""
    return Section(
        {key: value for key, value in text.values.items() if key not in ROPE_DEFAULTS},
        text.place,
        text.accepted,
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
    whole, text = readers(config)
    tower = ConfigReader(whole.section("vision_config"), VISION_KEYS)
    hidden = text.size("hidden_size", 1 << 20)
    if tower.size("hidden_size", 1 << 20) != hidden:
        raise tower.malformed("hidden_size", f"the text model's hidden_size {hidden}")
    width = tower.size("embed_dim", 1 << 20)
    heads = tower.size("num_heads", HEADS)
    head_dim = head_size(tower, width, heads)
    if head_dim % 4:
        raise tower.malformed("num_heads", f"a number of heads of 4 n elements; width {width}")
    rope = ConfigReader(tower.section("rope_parameters"), VISION_ROPE_KEYS)
    merge = tower.size("spatial_merge_size", 16)
    patch = tower.size("patch_size", 1024)
    temporal = tower.size("temporal_patch_size", 16)
    images = ConfigReader(preprocessor, PREPROCESSOR_KEYS, "preprocessor_config.json")
    for key, value in (
        ("patch_size", patch),
        ("merge_size", merge),
        ("temporal_patch_size", temporal),
    ):
        if images.raw(key) != value and images.states(key):
            raise images.malformed(key, f"{value}, which the tower has")
    mean, std = pixel_statistics(images)
    return VisionConfig(
        width=width,
        layers=tower.size("depth", LAYERS),
        heads=heads,
        ffn=int(width * tower.number("mlp_ratio", most=64.0)),
        norm_eps=1e-6,
        activation=tower.choice("hidden_act", {"quick_gelu": "quick_gelu", "gelu": "gelu"}),
        patch=patch,
        temporal=temporal,
        merge=merge,
        pixels=pixels(images),
        frequencies=plain_frequencies(head_dim // 2, rope.number("rope_theta", 1.0)),
        projector_hidden=width * merge**2,
        projector_norm=True,
        token=whole.size("image_token_id", least=0),
        before=(whole.size("vision_start_token_id", least=0),),
        after=(whole.size("vision_end_token_id", least=0),),
        mean=mean,
        std=std,
    )


def pixels(images: ConfigReader) -> tuple[int, int]:
    """(least, most) pixels of an image: min_pixels and max_pixels, or transformers 5's size."""
    edges = ConfigReader(
        images.section("size"),
        ConfigKeys({"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}),
    )
    limits = []
    for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        holder, name = (images, key) if images.states(key) else (edges, edge)
        limits.append(holder.size(name, 1 << 30))
    if limits[0] > limits[1]:
        raise EdgemedError(
            f"{images.place}min_pixels {limits[0]} is more than max_pixels {limits[1]}",
            "The file is damaged",
        )
    return limits[0], limits[1]


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
    folded=unscaled_rope,
    config_keys={
        "Qwen2VLConfig": KEYS,
        "Qwen2VLTextConfig": TEXT_KEYS,
        "Qwen2VLVisionConfig": VISION_KEYS,
    },
    gguf_arch="qwen2vl",
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
