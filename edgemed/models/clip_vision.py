"""CLIP's vision transformer as a VisionConfig and its parts: what every family with such a vision
encoder shares.

A family says under which names the encoder may lie, which layer's output it reads and how images
become square. Numbers come from config.json where it has them. Where it does not, as in the
checkpoints of LLaVA's authors, they come from the tensors' shapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgemed.errors import EdgemedError
from edgemed.models.architecture import DecoderConfig, ParamSpec, Shapes, VisionConfig
from edgemed.models.config_keys import START, text_keys
from edgemed.models.config_reader import HEADS, LAYERS, ConfigReader, Section, short
from edgemed.models.family_helpers import head_size
from edgemed.models.preprocessor_keys import pixel_statistics, preprocessor_keys

MARKER = "<image>"  # what LLaVA and its descendants write where an image stands
# openai/clip-vit-large-patch14-336 config.json: what these models use, where neither config nor
# tensors are at hand (--random-weights)
LARGE_336 = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "patch_size": 14,
    "image_size": 336,
}
HEAD = 64  # elements of a head in every published CLIP encoder
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu"}
# transformers' CLIPVisionConfig
KEYS = text_keys(
    {
        "model_type": "clip_vision_model",
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "patch_size": 32,
        "image_size": 224,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    fixed={"num_channels": (3,)},
    harmless={
        "projection_dim": "of CLIP's own score, which is not computed",
        "initializer_factor": START,
        "tie_word_embeddings": "no words are embedded here",
        "vocab_size": "of CLIP's text encoder, which is not there",
    },
)
PREPROCESSOR_KEYS = preprocessor_keys(
    {"size": None, "crop_size": None, "do_center_crop": True, "do_pad": False},
    types=("CLIPImageProcessor", "LlavaImageProcessor"),
)


def tower_numbers(
    config: Mapping[str, Any] | None, shapes: Shapes, roots: tuple[str, ...], named: str = ""
) -> dict[str, Any]:
    """The encoder's numbers under transformers' names.

    config: a CLIPVisionConfig's mapping, or None where they are to be taken from the tensors.
    roots: what may stand before 'embeddings.' and 'encoder.'. named: the encoder's name in
    config.json, for the message. Raises EdgemedError where the checkpoint holds no such encoder.
    """
    if config is not None:
        if config.get("model_type", KEYS.defaults["model_type"]) != KEYS.defaults["model_type"]:
            raise EdgemedError(
                "config.json: a vision tower of type"
                f" {short(config['model_type'])} is not supported",
                "Known: clip_vision_model",
            )
        return config_numbers(config)
    if not shapes:
        return dict(LARGE_336)
    origin = f"; config.json names {named}" if named else ""
    root = next(
        (root for root in roots if f"{root}embeddings.patch_embedding.weight" in shapes), None
    )
    if root is None:
        raise EdgemedError(
            f"the checkpoint has no vision tower ('{roots[0]}embeddings.patch_embedding.weight' is"
            f" missing){origin}",
            "Put that CLIP model's folder beside the weights and call it vision_tower",
        )
    try:
        width, _, patch, _ = shapes[f"{root}embeddings.patch_embedding.weight"]
        positions, _ = shapes[f"{root}embeddings.position_embedding.weight"]
        ffn, _ = shapes[f"{root}encoder.layers.0.mlp.fc1.weight"]
    except (KeyError, ValueError):
        raise EdgemedError(
            f"the tensors under '{root}' are no CLIP vision tower", "Download the checkpoint again"
        ) from None
    layers = next(
        n
        for n in range(len(shapes))
        if f"{root}encoder.layers.{n}.layer_norm1.weight" not in shapes
    )
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(width // HEAD, 1),
        "intermediate_size": ffn,
        "patch_size": patch,
        "image_size": math.isqrt(positions - 1) * patch,
    }


def config_numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The encoder's numbers from a CLIPVisionConfig's mapping. An empty mapping is not None: it
    asks for transformers' defaults.
    """
    reader = ConfigReader(config, KEYS)
    width = reader.size("hidden_size", 1 << 20)
    heads = reader.size("num_attention_heads", HEADS)
    head_size(reader, width, heads)
    activation = reader.raw("hidden_act")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise EdgemedError(
            f"config.json: hidden_act {short(activation)} of the vision tower is not supported",
            f"Known: {', '.join(ACTIVATIONS)}",
        )
    patch = reader.size("patch_size", 1024)
    size = reader.size("image_size", 1 << 14)
    if size < patch:
        raise reader.malformed("image_size", f"at least patch_size {patch}")
    return {
        "hidden_size": width,
        "num_hidden_layers": reader.size("num_hidden_layers", LAYERS),
        "num_attention_heads": heads,
        "intermediate_size": reader.size("intermediate_size"),
        "patch_size": patch,
        "image_size": size,
        "hidden_act": ACTIVATIONS[activation],
        "layer_norm_eps": reader.number("layer_norm_eps", most=1.0),
    }


