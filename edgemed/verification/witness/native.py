"""A checkpoint as transformers reads it: its tokenizer, its stop tokens, its image processor and
its model, local files only and never a checkpoint's own code.

The model need not fit into memory. It is built whole, but without numbers, and the layers that are
not computed are passed over before transformers' own loader fills the rest. So no tensor is renamed
and no layer renumbered: a layer that knows its own number, as GPT-2's scale by layer does, keeps
it.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from edgemed.models import hf_offline
from edgemed.models.architecture import Architecture

LIBRARY = "transformers"
VERSION = transformers.__version__
LOCAL: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}
# What transformers' loaders raise for files that they do not take.
REFUSALS = (
    AssertionError,
    AttributeError,
    ImportError,
    IndexError,
    KeyError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Depth:
    """Which layers are computed, by their numbers in the checkpoint. text: of the text decoder;
    vision: of the vision encoder, empty for a text model.
    """

    text: tuple[int, ...]
    vision: tuple[int, ...] = ()


@dataclass(frozen=True)
class NativeModel:
    """A loaded model. shapes: of its parameters, with every layer; missing: those for which it has
    found no tensor.
    """

    model: Any
    shapes: Mapping[str, tuple[int, ...]]
    missing: frozenset[str]

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, value) of every parameter that was read from a file."""
        for name, value in self.model.named_parameters():
            if name not in self.missing:
                yield name, value.detach()


def native_config(path: Path, config: Mapping[str, Any], family: Architecture) -> Any:
    """transformers' config object of a checkpoint, or of its text model where transformers knows
    that alone; None where it has no class.

    config: config.json. Raises one of REFUSALS where transformers does not take the config.
    """
    text = family.text_config(config) if family.text_config else None
    if text is not None:
        return hf_offline.native_config(text)
    if config.get("model_type") not in CONFIG_MAPPING:
        return None
    return transformers.AutoConfig.from_pretrained(path, **LOCAL)


def changed_config(content: Mapping[str, Any]) -> Any:
    """transformers' config object for other content than config.json's. Raises one of REFUSALS."""
    # A copy, because config classes write into the mappings that they are given.
    return CONFIG_MAPPING[content["model_type"]].from_dict(copy.deepcopy(dict(content)))


def native_class(config: Any, family: Architecture, head: str) -> Any:
    """The class that an Auto class gives for a config; None where there is none."""
    auto = family.auto_classes.get(head)
    if auto is None:
        return None
    return _mapped(auto, config)


def base_class(config: Any) -> Any:
    """The class without a head, for heads that transformers does not have."""
    return _mapped("AutoModel", config)


def _mapped(auto: str, config: Any) -> Any:
    # The table that AutoModel...from_pretrained looks a class up in.
    mapping = getattr(transformers, auto)._model_mapping
    if type(config) not in mapping:
        return None
    kind = mapping[type(config)]
    return kind[0] if isinstance(kind, (tuple, list)) else kind


def load_native(path: Path, kind: Any, config: Any, depth: Depth) -> NativeModel:
    """A model in float32 with the layers of `depth`, filled by transformers' loader from the
    checkpoint's own files.

    Raises one of REFUSALS where transformers does not take them.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def build(self: Any, *args: Any, **named: Any) -> None:
        kind.__init__(self, *args, **named)
        shapes.update(shapes_of(self))
        pass_layers_over(self, depth)

    # A class of the same name and module, because the loader looks renamings up by them.
    fields = {"__init__": build, "__module__": kind.__module__, "__doc__": kind.__doc__}
    reduced: Any = type(kind.__name__, (kind,), fields)
    model, info = reduced.from_pretrained(
        path,
        config=config,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
        **LOCAL,
    )
    return NativeModel(model.eval(), shapes, frozenset(info["missing_keys"]))


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    """name -> shape of every parameter."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def native_shapes(kind: Any, config: Any) -> dict[str, tuple[int, ...]]:
    """The same of a model that is not made. Raises one of REFUSALS for a config that makes none."""
    with torch.device("meta"):
        return shapes_of(kind(config))


