"""Biases that are stored although the architecture has none, or absent although config.json asks
for them.

A bias that transformers does not know is dropped by it with a warning; one that is absent becomes
zeros. Either way the files contradict each other, and the model is not what its authors trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemed.errors import EdgemedError
from edgemed.models.architecture import Architecture, ParamSpec
from edgemed.models.checkpoint import Checkpoint

# last word of a layer's matrix -> keys of config.json that say whether it has a bias, in families
# that do not say it themselves
CONFIG_KEYS = {
    "qkv": ("attention_bias", "use_qkv_bias"),
    "o": ("attention_bias",),
    "up": ("mlp_bias",),
    "down": ("mlp_bias",),
}
FIX = "Config and weights do not belong together; download them again"


def check_biases(
    checkpoint: Checkpoint,
    family: Architecture,
    parts: Mapping[str, ParamSpec],
    keys: Mapping[str, tuple[str, ...]],
) -> None:
    """Raise EdgemedError where a layer's matrix has a bias that config.json and the architecture do
    not know, other than zeros (which AutoGPTQ writes), or lacks one that they ask for.

    parts, keys: of the checkpoint; canonical part -> its matrix, and the modules it is stored in.
    """
    config = checkpoint.config
    text = config.get("text_config")
    values = {**config, **text} if isinstance(text, dict) else config
    for name, part in parts.items():
        if part.kind != "matrix" or not name.startswith("layers."):
            continue
        expected, is_needed, reason = _wanted(family, name.rpartition(".")[2], part, values)
        for key in keys[name]:
            bias = f"{key}.bias"
            is_stored = bias in checkpoint.tensors
            # A packed matrix without a bias is one that its packer knew to have none.
            if is_needed and not is_stored and part.weight(key) in checkpoint.tensors:
                raise EdgemedError(
                    f"{checkpoint.path}: tensor '{bias}' is missing, and {reason}", FIX
                )
            if is_stored and not expected and bool(checkpoint.read(bias).any()):
                raise EdgemedError(
                    f"{checkpoint.path}: tensor '{bias}' is stored, and {reason}; transformers"
                    " would leave it out",
                    FIX,
                )


def _wanted(
    family: Architecture, word: str, part: ParamSpec, values: Mapping[str, Any]
) -> tuple[bool, bool, str]:
    """(whether a bias may be stored, whether it must be, who says so) of a layer's matrix. word:
    the last of its name; values: config.json, with its text model's keys.
    """
    rule = family.biases.get(word)
    if rule is True:
        return True, True, f"every {word} of {family.name} has one"
    if isinstance(rule, str):
        is_set = bool(values.get(rule, False))
        return is_set, is_set, f"config.json says {rule}: {str(is_set).lower()}"
    keys = CONFIG_KEYS.get(word, ())
    stated = next((key for key in keys if isinstance(values.get(key), bool)), None)
    if stated is None:
        return part.bias, False, f"{word} of {family.name} has none"
    is_set = bool(values[stated])
    # Of attention_bias, some architectures apply it to the output matrix too, others do not.
    is_needed = is_set and word != "o"
    return is_set, is_needed, f"config.json says {stated}: {str(is_set).lower()}"
