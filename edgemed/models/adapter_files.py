"""A PEFT directory: its two files, found, checked and read.

peft builds whatever adapter_config.json asks for before it looks at the weights, and drops keys it
does not know. So values are checked here first: types, patterns, ranks against the stored factors,
and every key is read by somebody, known to be harmless, or refused by its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemed.artifacts.hashing import file_sha256
from edgemed.artifacts.json_files import read_json_object
from edgemed.errors import EdgemedError, need
from edgemed.models.module_patterns import compile_pattern
from edgemed.models.safetensors_file import safetensors_entries
from edgemed.models.tensor_entry import Entry, read_entry, shortened
from edgemed.models.torch_file import torch_entries

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# where LLaVA's training code puts the projector it trained with the adapter
BESIDE = "non_lora_trainables.bin"
# in adapter_config.json: the quantized checkpoint whose integers an adapter was trained beside
OWN_BASE = "edgemed_base"
EMPTY: tuple[Any, ...] = (None, False, "", [], {})
# key of a LoRA's config -> who reads it, or why it changes nothing once it is trained
LORA_KEYS = {
    "peft_type": "read here",
    "r": "checked here, read by peft and lora",
    "lora_alpha": "checked here, read by peft and lora",
    "rank_pattern": "checked here, read by peft",
    "alpha_pattern": "checked here, read by peft and lora",
    "use_rslora": "read by peft and lora",
    "use_dora": "read by peft",
    "fan_in_fan_out": "read by peft; lora reads factors as they are stored",
    "bias": "read by peft",
    "lora_bias": "read by peft",
    "target_modules": "checked here, read by peft",
    "exclude_modules": "checked here, read by peft",
    "target_parameters": "read by peft",
    "layers_to_transform": "checked here, read by peft",
    "layers_pattern": "checked here, read by peft",
    "modules_to_save": "checked here, read by peft",
    "trainable_token_indices": "checked here, read by peft",
    "init_lora_weights": "checked here, read by peft",
    "ensure_weight_tying": "read by peft",
    "task_type": "read by merge",
    "base_model_name_or_path": "read by merge: was its base quantized",
    OWN_BASE: "read by lora",
    "loftq_config": "how it began; init_lora_weights says whether",
    "eva_config": "how it began; init_lora_weights says whether",
    "corda_config": "how it began; init_lora_weights says whether",
    "lora_ga_config": "how it began; init_lora_weights says whether",
    "qalora_group_size": "read only with use_qalora",
    "lora_dropout": "training only",
    "inference_mode": "training only",
    "runtime_config": "where it computes",
    "megatron_core": "read only with megatron_config",
    "auto_mapping": "which class it was trained in",
    "revision": "where its base came from",
    "peft_version": "who wrote it",
    "exclude_targets": "older name without effect",
    "enable_lora": "null in configs of peft 0.2; refused otherwise",
    "merge_weights": "of peft 0.2: false; refused otherwise",
}
# key of a LoRA's config -> why it cannot be merged or carried
REFUSED = {
    "layer_replication": "it repeats layers of the base, which makes another model",
    "alora_invocation_tokens": "it is active only behind certain tokens",
    "arrow_config": "it chooses among several adapters by token",
    "use_qalora": "its factors belong to a quantized base",
    "use_bdlora": "its factors are parted over several devices",
    "megatron_config": "its layers are Megatron's",
    "velora_config": "it compresses activations in training in a way of its own",
    "monteclora_config": "its weights are drawn at random",
    "kasa_config": "it changes the base's own weights",
}
# Ways to begin that peft can go back to when it merges; others took something out of the base's
# weights that needs the data of the training.
BEGINNINGS = ("gaussian", "eva", "orthogonal", "pissa", "olora", "loftq", "mica")
LOST_BEGINNINGS = ("corda", "lora_ga")
# Largest number that a config may hold; NaN is not below it.
MOST_ALPHA = 1e30
# Sizes up to this many elements are never too large.
LEAST_SIZE = 256
# Sizes that peft reserves memory by, of adapters of any kind.
SIZES = (
    *("r", "init_r", "target_r", "n_frequency", "num_vectors", "vector_length"),
    *("block_size", "oft_block_size", "boft_block_size", "boft_block_num"),
)
DAMAGED = "Copy the adapter again"


def adapter_files(adapter: str) -> tuple[Path, Path]:
    """(config, weights) of a PEFT directory. Raises EdgemedError where one is missing, or weights
    lie there that peft does not know.
    """
    path = Path(adapter)
    if not path.is_dir():
        raise EdgemedError(
            f"adapter directory {path} does not exist",
            f"Give a PEFT directory ({CONFIG} and {WEIGHTS[0]})",
        )
    weights = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    if not (path / CONFIG).is_file():
        raise EdgemedError(
            f"{path} has no {CONFIG}", "Give a directory written by peft's save_pretrained"
        )
    if weights is None:
        raise EdgemedError(
            f"{path} has no {WEIGHTS[0]}", "Give a directory written by peft's save_pretrained"
        )
    if (path / BESIDE).is_file():
        raise EdgemedError(
            f"{path / BESIDE} holds weights that peft does not know and a merge would lose",
            "Merge the adapter with the code that trained it",
        )
    return path / CONFIG, weights


def adapter_hashes(adapter: str) -> dict[str, str]:
    """file -> sha256 of a PEFT directory's config and weights."""
    return {file.name: file_sha256(file) for file in adapter_files(adapter)}


