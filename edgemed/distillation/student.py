"""A distilled student as transformers trains it: read from a checkpoint, given a LoRA on request,
and written as a checkpoint again.

Of a model that sees and that transformers does not know, its text model alone is read and trained;
tower and projector are copied, as they never change.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemed.errors import EdgemedError, need
from edgemed.models.checkpoint import Writer, narrowed, open_checkpoint
from edgemed.models.torch_decoder import logits
from edgemed.models.weights import CanonicalWeights

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-4


def load(weights: CanonicalWeights, path: Path | None = None) -> Any:
    """The student in transformers, float32; path: of a copy that transformers reads instead.
    Dropout is off: the target is the teacher's own distribution, and what fits it must not be
    blurred.
    """
    torch = need("torch", "build")
    transformers = need("transformers", "build")
    text = _text_config(weights)
    path = path or weights.checkpoint.path
    options = {}
    auto = getattr(
        transformers, "AutoModelForCausalLM" if text else weights.family.auto_classes["lm"]
    )
    if text:
        options = {"config": transformers.AutoConfig.for_model(**text)}
    model, info = auto.from_pretrained(
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
        # What the images become is fixed: only the text model is trained.
        learned = {
            id(p)
            for module in (model.get_decoder(), model.get_output_embeddings())
            for p in module.parameters()
        }
        for parameter in model.parameters():
            parameter.requires_grad = id(parameter) in learned
    # Sampled text has its full length, as the packed windows have: after an end of text the next
    # one begins.
    model.generation_config = transformers.GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=0,
    )
    return model


def _text_config(weights: CanonicalWeights) -> dict[str, Any] | None:
    """Under which transformers reads the text model alone, None where it knows the whole
    checkpoint.
    """
    return (
        weights.family.text_config(weights.checkpoint.config)
        if weights.family.text_config
        else None
    )


def adapted(model: Any, rank: int, seed: int) -> Any:
    if not rank:
        return model
    peft = need("peft", "build")
    torch = need("torch", "build")
    torch.manual_seed(seed)
    turned = any(type(module).__name__ == "Conv1D" for module in model.modules())
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules="all-linear",
            fan_in_fan_out=turned,
        ),
    )


def write(
    model: torch.nn.Module, student: CanonicalWeights, out: Path, dtype: str
) -> dict[str, float]:
    """Write the student and hold what was written against it: {max_abs_error, largest_score} on
    random tokens.

    Raises EdgemedError where float32 weights do not give the model's scores.
    """
    config = {
        key: value for key, value in student.checkpoint.config.items() if key != "torch_dtype"
    }
    alone = _text_config(student) is not None
    writer = Writer(
        out,
        config | {"dtype": dtype} | ({} if alone else {"architectures": [type(model).__name__]}),
        student.checkpoint.path,
    )
    written = {name: parameter.data for name, parameter in model.named_parameters()}
    for name, value in written.items():
        writer.add(name, narrowed(name, value, dtype))
    for key in (
        key
        for name in student.parts
        if alone and name.startswith("vision.")
        for module in student.keys[name]
        for key in (student.parts[name].weight(module), f"{module}.bias")
    ):
        if key in student.checkpoint.tensors and key not in written:
            writer.add(key, narrowed(key, student.checkpoint.read(key), dtype))
    writer.close()
    return same_scores(model, CanonicalWeights(open_checkpoint(out)), dtype == "float32")


def same_scores(model: torch.nn.Module, written: CanonicalWeights, exact: bool) -> dict[str, float]:
    """Hold what was written against the trained model: {max_abs_error, largest_score} on random
    tokens.

    exact: raises EdgemedError where the scores are not the model's.
    """
    torch = need("torch", "build")
    tokens = torch.randint(
        written.decoder.vocab,
        (2, min(64, written.decoder.context)),
        generator=torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits
    error = float((logits(written, tokens) - expected).abs().max())
    largest = max(1.0, float(expected.abs().max()))
    if exact and not error <= TOLERANCE * largest:
        raise EdgemedError(
            "the written student does not give the trained one's scores: largest difference"
            f" {error:.3g}",
            "Do not deploy it; this is a bug in edgemed",
        )
    return {"max_abs_error": error, "largest_score": largest}
