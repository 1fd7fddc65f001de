"""LLaVA 1.5 and its medical descendants (LLaVA-Med, HuatuoGPT-Vision): CLIP, a two-layer projector,
and Llama, Mistral or Qwen2 as text model.

Read in transformers' layouts, old and new, and in the authors' own, where config.json knows no
<image> token: there an image's place has the first id outside the vocabulary. The text model is its
own family's, found at another place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgemed.errors import EdgemedError
from edgemed.models.architecture import (
    Architecture,
    DecoderConfig,
    ParamSpec,
    VisionConfig,
    all_families,
)
from edgemed.models.clip_vision import MARKER, clip_parts, clip_vision, tower_numbers
from edgemed.models.conversation import CHATML, VICUNA, ConversationForm, user_turn
from edgemed.models.family_helpers import relocated, require, size_in

TOWER = (
    "vision_tower.vision_model.",
    "vision_tower.",
    "model.vision_tower.vision_model.",
    "model.vision_tower.",
)
ORIGINAL = ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower.vision_tower.")
PROJECTOR = (
    "multi_modal_projector.linear_1|model.multi_modal_projector.linear_1|model.mm_projector.0",
    "multi_modal_projector.linear_2|model.multi_modal_projector.linear_2|model.mm_projector.2",
)
# Longest match first: the authors' layout has the text model's own names.
TEXT = {
    "model.": ("language_model.model.", "model.language_model.", "model."),
    "lm_head": ("language_model.lm_head", "lm_head"),
}
# text model -> the family that computes it, and what transformers takes where config.json is silent
# (LlamaConfig, MistralConfig, Qwen2Config): published configs of this layout hold only what differs
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "vocab_size": 32000,
            "max_position_embeddings": 2048,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "mistral": (
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "qwen2": (
        "qwen2",
        {
            "hidden_size": 4096,
            "intermediate_size": 22016,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 151936,
            "max_position_embeddings": 32768,
        },
    ),
}
# model_type of the authors' layout -> text model; its first releases said only 'llava'
AUTHORS = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
    "llava_qwen2": "qwen2",
}
HUATUO = "huatuo"
# mistral_instruct of microsoft/LLaVA-Med's llava/conversation.py, and
# FreedomIntelligence/HuatuoGPT-Vision's cli.py
FORMS = {
    "vicuna": VICUNA,
    "mistral": ConversationForm(before="[INST] ", after=" [/INST]"),
    "chatml": CHATML,
    HUATUO: ConversationForm(before="<|user|>\n", after="\n<|assistant|>\n"),
}


def authors(config: Mapping[str, Any]) -> bool:
    """Whether a config is of the authors' own layout: the text model's numbers stand beside the
    others.
    """
    return "text_config" not in config


def text_model(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(kind of text model, its numbers). Raises EdgemedError for one that is not supported."""
    if authors(config):
        return AUTHORS[config["model_type"]], dict(config)
    text = config["text_config"]
    kind = text.get("model_type", "llama")
    if kind not in MODELS:
        raise EdgemedError(
            f"config.json: a text model of type '{kind}' is not supported",
            f"Known: {', '.join(MODELS)}",
        )
    tied = text.get("tie_word_embeddings") or config.get("tie_word_embeddings", False)
    return kind, {**MODELS[kind][1], **text, "tie_word_embeddings": tied}


