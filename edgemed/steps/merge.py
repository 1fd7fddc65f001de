"""Merge a PEFT adapter into its base model, and prove that the merged model gives the adapter
model's scores; or experts into one MLP, or a shared one and differences.

Runtimes on small devices run plain weights only, and a merge that goes wrong does so silently, so
an adapter's scores are compared before anything is written and once more from what was written.
What becomes of experts is in experts.py and deltas.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgemed.console import say, track
from edgemed.data.image_sets import calibration_digests
from edgemed.data.text_sets import calibration_sequences, card_names
from edgemed.errors import EdgemedError, nearest, need
from edgemed.models.checkpoint import Checkpoint, Writer, narrowed, open_checkpoint
from edgemed.models.hf_offline import quiet_and_offline
from edgemed.models.lora import (
    OWN_BASE,
    adapter_config,
    adapter_hashes,
    adapter_tensors,
    quantized_base,
)
from edgemed.models.qlora import difference
from edgemed.models.tokenizer import open_tokenizer
from edgemed.models.torch_decoder import logits
from edgemed.models.weights import CanonicalWeights
from edgemed.moe.densify import dense
from edgemed.moe.shared_expert_base import check, shared_delta

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-4
WINDOWS = 4
WIDTH = 64


@dataclass(frozen=True)
class Params:
    """adapter: a PEFT directory. alpha: W = W_base + alpha (W_merged - W_base) for every weight the
    adapter changes; for LoRA that is scaling the adapter. dtype of the written weights: float32
    where none is given, and the source's own for experts; 'source' (the base's own) may round an
    adapter's small changes away. trained_on: what the adapter's base was in training (QLoRA): with
    'nf4', 'nf4-double' (double quantization) or 'int8' the merge into float weights is another
    model than the trained one, and the manifest says how far, measured on `calibration`; 'float'
    says that the base was not quantized.

    experts, instead of an adapter: 'dense' puts one MLP in place of each mixture; 'shared_delta'
    one shared MLP, and per expert a difference of this rank, or with this share of the weights
    (density). weights: 'average' of the experts, or by how often calibration text chose each
    ('usage'). calibration: a text set's name or file, of which `samples` windows of `length` tokens
    also measure each layer's error and say which differences matter, or with trained_on the
    difference.
    """

    adapter: str | None = None
    alpha: float = 1.0
    dtype: Literal["float32", "float16", "bfloat16", "source"] | None = None
    trained_on: Literal["float", "nf4", "nf4-double", "int8"] | None = None
    experts: Literal["dense", "shared_delta"] | None = None
    rank: int | None = None
    density: float | None = None
    weights: Literal["average", "usage"] = "average"
    calibration: str | None = None
    samples: int = 32
    length: int = 256


def inputs(params: Params) -> dict[str, str]:
    """sha256 of the adapter's config and weights, or of the calibration text. Raises EdgemedError
    where one is missing, or what was given does not go together.
    """
    if (params.adapter is None) == (params.experts is None):
        given = (
            "both adapter and experts are given"
            if params.adapter
            else "neither adapter nor experts is given"
        )
        raise EdgemedError(
            f"merge: {given}",
            "Give one of the two to a step; an adapter is merged into the model it was trained on,"
            " experts after that",
        )
    if params.experts == "shared_delta":
        check(params)
    elif params.rank is not None or params.density is not None:
        raise EdgemedError(
            "merge: rank and density are for experts: shared_delta",
            "Leave them out, or say experts: shared_delta",
        )
    if params.experts:
        if params.weights == "usage" and not params.calibration:
            raise EdgemedError(
                "merge: weights 'usage' needs calibration text",
                f"Give calibration: one of {', '.join(card_names())}, or a .jsonl file",
            )
        if params.alpha != 1:
            raise EdgemedError(
                f"merge: alpha {params.alpha} is an adapter's, and experts are merged",
                "Leave alpha out",
            )
        if params.trained_on:
            raise EdgemedError(
                "merge: trained_on is an adapter's, and experts are merged", "Leave it out"
            )
        return calibration_digests(params.calibration) if params.calibration else {}
    if (params.calibration and not rounded_base(params)) or params.weights != "average":
        raise EdgemedError(
            "merge: calibration and weights are for experts, and an adapter is merged",
            "Leave them out",
        )
    if rounded_base(params) and not params.calibration:
        raise EdgemedError(
            f"merge: what an adapter trained on {params.trained_on} loses is measured on text",
            f"Give calibration: one of {', '.join(card_names())}, or a .jsonl file",
        )
    found = {f"adapter/{file}": sha for file, sha in adapter_hashes(params.adapter).items()}
    if OWN_BASE in adapter_config(params.adapter):
        fix = (
            "Export that checkpoint with it, unmerged: edgemed export QUANTIZED --adapter NAME=DIR"
        )
        raise EdgemedError(
            f"{params.adapter} was trained beside the integers of a quantized checkpoint, to make"
            " good what rounding did there, and no float weights are its base",
            fix,
        )
    if rounded_base(params):
        return found | calibration_digests(params.calibration)
    if params.trained_on is None and (reason := quantized_base(adapter_config(params.adapter))):
        fix = (
            "Say so: trained_on=nf4 (or nf4-double, int8) with calibration measures what the merge"
            " changes; trained_on=float if it was not"
        )
        raise EdgemedError(
            f"{params.adapter} was probably trained on a quantized base ({reason}), and merged into"
            " float weights it is another model",
            fix,
        )
    return found


def rounded_base(params: Params) -> bool:
    return params.trained_on not in (None, "float")


def run(checkpoint: Checkpoint, out: Path, params: Params) -> dict[str, Any]:
    """Write the merged checkpoint to `out`; returns the largest differences between scores and
    their bound, or of experts what `experts.dense` or `deltas.shared_delta` does.

    Raises EdgemedError for a quantized base, an adapter that is damaged, cannot be merged or
    belongs to another base, and where the merged scores differ from the adapter's.
    """
    if checkpoint.config.get("quantization_config"):
        raise EdgemedError(
            f"{checkpoint.path} is quantized, and rounding would undo a merge",
            "Merge into the original checkpoint, then quantize",
        )
    if params.experts:
        inputs(params)
        with need("torch", "build").inference_mode():
            return (dense if params.experts == "dense" else shared_delta)(checkpoint, out, params)
    if not 0 <= params.alpha <= 1:
        raise EdgemedError(
            f"merge: alpha {params.alpha} is not between 0 and 1",
            "0 gives the base model, 1 the whole adapter",
        )
    torch = need("torch", "build")
    weights = CanonicalWeights(checkpoint)
    for name in track(list(checkpoint.tensors), "check the base model"):
        checkpoint.read(name)
    inputs(params)
    adapter = _adapter_config(params.adapter)
    tensors = adapter_tensors(params.adapter)
    if rounded_base(params) and (adapter.peft_type.value != "LORA" or adapter.use_dora):
        kind = "DoRA" if adapter.peft_type.value == "LORA" else adapter.peft_type.value
        raise EdgemedError(
            f"{params.adapter}: the difference that trained_on measures is known for LoRA only, not"
            f" for {kind}",
            "Give trained_on=float to merge it unmeasured",
        )
    with quiet_and_offline(), torch.inference_mode():
        model = _apply(_load_base(weights, adapter, tensors), adapter, tensors, checkpoint)
        tokens = _windows(weights)
        expected = _scores(model, tokens)
        merged = _merge(model, adapter)
        notes = {
            "check_merge": _compare(
                "the merged model", _scores(merged, tokens), expected, TOLERANCE
            )
        }
        if params.alpha != 1:
            _interpolate(merged, weights, params.alpha)
            expected = _scores(merged, tokens)
        dtypes = _write(merged, weights, out, params.dtype or "float32")
        written = logits(CanonicalWeights(open_checkpoint(out)), tokens)
        written = written if expected.shape[1] > 1 else written[:, -1:]
        # Below float32 the stored weights differ from the merged ones by their rounding, which the
        # manifest then reports.
        bound = TOLERANCE if dtypes == {"float32"} else None
        notes["check_written"] = _compare("the written checkpoint", written, expected, bound)
    if rounded_base(params):
        windows = calibration_sequences(
            params.calibration,
            open_tokenizer(checkpoint.path, weights.decoder.vocab),
            params.samples,
            min(params.length, weights.decoder.context),
            checkpoint.path,
        )
        notes["trained_on"] = difference(open_checkpoint(out), weights, params.trained_on, windows)
        found = notes["trained_on"]
        say(
            f"merged into float weights, an adapter trained on {params.trained_on} differs from"
            f" what was trained by a mean KL of {found['mean_kl']:.2g} nats, scores by"
            f" {found['relative_logit_difference']:.1%}"
        )
    return notes | {
        "peft_type": adapter.peft_type.value,
        "windows": list(tokens.shape),
        "formula": "W = W_base + alpha * (W_merged - W_base)",
    }


def _adapter_config(adapter: str) -> Any:
    peft = need("peft", "build")
    kind = adapter_config(adapter)["peft_type"]
    if kind not in peft.PEFT_TYPE_TO_CONFIG_MAPPING:
        known = [key.value for key in peft.PEFT_TYPE_TO_CONFIG_MAPPING]
        raise EdgemedError(
            f"{adapter}: the installed peft knows no adapter type '{kind}'",
            nearest(str(kind), known),
        )
    with warnings.catch_warnings():
        # A key of a newer peft is dropped with a warning; if it mattered, the tensors do not fit
        # and are refused below.
        warnings.simplefilter("ignore")
        config = peft.PeftConfig.from_pretrained(adapter)
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


def _load_base(
    weights: CanonicalWeights, adapter: Any, tensors: Mapping[str, torch.Tensor]
) -> torch.nn.Module:
    """The base in float32, with the adapter's head where it brings one."""
    torch = need("torch", "build")
    transformers = need("transformers", "build")
    classes = weights.family.auto_classes
    head = weights.decoder.head
    options = {}
    if head == "lm" and adapter.task_type == "SEQ_CLS":
        head = "classes"
        options["num_labels"] = next(
            (t.shape[0] for name, t in tensors.items() if name.endswith(".score.weight")), 2
        )
    elif head != "lm":
        options["num_labels"] = weights.decoder.head_size
    if head not in classes:
        raise EdgemedError(
            f"{weights.checkpoint.path}: cannot merge into a model with a '{head}' head",
            f"Known heads: {', '.join(classes)}",
        )
    name = classes[head]
    text = (
        weights.family.text_config(weights.checkpoint.config)
        if weights.family.text_config
        else None
    )
    if text is not None:
        # An adapter of such a checkpoint was trained on its text model; the rest is copied.
        name = "AutoModelForCausalLM"
        options = {**options, "config": transformers.AutoConfig.for_model(**text)}
    model, info = getattr(transformers, name).from_pretrained(
        weights.checkpoint.path,
        dtype=torch.float32,
        local_files_only=True,
        output_loading_info=True,
        **options,
    )
    absent = [
        name
        for name in info["missing_keys"]
        if f"base_model.model.{name}" not in tensors and not _fill_head(model, weights, name)
    ]
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
    if head.bias is not None:
        problem = (
            f"{weights.checkpoint.path}: its head has a bias, which transformers' '{name}' has no"
            " room for"
        )
        raise EdgemedError(problem, "Merge the adapter with the code that trained it")
    model.get_parameter(name).copy_(head.weight)
    return True


