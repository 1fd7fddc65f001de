"""A distilled student as transformers trains it: read from a checkpoint, given a LoRA on request,
and written as a checkpoint again.

Of a vision model that transformers does not know, the text model alone is read and trained. Vision
encoder and projector are copied, as they never change.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from edgemed.errors import EdgemedError
from edgemed.models.checkpoint import Writer, narrowed, open_checkpoint
from edgemed.models.hf_offline import native_config
from edgemed.models.torch_decoder import logits
from edgemed.models.weights import CanonicalWeights

TOLERANCE = 1e-4  # of the largest score, between the trained model and what was written


def load(weights: CanonicalWeights, path: Path | None = None) -> Any:
    """The student in transformers, float32. path: of a copy that transformers reads instead.

    Dropout is off: the target is the teacher's own distribution, and what fits it must not be
    blurred. Raises EdgemedError where transformers finds no weights for a part.
    """
    path = path or weights.checkpoint.path
    options: dict[str, Any] = {}
    text_config = _text_config(weights)
    auto_class: Any
    if text_config:
        auto_class = transformers.AutoModelForCausalLM
        options["config"] = native_config(text_config)
    else:
        auto_class = getattr(transformers, weights.family.auto_classes["lm"])
    model, info = auto_class.from_pretrained(
        path, dtype=torch.float32, local_files_only=True, output_loading_info=True, **options
    )
    if info["missing_keys"]:
        raise EdgemedError(
            "distill: transformers finds no weights for"
            f" {', '.join(sorted(info['missing_keys'])[:3])} in {path}",
            "Give a student in transformers' own layout",
        )
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if weights.vision:
        _freeze_vision(model)
    # Sampled text has its full length, as the packed sequences have: after an end of text the next
    # one begins.
    model.generation_config = transformers.GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=0,
    )
    return model


def _freeze_vision(model: Any) -> None:
    """What the images become is fixed: only the text model is trained."""
    trained: set[int] = set()
    for module in (model.get_decoder(), model.get_output_embeddings()):
        trained.update(id(parameter) for parameter in module.parameters())
    for parameter in model.parameters():
        parameter.requires_grad = id(parameter) in trained


def _text_config(weights: CanonicalWeights) -> dict[str, Any] | None:
    """Under which transformers reads the text model alone, None where it knows the whole
    checkpoint.
    """
    if weights.family.text_config is None:
        return None
    return weights.family.text_config(weights.checkpoint.config)


def with_lora(model: Any, rank: int, seed: int) -> Any:
    """The model with peft's LoRA of this rank on all linear layers; rank 0: the model itself. seed:
    of the first values.
    """
    if not rank:
        return model
    torch.manual_seed(seed)
    # Conv1D of transformers stores its weight [in, out].
    has_conv1d = any(type(module).__name__ == "Conv1D" for module in model.modules())
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        fan_in_fan_out=has_conv1d,
    )
    return peft.get_peft_model(model, config)


def write(
    model: torch.nn.Module, student: CanonicalWeights, out: Path, dtype: str
) -> dict[str, float]:
    """Write the student and compare what was written with it: {max_abs_error, largest_score} on
    random tokens. dtype: of the written weights.

    Raises EdgemedError where float32 weights do not give the model's scores.
    """
    config = {
        key: value for key, value in student.checkpoint.config.items() if key != "torch_dtype"
    }
    config["dtype"] = dtype
    text_model_alone = _text_config(student) is not None
    if not text_model_alone:
        config["architectures"] = [type(model).__name__]
    writer = Writer(out, config, student.checkpoint.path)
    written = {name: parameter.data for name, parameter in model.named_parameters()}
    for name, value in written.items():
        writer.add(name, narrowed(name, value, dtype))
    if text_model_alone:
        for name in _vision_tensors(student):
            if name not in written:
                writer.add(name, narrowed(name, student.checkpoint.read(name), dtype))
    writer.close()
    return compare_scores(model, CanonicalWeights(open_checkpoint(out)), dtype == "float32")


def _vision_tensors(student: CanonicalWeights) -> list[str]:
    """Names of the stored tensors of vision encoder and projector."""
    names = []
    for part_name, part in student.parts.items():
        if part_name.startswith("vision."):
            for module in student.keys[part_name]:
                names += [part.weight(module), f"{module}.bias"]
    return [name for name in names if name in student.checkpoint.tensors]


def compare_scores(
    model: torch.nn.Module, written: CanonicalWeights, exact: bool
) -> dict[str, float]:
    """Compare what was written with the trained model: {max_abs_error, largest_score} on random
    tokens.

    exact: raises EdgemedError where the scores are not the model's.
    """
    tokens = torch.randint(
        written.decoder.vocab,
        (2, min(64, written.decoder.context)),
        generator=torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits
    error = float((logits(written, tokens) - expected).abs().max())
    largest = max(1.0, float(expected.abs().max()))
    # `not <=`, so that NaN is an error too.
    if exact and not error <= TOLERANCE * largest:
        raise EdgemedError(
            "the written student does not give the trained one's scores: largest difference"
            f" {error:.3g}",
            "Do not deploy it; this is a bug in edgemed",
        )
    return {"max_abs_error": error, "largest_score": largest}
