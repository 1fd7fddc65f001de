"""Merge a PEFT adapter into its base model, and prove that the merged model gives the adapter
model's scores; or replace a mixture of experts by one MLP, or by a shared one and differences.

Runtimes on small devices run plain weights only, and a merge that goes wrong does so silently, so
an adapter's scores are compared before anything is written and once more from what was written. The
replacement of experts is in moe/densify.py and moe/shared_expert_base.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from edgemed.console import say, track
from edgemed.data.image_sets import calibration_digests
from edgemed.data.text_sets import calibration_sequences, card_names
from edgemed.errors import EdgemedError, need
from edgemed.models.adapter_files import (
    OWN_BASE,
    adapter_config,
    adapter_hashes,
    quantized_base,
)
from edgemed.models.checkpoint import (
    Checkpoint,
    Writer,
    companion_files,
    narrowed,
    open_checkpoint,
)
from edgemed.models.hf_offline import quiet_and_offline
from edgemed.models.peft_merge import adapted_model, merged_model, peft_config, text_config
from edgemed.models.tokenizer import open_tokenizer
from edgemed.models.weights import CanonicalWeights
from edgemed.params import Doc, Range

if TYPE_CHECKING:
    import torch

    from edgemed.moe.settings import ExpertMergeSettings

# Largest difference between scores before and after, as a share of the largest score (at least 1).
TOLERANCE = 1e-4
# Random token sequences whose scores are compared, and tokens of each.
CHECKED_SEQUENCES = 4
CHECKED_TOKENS = 64


@dataclass(frozen=True)
class Params:
    """What is merged. What a field is for stands at the field."""

    adapter: Annotated[str | None, Doc("A PEFT directory.")] = None
    alpha: Annotated[
        float,
        Range(0, 1),
        Doc(
            "W = W_base + alpha (W_merged - W_base) for every weight the adapter changes; for LoRA"
            " that is scaling the adapter. 0 gives the base model, 1 the whole adapter."
        ),
    ] = 1.0
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16", "source"] | None,
        Doc(
            "Of the written weights. Default: float32, and the source's own for experts. 'source'"
            " (the base's own) may round an adapter's small changes away."
        ),
    ] = None
    trained_on: Annotated[
        Literal["float", "nf4", "nf4-double", "int8"] | None,
        Doc(
            "What the adapter's base was in training (QLoRA). With 'nf4', 'nf4-double' (double"
            " quantization) or 'int8' the merge into float weights is another model than the"
            " trained one, and the manifest says how far, measured on `calibration`. 'float': the"
            " base was not quantized."
        ),
    ] = None
    experts: Annotated[
        Literal["dense", "shared_delta"] | None,
        Doc(
            "Instead of an adapter. 'dense' puts one MLP in place of each mixture of experts;"
            " 'shared_delta' one shared MLP, and per expert a difference of `rank` or `density`."
        ),
    ] = None
    rank: Annotated[int | None, Range(1), Doc("Rank of the experts' differences.")] = None
    density: Annotated[
        float | None,
        Range(above=0, below=1),
        Doc("Share of the weights that the experts' differences keep, for example 0.1."),
    ] = None
    weights: Annotated[
        Literal["average", "usage"],
        Doc("Of the experts: their average, or by how often calibration text chose each."),
    ] = "average"
    calibration: Annotated[
        str | None,
        Doc(
            "A text set's name or file. It measures each layer's error and says which differences"
            " of experts matter, or with trained_on measures the difference."
        ),
    ] = None
    samples: Annotated[int, Range(1), Doc("How many calibration samples.")] = 32
    length: Annotated[int, Range(1), Doc("Tokens of each calibration sample.")] = 256


def inputs(params: Params) -> dict[str, str]:
    """sha256 of the adapter's config and weights, or of the calibration text. Raises EdgemedError
    where one is missing, or what was given does not go together.
    """
    if (params.adapter is None) == (params.experts is None):
        both = (
            "both adapter and experts are given"
            if params.adapter
            else "neither adapter nor experts is given"
        )
        raise EdgemedError(
            f"merge: {both}",
            "Give one of the two to a step; an adapter is merged into the model it was trained on,"
            " experts after that",
        )
    _check_differences(params)
    if params.experts:
        _check_experts(params)
        return _text_digests(params)
    return _adapter_inputs(params)


def _check_differences(params: Params) -> None:
    """Raise EdgemedError unless exactly one of rank and density is given where experts share a
    matrix, and none elsewhere.
    """
    if params.experts != "shared_delta":
        if params.rank is not None or params.density is not None:
            raise EdgemedError(
                "merge: rank and density are for experts: shared_delta",
                "Leave them out, or say experts: shared_delta",
            )
        return
    if (params.rank is None) == (params.density is None):
        both = "both rank and density" if params.rank is not None else "neither rank nor density"
        raise EdgemedError(
            f"merge: experts shared_delta with {both}",
            "Give one of them, for example rank: 64 or density: 0.1",
        )


def _check_experts(params: Params) -> None:
    """Raise EdgemedError for parameters of an adapter, or usage without text."""
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


def _adapter_inputs(params: Params) -> dict[str, str]:
    """sha256 of an adapter's files, and of the text that measures its difference. Raises
    EdgemedError where the adapter cannot be merged into float weights just so.
    """
    adapter = _adapter_of(params)
    trained_on = _quantized_in_training(params)
    if (params.calibration and not trained_on) or params.weights != "average":
        raise EdgemedError(
            "merge: calibration and weights are for experts, and an adapter is merged",
            "Leave them out",
        )
    if trained_on and not params.calibration:
        raise EdgemedError(
            f"merge: what an adapter trained on {trained_on} loses is measured on text",
            f"Give calibration: one of {', '.join(card_names())}, or a .jsonl file",
        )
    digests = {f"adapter/{file}": sha for file, sha in adapter_hashes(adapter).items()}
    if OWN_BASE in adapter_config(adapter):
        fix = (
            "Export that checkpoint with it, unmerged: edgemed export QUANTIZED --adapter NAME=DIR"
        )
        raise EdgemedError(
            f"{adapter} was trained beside the integers of a quantized checkpoint, to make good"
            " what quantization did there, and no float weights are its base",
            fix,
        )
    if trained_on:
        return digests | _text_digests(params)
    if params.trained_on is None and (reason := quantized_base(adapter_config(adapter))):
        fix = (
            "Say so: trained_on=nf4 (or nf4-double, int8) with calibration measures what the merge"
            " changes; trained_on=float if it was not"
        )
        raise EdgemedError(
            f"{adapter} was probably trained on a quantized base ({reason}), and merged into float"
            " weights it is another model",
            fix,
        )
    return digests


def _adapter_of(params: Params) -> str:
    """The adapter that is merged. Raises ValueError where experts are merged instead."""
    if params.adapter is None:
        raise ValueError("no adapter is merged")
    return params.adapter


def _quantized_in_training(params: Params) -> Literal["nf4", "nf4-double", "int8"] | None:
    """How the adapter's base was quantized in training, None where it was not."""
    return None if params.trained_on == "float" else params.trained_on