def _apply(
    base: torch.nn.Module, config: Any, tensors: dict[str, torch.Tensor], checkpoint: Checkpoint
) -> torch.nn.Module:
    """The base with the adapter in place. Every tensor of the adapter must have its place and its
    shape.
    """
    peft = need("peft", "build")
    other = f"the adapter does not belong to {checkpoint.path}"
    hint = "Give the base model the adapter was trained on"
    try:
        model = peft.get_peft_model(base, config).eval()
    except (ValueError, TypeError) as error:
        # peft raises these for target modules that are not there, or not of a kind this adapter
        # type knows.
        raise EdgemedError(f"{other}: {str(error).splitlines()[0]}", hint) from None
    asked = {
        name: tensor.shape
        for name, tensor in peft.get_peft_model_state_dict(
            model, save_embedding_layers=False
        ).items()
    }
    places = {name: tensor.shape for name, tensor in model.state_dict().items()} | asked
    for name, tensor in tensors.items():
        if name not in places:
            raise EdgemedError(f"{other}: it has no place for '{name}'", hint)
        if places[name] != tensor.shape:
            raise EdgemedError(
                f"{other}: '{name}' is {list(tensor.shape)}, the base needs {list(places[name])}",
                hint,
            )
    absent = [name for name in asked if name not in tensors]
    if absent:
        raise EdgemedError(
            f"{other}: the adapter has no '{absent[0]}', which its config asks for",
            "Copy the adapter again",
        )
    _untie(base, model)
    peft.set_peft_model_state_dict(model, tensors)
    return model