def adapter_config(adapter: str) -> dict[str, Any]:
    """What adapter_config.json says. Raises EdgemedError where it is no JSON object with a
    peft_type, or a LoRA's holds values of a wrong type, or a key that is not read.
    """
    file, _ = adapter_files(adapter)
    try:
        values = read_json_object(file, DAMAGED)
    except EdgemedError as error:
        raise EdgemedError(f"{file} is damaged: {error.problem}", DAMAGED) from None
    kind = values.get("peft_type")
    if not isinstance(kind, str):
        raise EdgemedError(f"{file} is damaged: it has no peft_type", DAMAGED)
    if kind == "LORA":
        _check_keys(file, values)
    _check_values(file, values)
    return values


def adapter_entries(adapter: str) -> dict[str, Entry]:
    """tensor -> where it lies in an adapter's file. Raises EdgemedError for a damaged file."""
    _, file = adapter_files(adapter)
    try:
        if file.suffix == ".safetensors":
            return safetensors_entries(file)
        return torch_entries(file)
    except EdgemedError as error:
        reason = error.problem
        words = reason.removeprefix(f"{file} ")
        if words != reason and "damaged" not in words:
            reason = f"{file} is damaged: it {words}"
        raise EdgemedError(reason, DAMAGED) from None


def adapter_tensors(adapter: str) -> dict[str, torch.Tensor]:
    """Every tensor of an adapter. Raises EdgemedError for a damaged file, NaN or Inf."""
    torch = need("torch", "build")
    _, file = adapter_files(adapter)
    tensors = {}
    for name, entry in adapter_entries(adapter).items():
        tensor = read_entry(entry)
        if not torch.isfinite(tensor).all():
            raise EdgemedError(
                f"{file.name}: tensor '{name}' holds NaN or Inf",
                "The adapter is damaged; do not deploy it",
            )
        tensors[name] = tensor
    return tensors


def check_ranks(where: str, values: Mapping[str, Any], entries: Mapping[str, Entry]) -> None:
    """Raise EdgemedError for a rank larger than every stored tensor: peft would reserve memory for
    it before it looks at them.
    """
    largest = max((max(entry.shape, default=1) for entry in entries.values()), default=1)
    ranks = {name: values.get(name) for name in SIZES}
    ranks |= {
        f"rank_pattern {key}": rank for key, rank in (values.get("rank_pattern") or {}).items()
    }
    for name, rank in ranks.items():
        if isinstance(rank, int) and rank > max(largest, LEAST_SIZE):
            raise EdgemedError(
                f"{where}: {shortened(name)} is {rank}, and its largest tensor has {largest} rows"
                " or columns",
                DAMAGED,
            )


def quantized_base(values: Mapping[str, Any]) -> str | None:
    """Why an adapter's config makes one think that it was trained on a quantized base, None where
    nothing does: peft itself does not write it down.
    """
    base = str(values.get("base_model_name_or_path") or "")
    method = _method_of(base)
    if method:
        return f"its base {base} is quantized ({method})"
    if re.search(r"(?i)(bnb|nf4|gptq|awq|[48][-_]?bit|int[48])(?![a-z])", base.rpartition("/")[2]):
        return f"its base is called '{base}'"
    if values.get("init_lora_weights") == "loftq":
        return "it began as LoftQ, for a quantized base"
    return None


def _method_of(base: str) -> str | None:
    """The quantization method of a base that lies on this machine, None where it is not one."""
    file = Path(base) / "config.json"
    try:
        if not base or not file.is_file():
            return None
        quantization = read_json_object(file, DAMAGED).get("quantization_config")
    except (EdgemedError, OSError, ValueError):
        # The base is not read for its own sake here, and a name may be no path at all.
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return method if isinstance(method, str) else None


