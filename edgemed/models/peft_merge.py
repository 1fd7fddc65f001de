"""A base model with an adapter in place, and merged, by peft itself.

peft is the definition of what an adapter does; what is decided here is which base it gets, under
which names, and that nothing is left out: every tensor must have a place, every place a tensor.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgemed.console import say
from edgemed.errors import EdgemedError, nearest, need
from edgemed.models.adapter_files import (
    adapter_config,
    adapter_entries,
    adapter_tensors,
    check_ranks,
)
from edgemed.models.adapter_names import (
    PREFIX,
    ModuleNames,
    module_names,
    renamed_config,
    renamed_tensors,
    without_copies,
)
from edgemed.models.hf_offline import native_config
from edgemed.models.weights import CanonicalWeights, Dense

if TYPE_CHECKING:
    import torch

# What peft raises for configs that do not go with a model.
PEFT_ERRORS = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    RuntimeError,
    NotImplementedError,
    ImportError,
)
HINT = "Give the base model the adapter was trained on"


def peft_config(adapter: str) -> Any:
    """peft's config of an adapter. Raises EdgemedError for a type that it does not know, that
    cannot be merged, or whose values do not go together.
    """
    peft = need("peft", "build")
    values = adapter_config(adapter)
    kind = values["peft_type"]
    if kind not in peft.PEFT_TYPE_TO_CONFIG_MAPPING:
        types = [key.value for key in peft.PEFT_TYPE_TO_CONFIG_MAPPING]
        raise EdgemedError(
            f"{adapter}: the installed peft knows no adapter type '{kind[:80]}'",
            nearest(kind[:80], types),
        )
    check_ranks(adapter, values, adapter_entries(adapter))
    known = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind].__dataclass_fields__
    unknown = next((key for key, value in values.items() if key not in known and value), None)
    if unknown is not None and kind != "LORA":
        raise EdgemedError(
            f"{adapter}: its config has the key {unknown[:80]}, which the installed peft does not"
            " know",
            "Write the adapter again with that peft",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = peft.PeftConfig.from_pretrained(adapter)
    except PEFT_ERRORS as error:
        raise EdgemedError(f"{adapter}: {_line(error)}", "Copy the adapter again") from None
    if config.is_prompt_learning:
        raise EdgemedError(
            f"{adapter}: a {kind} adapter cannot be merged: it adds virtual tokens to the input and"
            " changes no weight",
            "Train a LoRA or another adapter of weights",
        )
    config.inference_mode = True
    if config.task_type != "SEQ_CLS":
        # peft's wrapper of a task only adds methods that a base with another head lacks; the one
        # for classes adds the head.
        config.task_type = None
    return config


def text_config(weights: CanonicalWeights) -> dict[str, Any] | None:
    """The config of a vision model's text model, None for a model that is one itself."""
    if weights.family.text_config is None:
        return None
    return weights.family.text_config(weights.checkpoint.config)


def adapted_model(
    weights: CanonicalWeights, adapter: str, config: Any
) -> tuple[torch.nn.Module, int | None]:
    """(the base in float32 with the adapter in place, the new size of its vocabulary or None).

    config: as `peft_config` gives it. Raises EdgemedError for an adapter of another base, and for
    tensors that are missing or have no place.
    """
    where = f"adapter {adapter}"
    tensors = without_copies(where, adapter_tensors(adapter))
    base = _load_base(weights, config, tensors)
    names = module_names(weights, (name for name, _ in base.named_modules()))
    tensors, renamed = renamed_tensors(where, tensors, names)
    if renamed:
        leaves = [name for name, module in base.named_modules() if _has_weights(module)]
        changes = renamed_config(adapter_config(adapter), names, renamed, leaves)
        for key, value in changes.items():
            if hasattr(config, key):
                setattr(config, key, set(value) if key == "target_modules" else value)
    grown = _grow_vocabulary(where, base, tensors, names)
    return _apply(base, config, tensors, weights.checkpoint.path), grown


def merged_model(model: Any, config: Any) -> torch.nn.Module:
    """The plain model with the adapter merged. Raises EdgemedError where peft cannot merge it."""
    try:
        if not hasattr(model.base_model, "merge_and_unload"):
            raise NotImplementedError("it changes no weight of the model")
        merged: torch.nn.Module = model.base_model.merge_and_unload().eval()
    except PEFT_ERRORS as error:
        problem = (
            f"a {config.peft_type.value} adapter cannot be merged:"
            f" {_line(error) or 'peft has no merge for it'}"
        )
        raise EdgemedError(problem, "Train a LoRA or another mergeable adapter") from None
    return merged


def _line(error: BaseException) -> str:
    """The first line of what another library says."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else ""


def _has_weights(module: torch.nn.Module) -> bool:
    return next(module.children(), None) is None and any(True for _ in module.parameters())


def _load_base(
    weights: CanonicalWeights, config: Any, tensors: Mapping[str, torch.Tensor]
) -> torch.nn.Module:
    """The base in float32, with the adapter's head where it brings one."""
    torch = need("torch", "build")
    transformers = need("transformers", "build")
    classes = weights.family.auto_classes
    head = weights.decoder.head
    options: dict[str, Any] = {}
    if head == "lm" and config.task_type == "SEQ_CLS":
        head = "classes"
        options["num_labels"] = 2
        for name, tensor in tensors.items():
            if name.endswith(".score.weight"):
                options["num_labels"] = tensor.shape[0]
                break
    elif head != "lm":
        options["num_labels"] = weights.decoder.head_size
    if head not in classes:
        raise EdgemedError(
            f"{weights.checkpoint.path}: cannot merge into a model with a '{head}' head",
            f"Known heads: {', '.join(classes)}",
        )
    auto_class = classes[head]
    text = text_config(weights)
    if text is not None:
        # An adapter of such a checkpoint was trained on its text model; the rest is copied.
        auto_class = "AutoModelForCausalLM"
        options["config"] = native_config(text)
    model, info = getattr(transformers, auto_class).from_pretrained(
        weights.checkpoint.path,
        dtype=torch.float32,
        local_files_only=True,
        output_loading_info=True,
        **options,
    )
    absent = []
    for name in info["missing_keys"]:
        is_brought = f"{PREFIX}{name}" in tensors
        if not is_brought and not _fill_head(model, weights, name):
            absent.append(name)
    if absent:
        problem = (
            f"{weights.checkpoint.path}: transformers finds no weights for {', '.join(absent)}"
        )
        raise EdgemedError(problem, "The checkpoint or the adapter is incomplete")
    # One sequence at a time is scored here, so nothing is padding.
    model.config.pad_token_id = None
    return model.eval()


