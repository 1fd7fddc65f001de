"""Biases that are stored although the architecture has none, or absent although config.json asks
for them.

A bias that transformers does not know is dropped by it with a warning; one that is absent becomes
zeros. Either way the files contradict each other, and the model is not what its authors trained.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgemed.errors import EdgemedError
from edgemed.models.architecture import ParamSpec
from edgemed.models.checkpoint import Checkpoint

# last word of a layer's matrix -> keys of config.json that say whether it has a bias
CONFIG_KEYS = {
    "qkv": ("attention_bias", "use_qkv_bias"),
    "o": ("attention_bias",),
    "up": ("mlp_bias",),
    "down": ("mlp_bias",),
}


def check_biases(
    checkpoint: Checkpoint, parts: Mapping[str, ParamSpec], keys: Mapping[str, tuple[str, ...]]
) -> None:
    """Raise EdgemedError where a layer's matrix has a bias that config.json and the architecture do
    not know, other than zeros (which AutoGPTQ writes), or lacks one that config.json asks for.
    """
    config = checkpoint.config
    text = config.get("text_config")
    values = {**config, **text} if isinstance(text, dict) else config
    for name, part in parts.items():
        words = CONFIG_KEYS.get(name.rpartition(".")[2], ())
        if part.kind != "matrix" or not name.startswith("layers."):
            continue
        stated = next((word for word in words if isinstance(values.get(word), bool)), None)
        expected = part.bias if stated is None else bool(values[stated])
        # Of attention_bias, some architectures apply it to the output matrix too, others do not.
        is_needed = stated is not None and expected and not name.endswith(".o")
        for key in keys[name]:
            bias = f"{key}.bias"
            is_stored = bias in checkpoint.tensors
            if is_needed and not is_stored:
                raise EdgemedError(
                    f"{checkpoint.path}: tensor '{bias}' is missing, and config.json says"
                    f" {stated}: true",
                    "Config and weights do not belong together; download them again",
                )
            if is_stored and not expected and bool(checkpoint.read(bias).any()):
                reason = f"none ({stated}: false)" if stated else "none"
                raise EdgemedError(
                    f"{checkpoint.path}: tensor '{bias}' is stored, and config.json asks for"
                    f" {reason}; transformers would leave it out",
                    "Config and weights do not belong together; download them again",
                )
