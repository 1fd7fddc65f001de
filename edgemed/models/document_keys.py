"""The documents beside config.json, held against lists of known keys: generation_config.json,
tokenizer_config.json and processor_config.json.

Other modules read these documents. Here only the keys are checked, once, where a checkpoint is
opened. config.json itself is checked by the family that parses it, its quantization_config in
quantization_config.py, adapter_config.json in adapter_files.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgemed.artifacts.json_files import read_json_object
from edgemed.models.config_keys import CODE, CONSTRAINTS, GENERATION_KEYS, SPEED, TRAINED
from edgemed.models.config_reader import DOWNLOAD, ConfigKeys, ConfigReader, accepted_in

TOKENIZER = "models/tokenizer.py"
OUTSIDE = "special tokens and templates are read, this is not needed for ids"

# transformers' GenerationConfig
GENERATION = ConfigKeys(
    defaults={},
    fixed=CONSTRAINTS,
    harmless={
        **GENERATION_KEYS,
        "use_cache": SPEED,
        "output_attentions": "what a call returns",
        "output_hidden_states": "what a call returns",
        "transformers_version": CODE,
        "_from_model_config": CODE,
        "_commit_hash": CODE,
        "pad_token_id": "no padding is computed",
        "decoder_start_token_id": "of models with an encoder",
        "assistant_temperature": "of assisted generation",
        "trust_remote_code": CODE,
        # sampling settings of other programs that publishers keep here
        "chat_format": "the chat template decides",
        "max_window_size": "the context is config.json's",
        "presence_penalty": "how text is chosen is decided where it is generated",
        "frequency_penalty": "how text is chosen is decided where it is generated",
    },
    elsewhere={"eos_token_id": TOKENIZER, "bos_token_id": TOKENIZER},
)

TOKENIZER_CONFIG = ConfigKeys(
    defaults={},
    fixed={
        # They would change the ids of special tokens that stand in a text.
        "split_special_tokens": (False,),
        "do_lower_case": (False,),
    },
    harmless={
        "tokenizer_class": CODE,
        "processor_class": CODE,
        "auto_map": CODE,
        "name_or_path": CODE,
        "transformers_version": CODE,
        "tokenizer_file": CODE,
        "vocab_file": CODE,
        "merges_file": CODE,
        "special_tokens_map_file": CODE,
        "fast_tokenizer_files": CODE,
        "files_loaded": CODE,
        "backend": CODE,
        "is_local": CODE,
        "local_files_only": CODE,
        "use_fast": CODE,
        "from_slow": CODE,
        "slow_tokenizer_class": CODE,
        "model_type": CODE,
        "tokenizer_type": CODE,
        "vocab_size": "the vocabulary itself tells",
        "_commit_hash": CODE,
        "model_max_length": "the context is config.json's",
        "max_len": "the context is config.json's",
        "max_length": "truncation saved by a training run",
        "stride": "truncation saved by a training run",
        "truncation": "truncation saved by a training run",
        "truncation_side": "texts are not truncated",
        "truncation_strategy": "texts are not truncated",
        "padding": "no padding is computed",
        "padding_side": "no padding is computed",
        "pad_to_multiple_of": "no padding is computed",
        "pad_token_type_id": "no padding is computed",
        "model_input_names": "what a call returns",
        "return_token_type_ids": "what a call returns",
        "verbose": CODE,
        "device_map": TRAINED,
        "trust_remote_code": CODE,
        "revision": CODE,
        "errors": "how bytes that are no UTF-8 are decoded",
        "clean_up_tokenization_spaces": "decoding is the tokenizer.json's",
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": OUTSIDE,
        "spaces_between_special_tokens": "decoding is the tokenizer.json's",
        "sp_model_kwargs": "of the slow tokenizer; tokenizer.json is read",
        "legacy": "settled when tokenizer.json was made",
        "use_default_system_prompt": "the chat template decides",
        "chat_control_tokens": OUTSIDE,
        "response_template": OUTSIDE,
        "response_schema": OUTSIDE,
        "max_image_size": "preprocessor_config.json says it",
    },
    elsewhere=dict.fromkeys(
        (
            *("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token"),
            *("mask_token", "additional_special_tokens", "extra_special_tokens"),
            *("model_specific_special_tokens", "added_tokens_decoder", "chat_template"),
            *("add_bos_token", "add_eos_token", "add_prefix_space", "init_inputs"),
            *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"),
        ),
        TOKENIZER,
    ),
)

# A processor binds a tokenizer and an image processor; transformers 5 keeps the latter inside.
PROCESSOR_CONFIG = ConfigKeys(
    defaults={},
    harmless={
        "processor_class": CODE,
        "auto_map": CODE,
        "patch_size": "config.json says it",
        "vision_feature_select_strategy": "config.json says it",
        "num_additional_image_tokens": "the family knows them",
        "chat_template": "the tokenizer's is read",
        "video_processor": "films are not read",
        "tokenizer": "the tokenizer's own files say it",
        "image_token": "the family knows it",
        "video_token": "films are not read",
        "transformers_version": CODE,
    },
    elsewhere={"image_processor": "the family"},
)

BESIDE = {
    "generation_config.json": GENERATION,
    "tokenizer_config.json": TOKENIZER_CONFIG,
    "processor_config.json": PROCESSOR_CONFIG,
}


def check_documents(path: Path) -> None:
    """Raise EdgemedError where a document beside config.json has a key that nobody knows, or a
    value that is not supported. path: of the checkpoint.
    """
    for name, keys in BESIDE.items():
        file = path / name
        if not file.is_file():
            continue
        document = read_json_object(file, DOWNLOAD)
        if keys is TOKENIZER_CONFIG:
            # transformers takes every key of this ending as the name of a special token.
            document = {
                key: value
                for key, value in document.items()
                if not (key.endswith("_token") and isinstance(value, (str, dict)))
            }
        ConfigReader(document, keys, name)


def accepted_keys(path: Path, config: Mapping[str, Any]) -> list[str]:
    """The keys of a checkpoint's documents that a person accepts knowingly, each as 'FILE: KEY'."""
    documents = {"config.json": config}
    for name in BESIDE:
        if (path / name).is_file():
            documents[name] = read_json_object(path / name, DOWNLOAD)
    return [
        f"{name}: {key}"
        for name, values in documents.items()
        for key in sorted(accepted_in(values, name))
    ]