def _check_keys(file: Path, values: Mapping[str, Any]) -> None:
    """Raise EdgemedError for a key that asks for something and is not read."""
    for key, value in values.items():
        if value in EMPTY:
            continue
        if key in REFUSED:
            raise EdgemedError(
                f"{file}: with {key} {shortened(value)} it cannot be merged or carried:"
                f" {REFUSED[key]}",
                "Train a plain LoRA",
            )
        if key in ("enable_lora", "merge_weights") or key not in LORA_KEYS:
            raise EdgemedError(
                f"{file}: the key {shortened(key)} {shortened(value)} is not read",
                "Write the adapter again with peft 0.21 or older, or without it",
            )
    beginning = values.get("init_lora_weights")
    if isinstance(beginning, str):
        stem, iterations, _ = beginning.lower().partition("_niter_")
        # A start of few iterations is another one each time.
        if stem in LOST_BEGINNINGS or iterations:
            raise EdgemedError(
                f"{file}: init_lora_weights '{shortened(beginning)}' took something out of the"
                " base's weights that the adapter does not hold",
                "Save it with path_initial_model_for_weight_conversion, which makes a plain LoRA"
                " of it",
            )
        if stem not in BEGINNINGS:
            raise EdgemedError(
                f"{file}: init_lora_weights '{shortened(beginning)}' is not read",
                f"Known: true, false, {', '.join(BEGINNINGS)}",
            )


def _check_values(file: Path, values: Mapping[str, Any]) -> None:
    """Raise EdgemedError for a value that is not of the type peft takes."""
    for key, (is_right, wanted) in TYPES.items():
        value = values.get(key)
        # Most keys may be null; these two are divided.
        is_null = value is None and not (key in ("r", "lora_alpha") and key in values)
        if not is_null and not is_right(value):
            raise EdgemedError(f"{file}: {key} is {shortened(value)}, and not {wanted}", DAMAGED)
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern, value in (values.get(key) or {}).items():
            compile_pattern(f"{file}: {key}", f"(.*\\.)?({pattern})$")
            is_right = _is_rank if key == "rank_pattern" else _is_number
            if not is_right(value):
                raise EdgemedError(
                    f"{file}: {key} '{shortened(pattern)}' is {shortened(value)}", DAMAGED
                )
    for key in ("target_modules", "exclude_modules"):
        value = values.get(key)
        if isinstance(value, str):
            compile_pattern(f"{file}: {key}", value)
    patterns = values.get("layers_pattern") or []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        compile_pattern(f"{file}: layers_pattern", rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.")
    for pattern in values.get("modules_to_save") or []:
        compile_pattern(f"{file}: modules_to_save", rf"(^|.*\.){pattern}($|\..*)")


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= MOST_ALPHA


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _is_indices(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(index, int) and not isinstance(index, bool) and 0 <= index < 1 << 31
        for index in value
    )


def _is_text_or_names(value: Any) -> bool:
    return _is_text(value) or _is_names(value)


def _is_index_or_indices(value: Any) -> bool:
    return _is_indices(value if isinstance(value, list) else [value])


def _is_tokens(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_indices(indices) for indices in value.values())
    return _is_indices(value)


FLAGS = (
    *("use_rslora", "use_dora", "use_qalora", "lora_bias", "fan_in_fan_out"),
    *("inference_mode", "ensure_weight_tying"),
)
# key -> (whether a value is of its type, what its type is called)
TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "a whole number from 1 on"),
    "init_r": (_is_rank, "a whole number from 1 on"),
    "lora_alpha": (_is_number, "a number"),
    "lora_dropout": (_is_share, "a number from 0 to 1"),
    "rank_pattern": (_is_mapping, "a mapping of names to ranks"),
    "alpha_pattern": (_is_mapping, "a mapping of names to numbers"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    **dict.fromkeys(FLAGS, (_is_flag, "true or false")),
    "init_lora_weights": (
        lambda value: isinstance(value, (bool, str)),
        "true, false or a method's name",
    ),
    "target_modules": (_is_text_or_names, "a pattern or a list of names"),
    "exclude_modules": (_is_text_or_names, "a pattern or a list of names"),
    "layers_pattern": (_is_text_or_names, "a pattern or a list of them"),
    "layers_to_transform": (_is_index_or_indices, "a list of layers"),
    "modules_to_save": (_is_names, "a list of names"),
    "target_parameters": (_is_names, "a list of names"),
    "trainable_token_indices": (_is_tokens, "a list of token ids"),
    "task_type": (_is_text, "a text"),
    "base_model_name_or_path": (_is_text, "a text"),
    "revision": (_is_text, "a text"),
    "peft_version": (_is_text, "a text"),
    "auto_mapping": (_is_mapping, "a mapping"),
    "loftq_config": (_is_mapping, "a mapping"),
    "eva_config": (_is_mapping, "a mapping"),
    "corda_config": (_is_mapping, "a mapping"),
    "lora_ga_config": (_is_mapping, "a mapping"),
    OWN_BASE: (_is_text, "a text"),
}