def _untie(base: torch.nn.Module, model: torch.nn.Module) -> None:
    """Give a tied output its own weights where the adapter changes only one of the two: after
    merging they differ.
    """
    torch = need("torch", "build")
    tuner = need("peft.tuners.tuners_utils", "build").BaseTunerLayer
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    inner, outer = (end.get_base_layer() if isinstance(end, tuner) else end for end in ends)
    if (
        any(isinstance(end, tuner) for end in ends)
        and outer is not None
        and outer.weight is inner.weight
    ):
        outer.weight = torch.nn.Parameter(outer.weight.detach().clone(), requires_grad=False)
        base.config.tie_word_embeddings = False


def _merge(model: torch.nn.Module, config: Any) -> torch.nn.Module:
    try:
        if not hasattr(model.base_model, "merge_and_unload"):
            raise NotImplementedError("it changes no weight of the model")
        return model.base_model.merge_and_unload().eval()
    except NotImplementedError as error:
        problem = (
            f"a {config.peft_type.value} adapter cannot be merged:"
            f" {str(error) or 'peft has no merge for it'}"
        )
        raise EdgemedError(problem, "Train a LoRA or another mergeable adapter") from None


def _windows(weights: CanonicalWeights) -> torch.Tensor:
    torch = need("torch", "build")
    d = weights.decoder
    generator = torch.Generator().manual_seed(0)
    return torch.randint(d.vocab, (WINDOWS, min(WIDTH, d.context)), generator=generator)


