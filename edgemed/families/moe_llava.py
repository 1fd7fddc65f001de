"""MoE-LLaVA and its medical descendants MoE-TinyMed and Med-MoE: a small text model some of whose
MLPs are mixtures of experts, behind CLIP.

The medical papers use two architectures under one model_type: four experts of which the best two
are mixed, or the best one beside a meta expert that every token uses. config.json does not tell
them apart; the tensors do. Models without experts (LLaVA-StableLM, LLaVA-Phi) are read too, and
Qwen as a base.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgemed.errors import EdgemedError
from edgemed.models.architecture import (
    Architecture,
    DecoderConfig,
    ExpertsConfig,
    ParamSpec,
    VisionConfig,
    all_families,
)
from edgemed.models.clip_vision import MARKER, clip_parts, clip_vision, tower_numbers
from edgemed.models.config_keys import SPEED, TRAINED, text_keys
from edgemed.models.config_reader import (
    HEADS,
    LAYERS,
    REQUIRED,
    SIZE,
    ConfigKeys,
    ConfigReader,
    Section,
    accepted_in,
    short,
)
from edgemed.models.conversation import VICUNA, user_turn
from edgemed.models.family_helpers import head_size, stop_tokens_of
from edgemed.models.rope import plain_frequencies, unscaled_rope

# model_type -> family of its text model; '' is Qwen (1), which is described here because nothing
# else has it
BASES = {
    "moe_llava_stablelm": "stablelm",
    "llava_stablelm": "stablelm",
    "moe_llava_phi": "phi",
    "llava_phi": "phi",
    "moe_llava_qwen": "",
}
MOST_EXPERTS = 1024
EXPERT = "mlp.deepspeed_moe.experts.deepspeed_experts."
ROUTER = "mlp.deepspeed_moe.gate.wg"
META = "mlp.meta_moe."
STORED = re.compile(
    r"\.(?:layers|h)\.(\d+)\.mlp\.(?:deepspeed_moe\.(?:experts\.deepspeed_experts\.(\d+)\.|gate\.wg\.(bias))|(meta_moe)\.)"
)
# Where edgemed puts what experts share, and what each adds to it ('EXPERT J.up_delta.a'); no other
# program knows these names.
BASE = "mlp.deepspeed_moe.experts.base."
ROOTS = ("model.", "transformer.")
TOWER = tuple(f"{root}image_tower.image_tower.vision_model." for root in ROOTS)
PROJECTOR = (
    "|".join(f"{root}mm_projector.image_spatial_proj.0" for root in ROOTS),
    "|".join(f"{root}mm_projector.image_spatial_proj.2" for root in ROOTS),
)

# What the authors' training code adds to the text model's config.
KEYS = ConfigKeys(
    defaults={
        "model_type": "moe_llava_stablelm",
        "moe": None,
        "vision_config": None,
        "mm_image_tower": None,
        "mm_vision_select_layer": -2,
        "image_aspect_ratio": None,
    },
    fixed={
        "image_projector_type": ("mlp2x_gelu",),
        "mm_vision_select_feature": ("patch",),
        "mm_use_im_start_end": (False,),
        "mm_video_tower": ("",),
        "s2": (False,),
    },
    harmless={
        "mm_hidden_size": "the tensors tell",
        "mm_use_im_patch_token": "no prompt has this token",
        "mm_vision_tower": "mm_image_tower is the encoder's name",
        "s2_scales": "read for s2 only, which is refused",
        "image_grid_pinpoints": "read for another image_aspect_ratio only, which is refused",
        "video_projector_type": "films are not read",
        "video_global_proj": "films are not read",
        "video_temproal_proj": "films are not read",
        "video_spatial_proj": "films are not read",
        "image_global_proj": "the tensors tell",
        "image_spatial_proj": "the tensors tell",
        "tokenizer_model_max_length": TRAINED,
        "tokenizer_padding_side": TRAINED,
        "freeze_backbone": TRAINED,
        "freeze_mm_mlp_adapter": TRAINED,
        "tune_mm_mlp_adapter": TRAINED,
        "pretrain_mm_mlp_adapter": TRAINED,
        "mm_projector_lr": TRAINED,
        "only_lora_ffn": TRAINED,
        "lora": TRAINED,
        "use_mm_proj": "there is a projector",
    },
)
EXPERTS_KEYS = ConfigKeys(
    defaults={
        "moe_enable": True,
        "moe_mode": "sparse",
        "moe_layers_idx": None,
        "num_experts": REQUIRED,
        "top_k_experts": 2,
        "meta_expert": False,
        "shared_delta": None,
    },
    fixed={"use_residual": (False,)},
    harmless={
        "train_modules": TRAINED,
        "router_aux_loss_coef": TRAINED,
        "l_aux_type": TRAINED,
        "l_aux_type_weight": TRAINED,
        "ep_size": "on how many machines it is computed",
        "capacity_factor": TRAINED,
        "eval_capacity_factor": "no token is dropped at the sizes of one device",
        "min_capacity": "no token is dropped at the sizes of one device",
    },
)
# Qwen (1)'s QWenConfig. Dynamic NTK and the logarithmic scale begin beyond seq_length, where the
# context ends.
QWEN_KEYS = text_keys(
    {
        "hidden_size": REQUIRED,
        "num_hidden_layers": REQUIRED,
        "num_attention_heads": REQUIRED,
        "intermediate_size": REQUIRED,
        "vocab_size": REQUIRED,
        "seq_length": REQUIRED,
        "kv_channels": None,
        "rotary_emb_base": 10000.0,
        "layer_norm_epsilon": 1e-6,
        "tie_word_embeddings": False,
        "eos_token_id": None,
    },
    fixed={"no_bias": (True,), "rotary_pct": (1.0,), "scale_attn_weights": (True,)},
    harmless={
        "use_dynamic_ntk": "begins beyond seq_length",
        "use_logn_attn": "begins beyond seq_length",
        "max_position_embeddings": "the context is seq_length",
        "tokenizer_type": "the tokenizer's own files say it",
        "attn_dropout_prob": TRAINED,
        "emb_dropout_prob": TRAINED,
        **dict.fromkeys(
            (
                *("bf16", "fp16", "fp32", "onnx_safe", "softmax_in_fp32"),
                *("use_cache_quantization", "use_cache_kernel"),
            ),
            SPEED,
        ),
    },
)


def text_of(config: Mapping[str, Any]) -> Section:
    """The text model's numbers: what stands beside the keys of the authors' training code."""
    own = KEYS.names() - {"model_type"}
    beside = {key: value for key, value in config.items() if key not in own}
    return Section(beside, "config.json: ", accepted_in(config, "config.json"))


def own_of(config: Mapping[str, Any]) -> ConfigReader:
    """What the authors' training code added."""
    own = KEYS.names()
    return ConfigReader({key: value for key, value in config.items() if key in own}, KEYS)