def _fill_head(model: torch.nn.Module, weights: CanonicalWeights, name: str) -> bool:
    """Copy a head that the checkpoint stores under another name than transformers does; False where
    `name` is no such head.
    """
    part = weights.parts.get("head")
    if part is None or name.removesuffix(".weight") not in part.modules[0].split("|"):
        return False
    head = weights.matrix("head")
    if not isinstance(head, Dense):
        raise ValueError("the head is quantized")
    if head.bias is not None:
        problem = (
            f"{weights.checkpoint.path}: its head has a bias, which transformers' '{name}' has no"
            " room for"
        )
        raise EdgemedError(problem, "Merge the adapter with the code that trained it")
    model.get_parameter(name).copy_(head.weight)
    return True


def _grow_vocabulary(
    where: str, base: Any, tensors: Mapping[str, torch.Tensor], names: ModuleNames
) -> int | None:
    """Widen the base's embedding where the adapter brings a larger one, with its output matrix.
    Returns the new number of tokens, None where it stays.

    Raises EdgemedError where the adapter was trained with another vocabulary and does not bring
    all rows of it.
    """
    modules = {id(module): name for name, module in base.named_modules()}
    table = base.get_input_embeddings()
    output = base.get_output_embeddings()
    rows = table.weight.shape[0]
    places = [modules[id(module)] for module in (table, output) if module is not None]
    whole = {}
    asked = {}
    for tensor, value in tensors.items():
        _, module, rest = names.split(tensor)
        if module not in places:
            continue
        if rest in ("weight", "base_layer.weight"):
            whole[module] = asked[module] = value.shape[0]
        elif rest == "lora_embedding_A":
            asked[module] = value.shape[-1]
        elif rest == "lora_B.weight":
            asked[module] = value.shape[0]
    sizes = set(asked.values())
    if not sizes or sizes == {rows}:
        return None
    (size, *more) = sorted(sizes, reverse=True)
    is_tied = output is None or output.weight is table.weight
    needed = places[:1] if is_tied else places
    if more or size < rows or any(place not in whole for place in needed):
        raise EdgemedError(
            f"{where} was trained with a vocabulary of {size} tokens, its base has {rows}",
            "Resize the base as it was resized for training (resize_token_embeddings), save it, and"
            " give that",
        )
    say(f"{where} brings an embedding of {size} tokens; the base has {rows} and is widened")
    base.resize_token_embeddings(size, mean_resizing=False)
    return size


def _apply(
    base: torch.nn.Module, config: Any, tensors: dict[str, torch.Tensor], path: object
) -> torch.nn.Module:
    """The base with the adapter in place. Every tensor of the adapter must have its place and its
    shape.
    """
    peft = need("peft", "build")
    other = f"the adapter does not belong to {path}"
    try:
        model = peft.get_peft_model(base, config).eval()
    except PEFT_ERRORS as error:
        # For target modules that are not there, or not of a kind this adapter type knows.
        raise EdgemedError(f"{other}: {_line(error)}", HINT) from None
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    expected = {name: tensor.shape for name, tensor in state.items()}
    places = {name: tensor.shape for name, tensor in model.state_dict().items()} | expected
    for name, tensor in tensors.items():
        if name not in places:
            raise EdgemedError(f"{other}: it has no place for '{name}'", HINT)
        if places[name] != tensor.shape:
            raise EdgemedError(
                f"{other}: '{name}' is {list(tensor.shape)}, the base needs {list(places[name])}",
                HINT,
            )
    absent = [name for name in expected if name not in tensors]
    if absent:
        raise EdgemedError(
            f"{other}: the adapter has no '{absent[0]}', which its config asks for",
            "Copy the adapter again",
        )
    _untie(base, model)
    try:
        peft.set_peft_model_state_dict(model, tensors)
    except PEFT_ERRORS as error:
        raise EdgemedError(f"{other}: {_line(error)}", HINT) from None
    return model


def _untie(base: Any, model: Any) -> None:
    """Give a tied output its own weights where the adapter changes only one of the two: after
    merging they differ.
    """
    torch = need("torch", "build")
    tuner = need("peft.tuners.tuners_utils", "build").BaseTunerLayer
    first = model.get_input_embeddings()
    last = model.get_output_embeddings()
    inner = first.get_base_layer() if isinstance(first, tuner) else first
    outer = last.get_base_layer() if isinstance(last, tuner) else last
    is_adapted = isinstance(first, tuner) or isinstance(last, tuner)
    if is_adapted and outer is not None and outer.weight is inner.weight:
        outer.weight = torch.nn.Parameter(outer.weight.detach().clone(), requires_grad=False)
        base.config.tie_word_embeddings = False