def _scores(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Scores [windows, tokens, vocab] of a language model, [windows, 1, classes] of a head."""
    torch = need("torch", "build")
    rows = [model(input_ids=row, use_cache=False).logits for row in tokens.split(1)]
    return torch.cat([row if row.dim() == 3 else row[:, None] for row in rows])


def _compare(
    what: str, found: torch.Tensor, expected: torch.Tensor, bound: float | None
) -> dict[str, float | None]:
    scale = max(1.0, float(expected.abs().max()))
    error = float((found - expected).abs().max())
    if bound is not None and not error <= bound * scale:
        raise EdgemedError(
            f"{what} does not give the adapter model's scores: largest difference {error:.3g},"
            f" allowed {bound * scale:.3g}",
            "This type of adapter does not merge faithfully; do not deploy it merged",
        )
    return {
        "max_abs_error": error,
        "largest_score": scale,
        "bound": None if bound is None else bound * scale,
    }


def _stored(weights: CanonicalWeights) -> dict[str, str]:
    """Every name a parameter may have in transformers' model -> the tensor's name in the
    checkpoint, which may be of an older layout.
    """
    found = {}
    for name, part in weights.parts.items():
        for module, key in zip(part.modules, weights.keys[name], strict=True):
            for tensor, stored in (
                (part.weight, part.weight(key)),
                (lambda m: f"{m}.bias", f"{key}.bias"),
            ):
                found |= {
                    tensor(prefix + choice): stored
                    for choice in module.split("|")
                    for prefix in weights.family.prefixes
                    if stored in weights.checkpoint.tensors
                }
    return found


def _interpolate(merged: torch.nn.Module, weights: CanonicalWeights, alpha: float) -> None:
    stored = _stored(weights)
    for name, parameter in merged.named_parameters():
        key = stored.get(name, name)
        # A head that only the adapter has stays whole: there is nothing to interpolate from.
        if key in weights.checkpoint.tensors:
            base = weights.checkpoint.read(key).float()
            parameter.copy_(base + alpha * (parameter - base))


def _write(merged: torch.nn.Module, weights: CanonicalWeights, out: Path, dtype: str) -> set[str]:
    """Write the merged weights; returns the dtypes used."""
    source = {
        entry.dtype for entry in weights.checkpoint.tensors.values() if "float" in entry.dtype
    }
    chosen = dtype if dtype != "source" else "float32" if "float32" in source else min(source)
    config = {k: v for k, v in weights.checkpoint.config.items() if k != "torch_dtype"}
    whole = (
        weights.family.text_config is None
        or weights.family.text_config(weights.checkpoint.config) is None
    )
    config |= {"dtype": chosen, "tie_word_embeddings": merged.config.tie_word_embeddings} | (
        {"architectures": [type(merged).__name__]} if whole else {}
    )
    if (
        whole
        and weights.decoder.head == "lm"
        and merged.config.architectures != config["architectures"]
    ):
        config |= {"id2label": merged.config.id2label, "label2id": merged.config.label2id}
    writer = Writer(out, config, weights.checkpoint.path)
    written = {name for name, _ in merged.named_parameters()}
    # named_parameters gives a tied matrix once.
    for name, parameter in track(list(merged.named_parameters()), "write the merged model"):
        writer.add(name, narrowed(name, parameter.data, chosen))
    for key in (key for key in _stored(weights).values() if not whole and key not in written):
        writer.add(key, narrowed(key, weights.checkpoint.read(key), chosen))
    writer.close()
    return {chosen}