def decoder(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> DecoderConfig:
    base = BASES[config["model_type"]]
    text = text_of(config)
    dense = all_families()[base].decoder(text, {}) if base else qwen(text)
    moe = ConfigReader(own_of(config).section("moe"), EXPERTS_KEYS)
    if not config["model_type"].startswith("moe_") or not moe.flag("moe_enable"):
        return dense
    return replace(dense, experts=experts(moe, shapes, dense.layers))


def experts(moe: ConfigReader, shapes: Mapping[str, tuple[int, ...]], depth: int) -> ExpertsConfig:
    """The mixture that config.json's `moe` describes, with what only the tensors tell.

    shapes: of the stored tensors. Where there are none ({}), `meta_expert` of the config counts,
    which the authors' configs do not have. With a meta expert one expert is chosen, whatever
    top_k_experts says. DeepSpeed, which computed these models, does not renormalise a single gate.
    Raises EdgemedError where config and tensors describe different experts.
    """
    layers = sparse_layers(moe, depth)
    count = moe.raw("num_experts")
    if isinstance(count, list) and count and all(other == count[0] for other in count):
        count = count[0]
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST_EXPERTS:
        raise EdgemedError(
            f"config.json: moe.num_experts {short(moe.raw('num_experts'))} is not one number of"
            " experts",
            "Every sparse layer must have as many",
        )
    active = moe.raw("top_k_experts")
    if isinstance(active, bool) or not isinstance(active, int) or not 1 <= active <= count:
        raise EdgemedError(
            f"config.json: moe.top_k_experts {short(active)} of {count} experts",
            f"Between 1 and {count} can be chosen",
        )
    shared = _stored(shapes, layers, count) if shapes else moe.flag("meta_expert")
    rank, density = _shared_delta(moe.raw("shared_delta"))
    return ExpertsConfig(
        count=count,
        active=1 if shared else active,
        layers=layers,
        renormalised=not shared and active > 1,
        shared=shared,
        router_bias=shared,
        rank=rank,
        density=density,
    )


def _shared_delta(entry: Any) -> tuple[int, float]:
    """(rank, density) of moe.shared_delta, one of them 0; both where there is none."""
    if entry is None:
        return 0, 0.0
    rank = 0
    density = 0
    if isinstance(entry, Mapping):
        rank = entry.get("rank", 0)
        density = entry.get("density", 0)
    if (
        not isinstance(rank, int)
        or not isinstance(density, (int, float))
        or not 0 <= rank <= SIZE
        or not 0 <= density < 1
        or bool(rank) == bool(density)
    ):
        raise EdgemedError(
            f"config.json: moe.shared_delta {short(entry)} is neither a rank nor a density",
            'For example {"rank": 64}, as edgemed merge writes it',
        )
    return rank, float(density)


def sparse_layers(moe: ConfigReader, depth: int) -> tuple[int, ...]:
    """Which layers have experts: moe_layers_idx, or what moe_mode means (MoE-LLaVA's own rule).
    Raises EdgemedError for another mode, or layers that are not there.
    """
    modes = {
        "sparse": range(0, depth, 2),
        "dense": range(depth),
        "first_half": range(depth // 2),
        "second_half": range(depth // 2, depth),
    }
    stated = moe.raw("moe_layers_idx")
    mode = moe.raw("moe_mode")
    if stated is None and (not isinstance(mode, str) or mode not in modes):
        raise EdgemedError(
            f"config.json: moe.moe_mode {short(mode)} is not supported",
            f"Known: {', '.join(modes)}",
        )
    if stated is None:
        return tuple(modes[mode])
    layers = stated if isinstance(stated, list) else []
    if not layers or any(isinstance(n, bool) or n not in range(depth) for n in layers):
        raise EdgemedError(
            f"config.json: moe.moe_layers_idx {short(stated)} of a model of {depth} layers",
            "Config and weights do not belong together",
        )
    return tuple(sorted(set(layers)))


def _stored(shapes: Mapping[str, tuple[int, ...]], layers: tuple[int, ...], count: int) -> bool:
    """Whether the tensors are those of the architecture with a meta expert, after checking them
    against the config.
    """
    experts_in: dict[int, set[int]] = {}
    biased: set[int] = set()
    meta: set[int] = set()
    for key in shapes:
        match = STORED.search(f".{key}")
        if match is None:
            continue
        layer = int(match[1])
        numbers = experts_in.setdefault(layer, set())
        if match[2]:
            numbers.add(int(match[2]))
        if match[3]:
            biased.add(layer)
        if match[4]:
            meta.add(layer)
    _check_numbers(experts_in, layers, count)
    if (meta or biased) and not meta == biased == set(layers):
        lacking = min((set(layers) - (meta & biased)) or (meta | biased) - set(layers))
        raise EdgemedError(
            f"the checkpoint mixes two architectures: layer {min(meta | biased)} has a meta expert"
            f" or a router with bias, layer {lacking} has not both",
            "Its layers come from different models; download it again",
        )
    return bool(meta)


def _check_numbers(experts_in: Mapping[int, set[int]], layers: tuple[int, ...], count: int) -> None:
    # experts_in: layer -> numbers of the experts stored for it
    fix = "Config and weights do not belong together, or a shard is missing"
    for n in sorted(set(layers) | set(experts_in)):
        stored = bool(experts_in.get(n))
        if stored and n not in layers:
            raise EdgemedError(
                f"layer {n} has experts, config.json says it does not (moe.moe_layers_idx"
                f" {list(layers)})",
                fix,
            )
        if not stored and n in layers:
            raise EdgemedError(
                f"layer {n} has none of the experts, config.json says it does"
                f" (moe.moe_layers_idx {list(layers)})",
                fix,
            )
    for layer, numbers in sorted(experts_in.items()):
        if numbers != set(range(count)):
            missing = sorted(set(range(count)) - numbers)
            problem = f"misses expert {missing[0]}" if missing else f"has {len(numbers)} experts"
            raise EdgemedError(
                f"layer {layer} {problem}, config.json says {count} (moe.num_experts)", fix
            )


def qwen(config: Mapping[str, Any]) -> DecoderConfig:
    """Qwen (1)'s text model: Qwen2's with q, k and v in one matrix; intermediate_size counts gate
    and up together.
    """
    reader = ConfigReader(config, QWEN_KEYS)
    hidden = reader.size("hidden_size", 1 << 20)
    layers = reader.size("num_hidden_layers", LAYERS)
    heads = reader.size("num_attention_heads", HEADS)
    head_dim = reader.optional_size("kv_channels", HEADS) or head_size(reader, hidden, heads)
    if head_dim % 2:
        raise reader.malformed("kv_channels", "an even number")
    theta = reader.number("rotary_emb_base", above=1.0)
    vocab = reader.size("vocab_size")
    stop_tokens = stop_tokens_of(reader, vocab)
    return DecoderConfig(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        ffn=reader.size("intermediate_size", least=2) // 2,
        vocab=vocab,
        context=reader.size("seq_length"),
        norm_eps=reader.number("layer_norm_epsilon", most=1.0),
        norm="rmsnorm",
        score_scale=(head_dim**-0.5,) * layers,
        activation="silu",
        gated=True,
        tied=reader.flag("tie_word_embeddings"),
        eos=stop_tokens[0] if stop_tokens else None,
        stop_tokens=stop_tokens,
        positions="rope",
        rope_theta=theta,
        rope_frequencies=plain_frequencies(head_dim, theta),
    )


def qwen_parts(d: DecoderConfig) -> dict[str, ParamSpec]:
    specs = {"embed": ParamSpec(("transformer.wte",), "table", (d.vocab, d.hidden))}
    for n in range(d.layers):
        name = f"layers.{n}"
        at = f"transformer.h.{n}"
        specs |= {
            f"{name}.attn_norm": ParamSpec((f"{at}.ln_1",), "norm", (d.hidden,)),
            f"{name}.qkv": ParamSpec(
                (f"{at}.attn.c_attn",),
                "matrix",
                (d.q_size + 2 * d.kv_size, d.hidden),
                bias=True,
            ),
            f"{name}.o": ParamSpec((f"{at}.attn.c_proj",), "matrix", (d.hidden, d.q_size)),
            f"{name}.mlp_norm": ParamSpec((f"{at}.ln_2",), "norm", (d.hidden,)),
            # c_proj(w1(x) * silu(w2(x))): w2 is the gate.
            f"{name}.up": ParamSpec(
                (f"{at}.mlp.w2", f"{at}.mlp.w1"),
                "matrix",
                (2 * d.ffn, d.hidden),
                rows=(d.ffn, d.ffn),
            ),
            f"{name}.down": ParamSpec((f"{at}.mlp.c_proj",), "matrix", (d.hidden, d.ffn)),
        }
    return specs | {
        "final_norm": ParamSpec(("transformer.ln_f",), "norm", (d.hidden,)),
        "lm_head": ParamSpec(("lm_head",), "matrix", (d.vocab, d.hidden)),
    }


def with_experts(d: DecoderConfig, parts: Mapping[str, ParamSpec]) -> dict[str, ParamSpec]:
    """A dense model's parts with those of the experts where the MLPs of sparse layers were; every
    expert is called as the MLP is.
    """
    specs: dict[str, ParamSpec] = {}
    for name, part in parts.items():
        layer = int(name.split(".")[1]) if name.startswith("layers.") else -1
        if d.sparse(layer) and name.endswith((".up", ".down")):
            specs |= _expert_parts(d, layer, name, part)
        else:
            specs[name] = part
    return specs


def _expert_parts(d: DecoderConfig, layer: int, name: str, part: ParamSpec) -> dict[str, ParamSpec]:
    # What stands in place of one matrix ('up' or 'down') of a dense layer's MLP.
    experts = d.mixture
    stem, _, last = name.rpartition(".")
    specs: dict[str, ParamSpec] = {}
    if last == "up":
        specs[f"{stem}.router"] = ParamSpec(
            (part.modules[0].partition("mlp.")[0] + ROUTER,),
            "router",
            (experts.count, d.hidden),
            bias=experts.router_bias,
        )
    for mlp in d.mlps(layer):
        place = {"shared.": META, "base.": BASE}.get(mlp) or EXPERT + mlp.removeprefix("experts.")
        specs[f"{stem}.{mlp}{last}"] = replace(
            part,
            modules=tuple(module.replace("mlp.", place) for module in part.modules),
            bias=part.bias and mlp != "base.",
        )
    if experts.has_shared_base:
        for j in range(experts.count):
            specs |= delta_parts(experts, part, f"{stem}.experts.{j}.{last}", f"{EXPERT}{j}.")
    return specs


def delta_parts(e: ExpertsConfig, part: ParamSpec, name: str, place: str) -> dict[str, ParamSpec]:
    """What one expert adds to a shared matrix, `part` being that of a dense model; its bias stays
    its own.
    """
    rows, columns = part.shape
    last = name.rpartition(".")[2]
    at = part.modules[0].partition("mlp.")[0] + f"{place}{last}_delta."
    if e.rank:
        specs = {
            f"{name}.a": ParamSpec((f"{at}a",), "delta", (e.rank, columns), bare=True),
            f"{name}.b": ParamSpec((f"{at}b",), "delta", (rows, e.rank), bare=True),
        }
    else:
        count = e.kept_columns(columns)
        specs = {
            f"{name}.values": ParamSpec((f"{at}values",), "delta", (rows, count), bare=True),
            f"{name}.columns": ParamSpec((f"{at}columns",), "index", (rows, count), bare=True),
        }
    if part.bias:
        biases = tuple(module.replace("mlp.", place) + ".bias" for module in part.modules)
        specs[f"{name}.bias"] = ParamSpec(biases, "delta", (rows,), bare=True, rows=part.rows)
    return specs


def shared_experts(config: Mapping[str, Any], rank: int, density: float) -> dict[str, Any]:
    """The config of the same model with one shared matrix per layer and differences of this rank or
    density.
    """
    shared_delta = {"rank": rank} if rank else {"density": density}
    return {**config, "moe": {**config["moe"], "shared_delta": shared_delta}}


def without_experts(config: Mapping[str, Any], times: int) -> dict[str, Any]:
    """The config of the model with a plain MLP, `times` as wide, in place of every mixture.
    MoE-LLaVA calls such models llava_*; of Qwen it has one under the same name.
    """
    kind = config["model_type"].removeprefix("moe_")
    dense = {key: value for key, value in config.items() if key != "moe"}
    dense["intermediate_size"] = times * config["intermediate_size"]
    if kind in BASES:
        dense["model_type"] = kind
    else:
        dense["moe"] = {"moe_enable": False}
    if classes := config.get("architectures"):
        dense["architectures"] = [re.sub("^(Eval)?MoELLaVA", "Llava", name) for name in classes]
    return dense


def variant(config: Mapping[str, Any]) -> Architecture:
    """This family with the parts and the GGUF names of the text model that a config asks for."""
    base = BASES[config["model_type"]]
    text = all_families()[base] if base else None

    def parts(d: DecoderConfig) -> dict[str, ParamSpec]:
        return with_experts(d, text.parts(d) if text else qwen_parts(d))

    arch = text.gguf_arch if text else ""
    if config["model_type"].startswith("moe_"):
        # The one graph of llama.cpp with attention, positions and gated experts like these; it has
        # RMS norms.
        arch = "phimoe" if base == "stablelm" else ""
    family = replace(
        FAMILY,
        parts=parts,
        gguf_arch=arch,
        gguf_centred=arch == "phimoe",
    )
    if config["model_type"] != "llava_stablelm":
        return family
    return replace(family, auto_classes={"lm": "AutoModelForCausalLM"}, text_config=text_config)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """LLaVA-StableLM's text model for transformers, which knows neither the whole nor the names of
    old configs. (Its Phi has a bias that these models lack, and it has no Qwen 1.)
    """
    d = all_families()["stablelm"].decoder(text_of(config), {})
    return {
        "model_type": "stablelm",
        "hidden_size": d.hidden,
        "num_hidden_layers": d.layers,
        "num_attention_heads": d.heads,
        "num_key_value_heads": d.kv_heads,
        "intermediate_size": d.ffn,
        "vocab_size": d.vocab,
        "max_position_embeddings": d.context,
        "hidden_act": "silu",
        "layer_norm_eps": d.norm_eps,
        "rope_theta": d.rope_theta,
        "partial_rotary_factor": 2 * len(d.rope_frequencies) / d.head_dim,
        "use_qkv_bias": config.get("use_qkv_bias", True),
        "tie_word_embeddings": d.tied,
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_id": d.eos,
    }


def parts(d: DecoderConfig) -> dict[str, ParamSpec]:
    return variant(TINYMED).parts(d)


def vision(
    config: Mapping[str, Any],
    preprocessor: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
) -> VisionConfig:
    # mm_image_tower is often a path on the authors' disk; the tower lies in the checkpoint, so only
    # an error ever speaks of it.
    own = own_of(config)
    d = decoder(config, {})
    tower = tower_numbers(
        own.section("vision_config") if own.states("vision_config") else None,
        shapes,
        TOWER,
        own.text("mm_image_tower"),
    )
    return clip_vision(
        tower,
        preprocessor,
        own.raw("mm_vision_select_layer"),
        own.text("image_aspect_ratio") == "pad",
        token=d.vocab,
        projector_hidden=d.hidden,
        marker=MARKER,
    )


def vision_parts(v: VisionConfig, d: DecoderConfig) -> dict[str, ParamSpec]:
    return clip_parts(v, d, TOWER, PROJECTOR)


def chat(text: str, images: int, conversation: str) -> str:
    """One user turn of the authors' conversation form, images first, each on a line of its own.
    Med-MoE's eval.sh asks for the forms phi and stablelm, which are alike.
    """
    return user_turn(VICUNA, text.strip(), images, image=f"{MARKER}\n")


def reference(
    model_type: str, base: Mapping[str, Any], depth: int, meta: bool = False
) -> dict[str, Any]:
    """Published true dimensions of one model: its base's config.json and the experts' numbers
    (arXiv 2404.10237, 2401.15947).
    """
    moe: dict[str, Any] = {
        "moe_enable": True,
        "moe_mode": "sparse",
        "moe_layers_idx": list(range(0, depth, 2)),
        "num_experts": [4],
        "top_k_experts": 1 if meta else 2,
        "use_residual": False,
    }
    if meta:
        moe["meta_expert"] = True
    images = {
        "mm_image_tower": "openai/clip-vit-large-patch14-336",
        "mm_vision_select_layer": -2,
        "image_projector_type": "mlp2x_gelu",
        "image_aspect_ratio": "pad",
    }
    return {
        **base,
        **images,
        "model_type": model_type,
        "moe": moe,
        "initializer_range": 0.02,
    }


# stabilityai/stablelm-2-1_6b, microsoft/phi-2 and Qwen/Qwen-1_8B config.json
STABLELM = {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 5632,
    "vocab_size": 100352,
    "max_position_embeddings": 4096,
    "bos_token_id": 100257,
    "eos_token_id": 100257,
    "hidden_act": "silu",
    "layer_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25,
    "use_qkv_bias": True,
    "tie_word_embeddings": False,
}
PHI = {
    "hidden_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 10240,
    "vocab_size": 51200,
    "max_position_embeddings": 2048,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.4,
    "tie_word_embeddings": False,
}
QWEN = {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "kv_channels": 128,
    "intermediate_size": 11008,
    "vocab_size": 151936,
    "seq_length": 8192,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000.0,
    "rotary_pct": 1.0,
    "no_bias": True,
    "eos_token_id": 151643,
    "tie_word_embeddings": False,
}
TINYMED = reference("moe_llava_stablelm", STABLELM, 24)

FAMILY = Architecture(
    name="moe_llava",
    model_types=tuple(BASES),
    decoder=decoder,
    parts=parts,
    prefixes=("",),
    ignored=(".rotary_emb.inv_freq", ".embeddings.position_ids"),
    folded=unscaled_rope,
    gguf_arch="phimoe",
    gguf_centred=True,
    reference_name="moe-tinymed",
    reference_config=TINYMED,
    other_references={
        "moe-tinymed-phi": reference("moe_llava_phi", PHI, 32),
        "med-moe": reference("moe_llava_stablelm", STABLELM, 24, meta=True),
        "med-moe-phi": reference("moe_llava_phi", PHI, 32, meta=True),
        "moe-llava-qwen": reference("moe_llava_qwen", QWEN, 24),
    },
    auto_classes={},
    vectors="its mixtures are held against vectors of the authors' code (tests/data/moe)",
    variant=variant,
    vision=vision,
    vision_parts=vision_parts,
    chat=chat,
    without_experts=without_experts,
    shared_experts=shared_experts,
)
