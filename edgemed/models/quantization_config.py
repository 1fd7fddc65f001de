"""The quantization_config of a checkpoint: which method made it, and which of its keys are read.

A key that changes what the stored integers mean and is not read would give other weights in
silence. So each key is read, known to be harmless, or refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgemed.errors import EdgemedError
from edgemed.models.checkpoint import Checkpoint
from edgemed.models.tensor_entry import shortened

GPTQ = "gptq"
BITSANDBYTES = "bitsandbytes"
# key -> who reads it, or why it changes nothing in what is stored
GPTQ_KEYS = {
    "quant_method": "read here",
    "bits": "read by gptq_checkpoint",
    "group_size": "read by gptq_checkpoint",
    "desc_act": "read by gptq_checkpoint",
    "sym": "read by gptq_checkpoint",
    "checkpoint_format": "read by gptq_checkpoint",
    "format": "read by gptq_checkpoint, another name of checkpoint_format",
    "dynamic": "read by gptq_checkpoint",
    "pack_dtype": "read by gptq_checkpoint",
    "activation_ranges": "read by weights: what an edgemed method measured",
    "lm_head": "seen in the tensors",
    "static_groups": "how scales were found; g_idx says which weights they belong to",
    "true_sequential": "how it was quantized",
    "damp_percent": "how it was quantized",
    "damp_auto_increment": "how it was quantized",
    "mse": "how it was quantized",
    "act_group_aware": "how it was quantized; g_idx says the order",
    "gptaq": "how it was quantized",
    "foem": "how it was quantized",
    "hyb_act": "how it was quantized; g_idx says the order",
    "dataset": "how it was quantized",
    "tokenizer": "how it was quantized",
    "batch_size": "how it was quantized",
    "pad_token_id": "how it was quantized",
    "module_name_preceding_first_block": "how it was quantized",
    "modules_in_block_to_quantize": "seen in the tensors",
    "block_name_to_quantize": "seen in the tensors",
    "model_seqlen": "how it was quantized",
    "cache_block_outputs": "how it was quantized",
    "backend": "which kernel computes",
    "use_cuda_fp16": "which kernel computes",
    "use_exllama": "which kernel computes",
    "disable_exllama": "which kernel computes",
    "exllama_config": "which kernel computes",
    "max_input_length": "which kernel computes",
    "is_marlin_format": "null or false; otherwise refused by gptq_checkpoint",
    "model_name_or_path": "where it was written",
    "model_file_base_name": "where it was written",
    "meta": "who made it",
    "quantizer": "who made it",
    "versionable": "who made it",
}
BITSANDBYTES_KEYS = {
    "quant_method": "read here",
    "load_in_4bit": "read by bitsandbytes",
    "load_in_8bit": "read by bitsandbytes",
    "_load_in_4bit": "another name of load_in_4bit",
    "_load_in_8bit": "another name of load_in_8bit",
    "bnb_4bit_quant_type": "read by bitsandbytes",
    "bnb_4bit_use_double_quant": "seen in the tensors",
    "bnb_4bit_quant_storage": "seen in the tensors",
    "bnb_4bit_compute_dtype": "the dtype of products, not of weights",
    "llm_int8_threshold": "how products are computed",
    "llm_int8_has_fp16_weight": "seen in the tensors",
    "llm_int8_enable_fp32_cpu_offload": "where weights lie",
    "llm_int8_skip_modules": "seen in the tensors",
}
KEYS = {GPTQ: GPTQ_KEYS, BITSANDBYTES: BITSANDBYTES_KEYS}
# Values that ask for nothing.
EMPTY: tuple[Any, ...] = (None, False, "", [], {})


def quantization_method(checkpoint: Checkpoint) -> tuple[str, dict[str, Any]]:
    """(method, quantization_config); ('', {}) for a float checkpoint.

    Raises EdgemedError for a method, or a key, that is not read.
    """
    where = checkpoint.path / "config.json"
    for place in ("text_config", "vision_config", "compression_config"):
        nested = checkpoint.config.get(place)
        if place == "compression_config":
            nested = {"quantization_config": nested}
        if isinstance(nested, dict) and nested.get("quantization_config"):
            raise EdgemedError(
                f"{where}: a quantization_config in {place} is not read",
                "Give the float checkpoint, or one that is quantized as a whole",
            )
    config = checkpoint.config.get("quantization_config")
    if config in EMPTY:
        return "", {}
    if not isinstance(config, dict):
        raise EdgemedError(f"{where}: quantization_config is no JSON object", "Download it again")
    method = config.get("quant_method")
    if method is None and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        # As transformers reads the configs of its first versions.
        method = BITSANDBYTES
    if not isinstance(method, str) or method not in KEYS:
        raise EdgemedError(
            f"{checkpoint.path}: quantized with '{shortened(method)}', which edgemed does not read",
            f"Known: {GPTQ}, {BITSANDBYTES}; or give the float checkpoint",
        )
    check_keys(checkpoint.path, config, KEYS[method])
    return method, config


def check_keys(path: Path, config: Mapping[str, Any], keys: Mapping[str, str]) -> None:
    """Raise EdgemedError for a key that is not in `keys` and asks for something."""
    for key, value in config.items():
        if key not in keys and value not in EMPTY:
            raise EdgemedError(
                f"{path / 'config.json'}: quantization_config has {shortened(key)}"
                f" {shortened(value)}, which edgemed does not read",
                "Quantize it without, or give the float checkpoint",
            )