def _text_digests(params: Params) -> dict[str, str]:
    if not params.calibration:
        return {}
    return calibration_digests(params.calibration)


def run(checkpoint: Checkpoint, out: Path, params: Params) -> dict[str, Any]:
    """Write the merged checkpoint to `out`; returns the largest differences between scores and
    their bound, or of experts what `densify.dense` or `shared_expert_base.shared_delta` does.

    Raises EdgemedError for a quantized base, an adapter that is damaged, cannot be merged or
    belongs to another base, and where the merged scores differ from the adapter's.
    """
    if checkpoint.config.get("quantization_config"):
        raise EdgemedError(
            f"{checkpoint.path} is quantized, and quantizing again would undo a merge",
            "Merge into the original checkpoint, then quantize",
        )
    if params.experts:
        inputs(params)
        return _replace_experts(checkpoint, out, params)
    weights = CanonicalWeights(checkpoint)
    for name in track(list(checkpoint.tensors), "check the base model"):
        checkpoint.read(name)
    inputs(params)
    path = _adapter_of(params)
    adapter = peft_config(path)
    trained_on = _quantized_in_training(params)
    is_lora = adapter.peft_type.value == "LORA"
    if trained_on and (not is_lora or adapter.use_dora):
        kind = "DoRA" if is_lora else adapter.peft_type.value
        raise EdgemedError(
            f"{path}: the difference that trained_on measures is known for LoRA only, not for"
            f" {kind}",
            "Give trained_on=float to merge it unmeasured",
        )
    notes, shape = _merge_adapter(weights, out, adapter, params)
    if trained_on and params.calibration:
        notes["trained_on"] = _difference(weights, out, params, trained_on)
    notes["peft_type"] = adapter.peft_type.value
    notes["windows"] = shape
    notes["formula"] = "W = W_base + alpha * (W_merged - W_base)"
    return notes


