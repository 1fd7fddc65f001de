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
from edgemed.models.clip_vision import KEYS as CLIP_KEYS
from edgemed.models.clip_vision import LARGE_336, MARKER, clip_parts, clip_vision, tower_numbers
from edgemed.models.config_keys import CODE, TRAINED, text_keys
from edgemed.models.config_reader import (
    ConfigKeys,
    ConfigReader,
    Section,
    accepted_in,
    short,
)
from edgemed.models.conversation import CHATML, VICUNA, ConversationForm, user_turn
from edgemed.models.family_helpers import relocated
from edgemed.models.rope import unscaled_rope

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
# What must stand in a config of the authors' layout, as in that of a text model alone.
STATED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
ANYRES = "read for image_aspect_ratio anyres only, which is refused"
# transformers' LlavaConfig; `conversation` is edgemed's own, see `conversation`.
KEYS = text_keys(
    {
        "text_config": None,
        "vision_config": None,
        "image_token_index": 32000,
        "vision_feature_layer": -2,
        "tie_word_embeddings": False,
        "eos_token_id": None,
        "conversation": None,
    },
    fixed={
        "projector_hidden_act": ("gelu",),
        "vision_feature_select_strategy": ("default",),
        "multimodal_projector_bias": (True,),
    },
    harmless={
        "image_seq_length": "follows from the tower",
        "ignore_index": TRAINED,
        "vocab_size": "the text model's counts",
        "_vocab_size": "the text model's counts",
        "image_grid_pinpoints": ANYRES,
    },
    aliases={"image_token_id": "image_token_index"},
)
# What the authors' training code adds to the text model's config.
AUTHORS_KEYS = ConfigKeys(
    defaults={
        "model_type": "llava",
        "_name_or_path": "",
        "conversation": None,
        "image_aspect_ratio": None,
        "mm_vision_select_layer": -2,
        "mm_vision_tower": None,
    },
    fixed={
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_vision_select_feature": ("patch",),
        "mm_use_im_start_end": (False,),
        "tune_mm_vision_resampler": (False,),
        "mm_patch_merge_type": ("flat",),
        "mm_resampler_type": (None,),
        "s2": (False,),
    },
    harmless={
        "mm_hidden_size": "the tensors tell",
        "mm_use_im_patch_token": "no prompt has this token",
        "image_token_index": "an image's place has an id outside the vocabulary",
        "s2_scales": "read for s2 only, which is refused",
        "image_grid_pinpoints": ANYRES,
        "image_crop_resolution": ANYRES,
        "image_split_resolution": ANYRES,
        "mm_newline_position": ANYRES,
        "mm_spatial_pool_mode": "films are not read",
        "mm_spatial_pool_stride": "films are not read",
        "mm_spatial_pool_out_channels": "films are not read",
        "add_faster_video": "films are not read",
        "add_time_instruction": "films are not read",
        "faster_token_stride": "films are not read",
        "force_sample": "films are not read",
        "tokenizer_model_max_length": TRAINED,
        "tokenizer_padding_side": TRAINED,
        "freeze_backbone": TRAINED,
        "freeze_mm_mlp_adapter": TRAINED,
        "freeze_mm_vision_resampler": TRAINED,
        "tune_mm_mlp_adapter": TRAINED,
        "unfreeze_mm_vision_tower": TRAINED,
        "pretrain_mm_mlp_adapter": TRAINED,
        "mm_projector_lr": TRAINED,
        "mm_vision_tower_lr": TRAINED,
        "mm_tunable_parts": TRAINED,
        "use_pos_skipping": TRAINED,
        "pos_skipping_range": TRAINED,
        "use_mm_proj": "there is a projector",
        "delay_load": CODE,
        "vision_tower_pretrained": CODE,
    },
)
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