def decoder(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> DecoderConfig:
    kind, text = text_model(config)
    config_of_text = all_families()[MODELS[kind][0]].decoder(text, {})
    window = text.get("sliding_window") if kind == "mistral" else None
    if not window:
        return config_of_text
    # Up to the length of its window, sliding attention is full attention. Beyond it this graph
    # would compute something else than the model.
    return replace(config_of_text, context=min(config_of_text.context, window))


def text_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """transformers knows no model of the authors' layout, but reads its text model, whose tensors
    have their usual names.
    """
    if not authors(config):
        return None
    kind, text = text_model(config)
    return {**text, "model_type": kind}


def variant(config: Mapping[str, Any]) -> Architecture:
    """This family with the parts and the GGUF names of the text model that a config asks for."""
    text = all_families()[MODELS[text_model(config)[0]][0]]

    def parts(d: DecoderConfig) -> dict[str, ParamSpec]:
        return relocated(text.parts(d), TEXT)

    return replace(
        FAMILY,
        parts=parts,
        gguf_arch=text.gguf_arch,
        gguf_interleaved=text.gguf_interleaved,
        gguf_any_head=text.gguf_any_head,
    )


def parts(d: DecoderConfig) -> dict[str, ParamSpec]:
    return variant(REFERENCE).parts(d)


def vision(
    config: Mapping[str, Any],
    preprocessor: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
) -> VisionConfig:
    kind, text = text_model(config)
    hidden = size_in(text, "hidden_size")
    form = conversation(config, kind)
    start: tuple[int, ...] = ()
    if form in ("vicuna", "mistral") and isinstance(text.get("bos_token_id"), int):
        start = (text["bos_token_id"],)
    common: dict[str, Any] = {
        "projector_hidden": hidden,
        "marker": MARKER,
        "conversation": form,
        "start": start,
    }
    if authors(config):
        require(
            config,
            {
                "mm_projector_type": "mlp2x_gelu",
                "mm_vision_select_feature": "patch",
                "mm_use_im_start_end": False,
                "tune_mm_vision_resampler": False,
            },
        )
        ratio = config.get("image_aspect_ratio") or "square"
        if ratio not in ("pad", "square"):
            raise EdgemedError(
                f"config.json: image_aspect_ratio '{ratio}' is not supported", "Known: pad, square"
            )
        tower = tower_numbers(
            None, shapes, (*ORIGINAL, *TOWER), config.get("mm_vision_tower") or ""
        )
        # HuatuoGPT-Vision's code pads whatever config.json says.
        return clip_vision(
            tower,
            preprocessor,
            config.get("mm_vision_select_layer", -2),
            ratio == "pad" or form == HUATUO,
            token=size_in(config, "vocab_size"),
            **common,
        )
    require(config, {"projector_hidden_act": "gelu", "vision_feature_select_strategy": "default"})
    token = config.get("image_token_index", config.get("image_token_id", 32000))
    return clip_vision(
        tower_numbers(config.get("vision_config") or {}, shapes, TOWER),
        preprocessor,
        config.get("vision_feature_layer", -2),
        False,
        token=token,
        **common,
    )


def vision_parts(v: VisionConfig, d: DecoderConfig) -> dict[str, ParamSpec]:
    return clip_parts(v, d, (*TOWER, *ORIGINAL), PROJECTOR)


def conversation(config: Mapping[str, Any], kind: str) -> str:
    """The conversation form a checkpoint was trained on: 'conversation' in config.json where a
    person put it there, else what follows from the model's origin.

    kind: of text model. Raises EdgemedError for a form that is not known.
    """
    form = config.get("conversation")
    if form is not None and form not in FORMS:
        raise EdgemedError(
            f"config.json: conversation '{form}' is not known", f"Known: {', '.join(FORMS)}"
        )
    if form:
        return form
    origin = f"{config.get('_name_or_path', '')} {config['model_type']}".lower()
    if HUATUO in origin or "llava_qwen2" in origin:
        return HUATUO
    return {"llama": "vicuna", "mistral": "mistral", "qwen2": "chatml"}[kind]


def chat(text: str, images: int, conversation: str) -> str:
    """One user turn, images first, each on a line of its own; what starts a prompt as a token
    (VisionConfig.start) is not part of the text.
    """
    return user_turn(FORMS[conversation], text.strip(), images, image=f"{MARKER}\n")


# FreedomIntelligence/HuatuoGPT-Vision-7B in transformers' layout: Qwen2-7B's and
# CLIP-ViT-L/14-336's published config.json
REFERENCE: dict[str, Any] = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "image_token_index": 151646,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "tie_word_embeddings": False,
    "conversation": HUATUO,
    "text_config": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "patch_size": 14,
        "image_size": 336,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": 768,
    },
}

FAMILY = Architecture(
    name="llava",
    model_types=tuple(AUTHORS),
    decoder=decoder,
    parts=parts,
    prefixes=("",),
    ignored=(".rotary_emb.inv_freq", ".embeddings.position_ids"),
    folded=dict,
    gguf_arch="qwen2",
    reference_name="huatuogpt-vision-7b",
    reference_config=REFERENCE,
    auto_classes={"lm": "AutoModelForImageTextToText"},
    variant=variant,
    text_config=text_config,
    vision=vision,
    vision_parts=vision_parts,
    chat=chat,
)