def clip_vision(
    tower: Mapping[str, Any], preprocessor: Mapping[str, Any], layer: Any, pad: bool, **rest: Any
) -> VisionConfig:
    """The numbers of a CLIP encoder.

    tower: see tower_numbers. layer: whose output is read, counted as transformers' hidden_states
    are: the embeddings are 0, a number below 0 counts from the end. pad: whether images are padded
    to a square; preprocessor_config.json may ask for it too. rest: other fields of VisionConfig
    (token, projector_hidden and so on).

    Raises EdgemedError for a layer or a rule of resizing that is not supported.
    """
    depth = tower["num_hidden_layers"]
    size = tower["image_size"]
    layers = 0
    if isinstance(layer, int) and not isinstance(layer, bool):
        layers = layer if layer >= 0 else depth + 1 + layer
    if not 1 <= layers <= depth:
        raise EdgemedError(
            f"config.json: features of layer {short(layer)} of a tower of {depth} are not"
            " supported",
            f"Known: one layer, from 1 to {depth} or from -{depth} to -1",
        )
    images = ConfigReader(preprocessor, PREPROCESSOR_KEYS, "preprocessor_config.json")
    mean, std = pixel_statistics(images)
    return VisionConfig(
        width=tower["hidden_size"],
        layers=layers,
        spare=depth - layers,
        heads=tower["num_attention_heads"],
        ffn=tower["intermediate_size"],
        norm_eps=tower.get("layer_norm_eps", 1e-5),
        activation=tower.get("hidden_act", "quick_gelu"),
        patch=tower["patch_size"],
        size=size,
        fit=square_rule(images, size, pad),
        pre_norm=True,
        mean=mean,
        std=std,
        **rest,
    )


def square_rule(images: ConfigReader, size: int, pad: bool) -> str:
    """VisionConfig.fit from preprocessor_config.json.

    size: side of the encoder's images, in pixels. Raises EdgemedError for another rule or size than
    the encoder's, which would give another image.
    """
    edges = sides(images, "size", "shortest_edge", size)
    crop = sides(images, "crop_size", "height", size)
    is_cropped = not images.states("do_center_crop") or images.flag("do_center_crop")
    pad = pad or (images.states("do_pad") and images.flag("do_pad"))
    unsupported = []
    if set(edges.values()) != {size} or set(edges) not in ({"shortest_edge"}, {"height", "width"}):
        unsupported.append(f"size {short(edges)}")
    if is_cropped and set(crop.values()) != {size}:
        unsupported.append(f"crop_size {short(images.raw('crop_size'))}")
    if not pad and not is_cropped and "shortest_edge" in edges:
        unsupported.append("do_center_crop false")
    if unsupported:
        raise EdgemedError(
            f"preprocessor_config.json: {unsupported[0]} is not supported",
            f"Known: bicubic, to the tower's {size} x {size}, padded or centre-cropped",
        )
    if pad:
        return "pad"
    return "crop" if "shortest_edge" in edges else "stretch"


def sides(images: ConfigReader, key: str, edge: str, size: int) -> dict[str, int]:
    """A size in pixels, which older preprocessors state as one number: of `edge`. The encoder's own
    `size` where nothing is stated.
    """
    if not images.states(key):
        return {edge: size}
    if not isinstance(images.raw(key), Mapping):
        return {edge: images.size(key, 1 << 14)}
    section: Section = images.section(key)
    for name, value in section.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise images.malformed(key, f"a size in pixels ({name})")
    return dict(section)


def clip_parts(
    v: VisionConfig, d: DecoderConfig, roots: tuple[str, ...], projector: tuple[str, str]
) -> dict[str, ParamSpec]:
    """The parts of the encoder and of the two-layer projector.

    roots: what may stand before 'embeddings.' and 'encoder.'. projector: modules of its two
    matrices, alternatives parted by '|'. Layers behind the one that is read, and the last norm, are
    'vision.spare.*'.
    """

    def at(module: str) -> tuple[str]:
        return ("|".join(root + module for root in roots),)

    w = v.width
    # one per patch, and one for the class token
    places = (v.size // v.patch) ** 2 + 1
    specs = {
        "vision.class": ParamSpec(
            at("embeddings.class_embedding"),
            "table",
            (1, w),
            stored_shape=(w,),
            bare=True,
        ),
        "vision.patch": ParamSpec(
            at("embeddings.patch_embedding"),
            "matrix",
            (w, v.patch_size),
            stored_shape=(w, 3, v.patch, v.patch),
        ),
        "vision.positions": ParamSpec(at("embeddings.position_embedding"), "table", (places, w)),
        # This is how it is spelt in transformers.
        "vision.pre_norm": ParamSpec(
            at("pre_layrnorm"),
            "norm",
            (w,),
            bias=True,
        ),
    }
    for n in range(v.layers + v.spare):
        name = f"vision.layers.{n}" if n < v.layers else f"vision.spare.layers.{n}"
        layer = f"encoder.layers.{n}"
        specs |= {
            f"{name}.attn_norm": ParamSpec(
                at(f"{layer}.layer_norm1"),
                "norm",
                (w,),
                bias=True,
            ),
            f"{name}.qkv": ParamSpec(
                tuple(at(f"{layer}.self_attn.{part}_proj")[0] for part in "qkv"),
                "matrix",
                (3 * w, w),
                bias=True,
                rows=(w, w, w),
            ),
            f"{name}.o": ParamSpec(
                at(f"{layer}.self_attn.out_proj"),
                "matrix",
                (w, w),
                bias=True,
            ),
            f"{name}.mlp_norm": ParamSpec(
                at(f"{layer}.layer_norm2"),
                "norm",
                (w,),
                bias=True,
            ),
            f"{name}.up": ParamSpec(
                at(f"{layer}.mlp.fc1"),
                "matrix",
                (v.ffn, w),
                bias=True,
            ),
            f"{name}.down": ParamSpec(
                at(f"{layer}.mlp.fc2"),
                "matrix",
                (w, v.ffn),
                bias=True,
            ),
        }
    return specs | {
        "vision.spare.post_norm": ParamSpec(
            at("post_layernorm"),
            "norm",
            (w,),
            bias=True,
        ),
        "vision.projector.first": ParamSpec(
            (projector[0],),
            "matrix",
            (v.projector_hidden, w),
            bias=True,
        ),
        "vision.projector.second": ParamSpec(
            (projector[1],),
            "matrix",
            (d.hidden, v.projector_hidden),
            bias=True,
        ),
    }