def pass_layers_over(model: Any, depth: Depth) -> None:
    """Replace every layer that is not in `depth` by one that gives what it gets and holds no
    numbers.
    """
    decoder = model.get_decoder()
    inside = {id(module) for module in decoder.modules()}
    for module in list(model.modules()):
        if not isinstance(module, torch.nn.ModuleList) or not len(module):
            continue
        if not isinstance(module[0], GradientCheckpointingLayer):
            continue
        computed = depth.text if id(module) in inside else depth.vision
        for number in set(range(len(module))) - set(computed):
            module[number] = _passed_over(module[number])


def _passed_over(layer: Any) -> Any:
    # Of the layer's own class, because hidden states are collected by class, and with its plain
    # attributes, because models look at some of them.
    kind = type(layer)
    fields = {"forward": _unchanged, "__module__": kind.__module__, "__doc__": kind.__doc__}
    subclass: Any = type(kind.__name__, (kind,), fields)
    replacement = subclass.__new__(subclass)
    torch.nn.Module.__init__(replacement)
    for name, value in vars(layer).items():
        replacement.__dict__.setdefault(name, value)
    return replacement


def _unchanged(self: Any, hidden_states: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
    return hidden_states


def native_tokenizer(path: Path, config: Mapping[str, Any]) -> Any:
    """transformers' tokenizer of a checkpoint. For a model that transformers does not know, the one
    that reads tokenizer.json and tokenizer_config.json of any model.

    Raises one of REFUSALS where there is none.
    """
    if config.get("model_type") not in CONFIG_MAPPING:
        return transformers.PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    return transformers.AutoTokenizer.from_pretrained(path, **LOCAL)


def native_image_processor(path: Path) -> Any:
    """transformers' image processor of a checkpoint. Raises one of REFUSALS where there is none."""
    return transformers.AutoImageProcessor.from_pretrained(path, **LOCAL)


def native_processor(path: Path) -> Any:
    """transformers' processor of texts with images, None where it cannot be made: some take
    packages that edgemed does not need (torchvision, for films).
    """
    try:
        processor = transformers.AutoProcessor.from_pretrained(path, **LOCAL)
    except REFUSALS:
        return None
    return processor if hasattr(processor, "image_processor") else None


def processor_template(path: Path, tokenizer: Any, processor: Any) -> str | None:
    """The chat template that transformers' processor takes, None where there is none. processor:
    None where it cannot be made; then the file is read that only processors read, and the
    tokenizer's template stands where it is absent. Raises one of REFUSALS for a damaged file.
    """
    template = tokenizer.chat_template
    file = path / "chat_template.json"
    if processor is not None:
        template = processor.chat_template or template
    elif file.is_file():
        template = json.loads(file.read_text(encoding="utf-8"))["chat_template"]
    return template.get("default") if isinstance(template, dict) else template


def native_stop_ids(path: Path, config: Any) -> tuple[set[int], str]:
    """(ids at which transformers' generate stops, the file that says so): generation_config.json
    where there is one, else config.json.

    config: as native_config gives it. Raises one of REFUSALS for a file that transformers refuses.
    """
    name = "generation_config.json"
    if (path / name).is_file():
        generation = transformers.GenerationConfig.from_pretrained(path, local_files_only=True)
    else:
        name = "config.json"
        generation = transformers.GenerationConfig.from_model_config(config)
    eos = generation.eos_token_id
    if eos is None:
        return set(), name
    return set(eos) if isinstance(eos, (list, tuple)) else {int(eos)}, name


def load_image(path: Path) -> Any:
    """An image file as transformers opens it, RGB."""
    return importlib.import_module("transformers.image_utils").load_image(str(path))


def needs_packages(config: Mapping[str, Any]) -> str:
    """The format of a quantized checkpoint, whose loading takes packages of its own; '' for a float
    checkpoint.
    """
    quantization = config.get("quantization_config") or {}
    return str(quantization.get("quant_method", "")) if isinstance(quantization, Mapping) else ""
