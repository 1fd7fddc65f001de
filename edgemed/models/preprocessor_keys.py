"""Keys that preprocessor_config.json may have whatever the model, and the numbers of its pixels.

A preprocessor decides which numbers a vision encoder sees. What none of the encoders here is given
is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemed.models.config_keys import CODE
from edgemed.models.config_reader import ConfigKeys, ConfigReader

# of CLIP's training images, RGB in 0..1; also Qwen2-VL's
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3
HARMLESS = {
    "processor_class": CODE,
    "auto_map": CODE,
    "_valid_processor_keys": CODE,
    "_processor_class": CODE,
    "return_tensors": "how transformers returns it",
    "data_format": "how transformers returns it",
    "input_data_format": "images are read as files",
    "device": "where it is computed",
    "disable_grouping": "how it is computed",
    "do_convert_rgb": "images are always read as RGB",
    "default_to_square": "size says it",
    "image_seq_length": "follows from size",
    "num_additional_image_tokens": "the family knows them",
    "vision_feature_select_strategy": "config.json says it",
    "model_input_names": "how transformers returns it",
    "image_processor": CODE,
}
ENDINGS = ("", "Fast", "Pil")


def preprocessor_keys(defaults: Mapping[str, Any], types: tuple[str, ...]) -> ConfigKeys:
    """The keys of one family's preprocessor. defaults: what the family reads beside mean and
    deviation. types: transformers' classes that do what the family does.
    """
    names = tuple(f"{name}{ending}" for name in types for ending in ENDINGS)
    fixed: dict[str, tuple[Any, ...]] = {
        "resample": (BICUBIC,),
        "do_resize": (True,),
        "do_rescale": (True,),
        "do_normalize": (True,),
        "rescale_factor": (1 / 255, 0.00392156862745098),
        "image_processor_type": names,
        "feature_extractor_type": (*names, "CLIPFeatureExtractor"),
        "do_pad": (False,),
        "pad_size": ({},),
        "do_center_crop": (False,),
        "crop_size": ({},),
    }
    return ConfigKeys(
        defaults={"image_mean": MEAN, "image_std": STD, **defaults},
        fixed={key: values for key, values in fixed.items() if key not in defaults},
        harmless=HARMLESS,
    )


def pixel_statistics(
    images: ConfigReader,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, standard deviation) per colour of RGB in 0..1."""
    mean = images.numbers("image_mean", 3, above=-1e-9) if images.states("image_mean") else MEAN
    std = images.numbers("image_std", 3) if images.states("image_std") else STD
    return mean, std
