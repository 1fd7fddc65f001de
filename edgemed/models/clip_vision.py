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
from edgemed.models.family_helpers import size_in

MARKER = "<image>"  # what LLaVA and its descendants write where an image stands
# of CLIP's training images, RGB in 0..1
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
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


def tower_numbers(
    config: Mapping[str, Any] | None, shapes: Shapes, roots: tuple[str, ...], named: str = ""
) -> dict[str, Any]:
    """The encoder's numbers under transformers' names.

    config: a CLIPVisionConfig's mapping, or None where they are to be taken from the tensors.
    roots: what may stand before 'embeddings.' and 'encoder.'. named: the encoder's name in
    config.json, for the message. Raises EdgemedError where the checkpoint holds no such encoder.
    """
    if config is not None:
        if config.get("model_type", "clip_vision_model") != "clip_vision_model":
            raise EdgemedError(
                f"config.json: a vision tower of type '{config['model_type']}' is not supported",
                "Known: clip_vision_model",
            )
        return {**config, **{key: size_in(config, key) for key in LARGE_336}}
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
    if isinstance(layer, int):
        layers = layer if layer >= 0 else depth + 1 + layer
    if not 1 <= layers <= depth:
        raise EdgemedError(
            f"config.json: features of layer {layer} of a tower of {depth} are not supported",
            f"Known: one layer, from 1 to {depth} or from -{depth} to -1",
        )
    activation = tower.get("hidden_act", "quick_gelu")
    if activation not in ("quick_gelu", "gelu"):
        raise EdgemedError(
            f"config.json: hidden_act '{activation}' of the vision tower is not supported",
            "Known: quick_gelu, gelu",
        )
    return VisionConfig(
        width=tower["hidden_size"],
        layers=layers,
        spare=depth - layers,
        heads=tower["num_attention_heads"],
        ffn=tower["intermediate_size"],
        norm_eps=tower.get("layer_norm_eps", 1e-5),
        activation=activation,
        patch=tower["patch_size"],
        size=size,
        fit=square_rule(preprocessor, size, pad),
        pre_norm=True,
        mean=tuple(preprocessor.get("image_mean") or MEAN),
        std=tuple(preprocessor.get("image_std") or STD),
        **rest,
    )


def square_rule(preprocessor: Mapping[str, Any], size: int, pad: bool) -> str:
    """VisionConfig.fit from preprocessor_config.json.

    size: side of the encoder's images, in pixels. Raises EdgemedError for another rule or size than
    the encoder's, which would give another image.
    """
    sides = preprocessor.get("size") or size
    if isinstance(sides, int):
        sides = {"shortest_edge": sides}
    crop = preprocessor.get("crop_size") or size
    crop_sides = {crop} if isinstance(crop, int) else set(crop.values())
    cropped = preprocessor.get("do_center_crop", True)
    pad = pad or bool(preprocessor.get("do_pad"))
    unsupported = []
    # 3 is bicubic.
    usual = {"resample": 3, "do_resize": True, "do_rescale": True, "do_normalize": True}
    for key, value in usual.items():
        if preprocessor.get(key) not in (value, None):
            unsupported.append(f"{key} {preprocessor[key]}")
    if set(sides.values()) != {size} or set(sides) not in ({"shortest_edge"}, {"height", "width"}):
        unsupported.append(f"size {sides}")
    if cropped and crop_sides != {size}:
        unsupported.append(f"crop_size {preprocessor['crop_size']}")
    if not pad and not cropped and "shortest_edge" in sides:
        unsupported.append("do_center_crop false")
    if unsupported:
        raise EdgemedError(
            f"preprocessor_config.json: {unsupported[0]} is not supported",
            f"Known: bicubic, to the tower's {size} x {size}, padded or centre-cropped",
        )
    if pad:
        return "pad"
    return "crop" if "shortest_edge" in sides else "stretch"


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