def _replace_experts(checkpoint: Checkpoint, out: Path, params: Params) -> dict[str, Any]:
    from edgemed.moe.densify import dense
    from edgemed.moe.settings import ExpertMergeSettings
    from edgemed.moe.shared_expert_base import shared_delta

    settings = ExpertMergeSettings(
        weights=params.weights,
        calibration=params.calibration,
        samples=params.samples,
        length=params.length,
        dtype=params.dtype,
        rank=params.rank,
        density=params.density,
    )
    replace: Callable[[Checkpoint, Path, ExpertMergeSettings], dict[str, Any]]
    replace = dense if params.experts == "dense" else shared_delta
    with need("torch", "build").inference_mode():
        return replace(checkpoint, out, settings)


def _merge_adapter(
    weights: CanonicalWeights,
    out: Path,
    adapter: Any,
    params: Params,
) -> tuple[dict[str, Any], list[int]]:
    """Merge, check and write; (the manifest's notes on both checks, shape of the tokens whose
    scores were compared). adapter: its PEFT config.
    """
    from edgemed.models.torch_decoder import logits

    with quiet_and_offline(), need("torch", "build").inference_mode():
        model, grown = adapted_model(weights, _adapter_of(params), adapter)
        if grown and params.alpha != 1:
            raise EdgemedError(
                f"{params.adapter} brings a larger vocabulary, and alpha {params.alpha} asks for a"
                " part of it",
                "Leave alpha out",
            )
        tokens = _checked_tokens(weights)
        expected = _scores(model, tokens)
        merged = merged_model(model, adapter)
        result = _scores(merged, tokens)
        notes: dict[str, Any] = {
            "check_merge": _compare("the merged model", result, expected, TOLERANCE)
        }
        if params.alpha != 1:
            _interpolate(merged, weights, params.alpha)
            expected = _scores(merged, tokens)
        dtypes = _write(merged, weights, out, params.dtype or "float32", grown)
        if grown:
            _copy_tokenizer(Path(_adapter_of(params)), out)
        written = logits(CanonicalWeights(open_checkpoint(out)), tokens)
        if expected.shape[1] == 1:
            # A head scores the last token only.
            written = written[:, -1:]
        # Below float32 the stored weights differ from the merged ones by their rounding, which the
        # manifest then reports.
        bound = TOLERANCE if dtypes == {"float32"} else None
        notes["check_written"] = _compare("the written checkpoint", written, expected, bound)
    return notes, list(tokens.shape)


def _difference(
    weights: CanonicalWeights,
    out: Path,
    params: Params,
    trained_on: Literal["nf4", "nf4-double", "int8"],
) -> dict[str, Any]:
    """How far the written model is from the one that was trained, on calibration text."""
    from edgemed.models.qlora import difference

    samples = calibration_sequences(
        params.calibration or "",
        open_tokenizer(weights.checkpoint.path, weights.decoder.vocab),
        params.samples,
        min(params.length, weights.decoder.context),
        weights.checkpoint.path,
    )
    result = difference(open_checkpoint(out), weights, trained_on, samples)
    say(
        f"merged into float weights, an adapter trained on {trained_on} differs from what was"
        f" trained by a mean KL of {result['mean_kl']:.2g} nats, scores by"
        f" {result['relative_logit_difference']:.1%}"
    )
    return result


def _checked_tokens(weights: CanonicalWeights) -> torch.Tensor:
    """Random tokens int64 [CHECKED_SEQUENCES, tokens], the same at every run."""
    torch = need("torch", "build")
    d = weights.decoder
    generator = torch.Generator().manual_seed(0)
    shape = (CHECKED_SEQUENCES, min(CHECKED_TOKENS, d.context))
    return torch.randint(d.vocab, shape, generator=generator)