def text_model(config: Mapping[str, Any]) -> tuple[str, Section]:
    """(kind of text model, its numbers). Raises EdgemedError for one that is not supported."""
    if authors(config):
        kind = AUTHORS[config["model_type"]]
        own = AUTHORS_KEYS.names() - {"model_type", "_name_or_path"}
        defaults = {key: value for key, value in MODELS[kind][1].items() if key not in STATED}
        beside = {key: value for key, value in config.items() if key not in own}
        accepted = accepted_in(config, "config.json")
        return kind, Section({**defaults, **beside}, "config.json: ", accepted)
    whole = ConfigReader(config, KEYS)
    section = whole.section("text_config")
    kind = section.get("model_type", "llama")
    if not isinstance(kind, str) or kind not in MODELS:
        raise EdgemedError(
            f"config.json: a text model of type {short(kind)} is not supported",
            f"Known: {', '.join(MODELS)}",
        )
    numbers = {**MODELS[kind][1], **section}
    if whole.flag("tie_word_embeddings"):
        numbers["tie_word_embeddings"] = True
    # What stands at the top comes first, as in transformers' GenerationConfig.from_model_config.
    if whole.states("eos_token_id"):
        numbers["eos_token_id"] = whole.raw("eos_token_id")
    return kind, Section(numbers, section.place, section.accepted)


def decoder(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> DecoderConfig:
    kind, text = text_model(config)
    family = all_families()[MODELS[kind][0]]
    if kind != "mistral":
        return family.decoder(text, {})
    rest = {key: value for key, value in text.items() if key != "sliding_window"}
    d = family.decoder(Section(rest, text.place, text.accepted), {})
    window = ConfigReader(
        Section({"sliding_window": text.get("sliding_window")}, text.place, frozenset()),
        ConfigKeys({"sliding_window": None}),
    ).optional_size("sliding_window")
    if not window:
        return d
    # Up to the length of its window, sliding attention is full attention. Beyond it this graph
    # would compute something else than the model.
    return replace(d, context=min(d.context, window))


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
    d = decoder(config, {})
    form = conversation(config, kind)
    start: tuple[int, ...] = ()
    if form in ("vicuna", "mistral") and isinstance(text.get("bos_token_id"), int):
        start = (text["bos_token_id"],)
    common: dict[str, Any] = {
        "projector_hidden": d.hidden,
        "marker": MARKER,
        "conversation": form,
        "conversation_stated": bool(config.get("conversation")),
        "start": start,
    }
    if authors(config):
        own = AUTHORS_KEYS.names()
        whole = ConfigReader(
            {key: value for key, value in config.items() if key in own}, AUTHORS_KEYS
        )
        ratio = whole.text("image_aspect_ratio") or "square"
        if ratio not in ("pad", "square"):
            raise whole.unsupported("image_aspect_ratio", ratio, ("pad", "square"))
        tower = tower_numbers(None, shapes, (*ORIGINAL, *TOWER), whole.text("mm_vision_tower"))
        # HuatuoGPT-Vision's code pads whatever config.json says.
        return clip_vision(
            tower,
            preprocessor,
            whole.raw("mm_vision_select_layer"),
            ratio == "pad" or form == HUATUO,
            token=d.vocab,
            **common,
        )
    whole = ConfigReader(config, KEYS)
    tower_config: Mapping[str, Any] = whole.section("vision_config")
    if not whole.states("vision_config"):
        # What transformers' LlavaConfig asks for where config.json names no encoder.
        tower_config = LARGE_336
    return clip_vision(
        tower_numbers(tower_config, shapes, TOWER),
        preprocessor,
        whole.raw("vision_feature_layer"),
        False,
        token=whole.size("image_token_index", least=0),
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
    if form is not None and (not isinstance(form, str) or form not in FORMS):
        raise EdgemedError(
            f"config.json: conversation {short(form)} is not known", f"Known: {', '.join(FORMS)}"
        )
    if form:
        return form
    name = config.get("_name_or_path")
    origin = f"{name if isinstance(name, str) else ''} {config['model_type']}".lower()
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
    folded=unscaled_rope,
    config_keys={"LlavaConfig": KEYS, "CLIPVisionConfig": CLIP_KEYS},
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