def _scores(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Scores [sequences, tokens, vocab] of a language model, [sequences, 1, classes] of a head."""
    torch = need("torch", "build")
    rows = [model(input_ids=row, use_cache=False).logits for row in tokens.split(1)]
    return torch.cat([row if row.dim() == 3 else row[:, None] for row in rows])


def _compare(
    what: str, scores: torch.Tensor, expected: torch.Tensor, bound: float | None
) -> dict[str, float | None]:
    """The largest difference between scores, for the manifest. Raises EdgemedError where it is
    above `bound` times the largest score; None: no bound.
    """
    scale = max(1.0, float(expected.abs().max()))
    error = float((scores - expected).abs().max())
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
    names = {}
    for name, part in weights.parts.items():
        for module, key in zip(part.modules, weights.keys[name], strict=True):
            places = list(_places(weights, module))
            # Weights first, then biases: the order in which they are written.
            if part.weight(key) in weights.checkpoint.tensors:
                for place in places:
                    names[part.weight(place)] = part.weight(key)
            if f"{key}.bias" in weights.checkpoint.tensors:
                for place in places:
                    names[f"{place}.bias"] = f"{key}.bias"
    return names


def _places(weights: CanonicalWeights, module: str) -> Iterator[str]:
    """Every name a module may have in transformers' model."""
    for choice in module.split("|"):
        for prefix in weights.family.prefixes:
            yield prefix + choice


def _interpolate(merged: torch.nn.Module, weights: CanonicalWeights, alpha: float) -> None:
    stored = _stored(weights)
    for name, parameter in merged.named_parameters():
        key = stored.get(name, name)
        # A head that only the adapter has stays whole: there is nothing to interpolate from.
        if key in weights.checkpoint.tensors:
            base = weights.checkpoint.read(key).float()
            parameter.copy_(base + alpha * (parameter - base))


def _copy_tokenizer(adapter: Path, out: Path) -> None:
    """The tokenizer that was trained with the adapter, in place of the base's smaller one."""
    if not any((adapter / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        say(f"{adapter} brings new tokens and no tokenizer; the base's lacks them")
        return
    for file in companion_files(adapter):
        target = out / file.relative_to(adapter)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def _write(
    merged: Any, weights: CanonicalWeights, out: Path, dtype: str, grown: int | None
) -> set[str]:
    """Write the merged weights; returns the dtypes used. merged: a transformers model; grown: its
    new number of tokens.
    """
    dtype = _written_dtype(weights, dtype)
    is_text_model = text_config(weights) is None
    config = dict(weights.checkpoint.config)
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    _set_everywhere(config, "tie_word_embeddings", merged.config.tie_word_embeddings)
    if grown:
        _set_everywhere(config, "vocab_size", grown)
    if is_text_model:
        config["architectures"] = [type(merged).__name__]
        is_other = merged.config.architectures != config["architectures"]
        if weights.decoder.head == "lm" and is_other:
            # The adapter brought a head for classes.
            config["id2label"] = merged.config.id2label
            config["label2id"] = merged.config.label2id
    writer = Writer(out, config, weights.checkpoint.path)
    # named_parameters gives a tied matrix once.
    parameters = list(merged.named_parameters())
    for name, parameter in track(parameters, "write the merged model"):
        writer.add(name, narrowed(name, parameter.data, dtype))
    if not is_text_model:
        written = {name for name, _ in parameters}
        for key in _stored(weights).values():
            if key not in written:
                writer.add(key, narrowed(key, weights.checkpoint.read(key), dtype))
    writer.close()
    return {dtype}


def _set_everywhere(config: dict[str, Any], key: str, value: Any) -> None:
    """Set a key of config.json, and of the text model's numbers where they have it too."""
    text = config.get("text_config")
    if isinstance(text, dict) and key in text:
        config["text_config"] = {**text, key: value}
    if key in config or not isinstance(text, dict) or key == "tie_word_embeddings":
        config[key] = value


def _written_dtype(weights: CanonicalWeights, dtype: str) -> str:
    """The dtype to write; 'source' is the widest among the base's own."""
    if dtype != "source":
        return dtype
    entries = weights.checkpoint.tensors.values()
    dtypes = {entry.dtype for entry in entries if "float" in entry.dtype}
    return "float32" if "float32" in dtypes else min(dtypes)
