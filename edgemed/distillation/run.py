"""One distillation from checkpoint to checkpoint: check the models, prune the student, gather what
it learns from, train it, and write it.

Training runs on transformers' Trainer and goes on where a killed run stopped. Working state lies
beside the result until the run is finished.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from edgemed.artifacts import hashing
from edgemed.console import say
from edgemed.data.image_sets import image_rows
from edgemed.data.text_sets import texts
from edgemed.distillation import quantized_student
from edgemed.distillation.hf_trainer import DistillationTrainer, distillation_trainer, last_good
from edgemed.distillation.model_checks import check_disk, check_models
from edgemed.distillation.objective import DistillationData, StudentModule, validation_metrics
from edgemed.distillation.params import Params, inputs, parse_count
from edgemed.distillation.pruning import StudentShape, choose_shape, prune, whole_shape
from edgemed.distillation.sequences import Splits, distillation_data, packed_texts, split
from edgemed.distillation.student import load, with_lora, write
from edgemed.errors import EdgemedError
from edgemed.models.checkpoint import Checkpoint, open_checkpoint
from edgemed.models.hf_offline import quiet_and_offline
from edgemed.models.lora import answering
from edgemed.models.parameter_count import decoder_parameters
from edgemed.models.weights import CanonicalWeights

IMPORTANCE = 16  # training sequences that the importance of neurons and heads is measured on


def distill(checkpoint: Checkpoint, out: Path, params: Params) -> dict[str, Any]:
    """Write the distilled student to `out`; see steps.distill.run."""
    weights = CanonicalWeights(checkpoint)
    if params.train != "weights":
        quantized_student.check(weights, params.train)
        params = replace(params, teacher=params.teacher or quantized_student.source_of(checkpoint))
    teacher = answering(open_checkpoint(params.teacher)) if params.teacher else weights
    target = None
    if params.target_params is not None:
        target = parse_count(params.target_params, "target_params")
    shape = choose_shape(weights, params.layers, params.ffn, params.heads, target)
    whole = shape == whole_shape(weights.unfolded)
    work = _work_folder(checkpoint, out, params)
    check_models(weights, teacher, shape, whole, params)
    work.mkdir(exist_ok=True)
    try:
        splits = _splits(weights, params)
        student = weights if whole else _pruned(weights, shape, splits, params, work)
        # A teacher of its own knows nothing of what was pruned from where.
        pruned_from_teacher = None if params.teacher else shape
        data = distillation_data(student, teacher, pruned_from_teacher, splits, params, out.parent)
        check_disk(student, params, work)
        notes = _train(student, data, params, work, out)
    except EdgemedError:
        if not last_good(work):
            shutil.rmtree(work)  # nothing that a second run could go on from
        raise
    notes["teacher"] = hashing.digest(teacher.checkpoint.hashes())
    notes["teacher_parameters"] = decoder_parameters(teacher.family, teacher.unfolded)
    notes["seed"] = params.seed
    notes["parameters"] = decoder_parameters(student.family, student.unfolded)
    notes["kept"] = None if whole else {**asdict(shape), "layers": list(shape.layers)}
    notes["windows"] = {
        "training": data.training,
        "held_out": data.validation,
        "tokens": int(data.tokens.shape[1]),
    }
    shutil.rmtree(work)
    return notes


def _work_folder(checkpoint: Checkpoint, out: Path, params: Params) -> Path:
    """Where a run keeps its state, under a key of everything it depends on: the same command finds
    it again.
    """
    request = {
        "params": asdict(params),
        "student": checkpoint.hashes(),
        "inputs": inputs(params),
        "out": out.name,
    }
    return out.parent / f".distill-{hashing.digest(request)[:12]}"


def _splits(weights: CanonicalWeights, params: Params) -> Splits:
    samples = image_rows(params.calibration) or texts(
        params.calibration, model=weights.checkpoint.path
    )
    return split(samples, params)


def _pruned(
    weights: CanonicalWeights, shape: StudentShape, splits: Splits, params: Params, work: Path
) -> CanonicalWeights:
    """The student, pruned from the checkpoint. Of vision models layers alone are left out, and for
    those nothing has to be measured.
    """
    sequences: list[list[int]] = []
    if not image_rows(params.calibration):
        packed = packed_texts(splits.training, weights, params.length)
        sequences = packed[:IMPORTANCE].tolist()
    return CanonicalWeights(prune(weights, shape, work / "student", sequences))


def _train(
    student: CanonicalWeights, data: DistillationData, params: Params, work: Path, out: Path
) -> dict[str, Any]:
    """Run or resume the training, and write the student it ends with. Returns the notes of it."""
    with quiet_and_offline():
        model = _student_module(student, data, params, work)
        arguments = _training_arguments(params, work, data.objective.labels)
        trainer = distillation_trainer(data, model, arguments, params.patience)
        before = validation_metrics(data, model, params.batch, trainer.args.device)
        _run_or_resume(trainer, work)
        trained = model.student
        if params.lora and params.train != "lora":
            trained = trained.merge_and_unload()
        notes = _write(trained.cpu().eval(), student, params, out)
    history = _history(trainer, list(before))
    # The best checkpoint is what the Trainer has loaded at the end.
    best = next(entry for entry in history if entry["step"] == trainer.state.best_global_step)
    after = {name: value for name, value in best.items() if name != "step"}
    metric = "cross_entropy" if data.objective.labels == 1 else "kl"
    if after[metric] >= before[metric]:
        say(
            f"[yellow]distill: the {metric} of the validation split did not get better"
            f" ({before[metric]:.4g} -> {after[metric]:.4g})[/yellow]"
        )
    steps = trainer.state.global_step
    notes["before"] = before
    notes["after"] = after
    notes["history"] = history
    notes["best_step"] = trainer.state.best_global_step
    notes["steps"] = steps
    notes["bound"] = None
    if params.top_k:
        notes["bound"] = f"KL of the top {params.top_k} and one class for all others: a lower bound"
    notes["tokens"] = steps * params.batch * params.accumulate * int(data.tokens.shape[1])
    notes["cache_bytes"] = data.cache.nbytes if data.cache else 0
    notes["layer_map"] = [list(pair) for pair in data.objective.pairs]
    return notes


def _student_module(
    student: CanonicalWeights, data: DistillationData, params: Params, work: Path
) -> StudentModule:
    teacher_width = data.teacher.d.hidden if data.teacher else student.decoder.hidden
    return StudentModule(
        with_lora(_trainable(student, params, work), params.lora, params.seed),
        student.decoder.layers,
        data.objective.pairs,
        (student.decoder.hidden, teacher_width),
    )


def _trainable(student: CanonicalWeights, params: Params, work: Path) -> Any:
    """The student in transformers, with what is not to be trained frozen."""
    if params.train == "weights":
        return load(student)
    model = load(student, quantized_student.write_dequantized(student, work / "expanded"))
    if params.train != "lora":
        quantized_student.freeze(model, student, params.train == "scales+norms")
    return model


def _training_arguments(params: Params, work: Path, labels: float) -> dict[str, Any]:
    # A student that learns from text alone is judged on text alone.
    best = "eval_cross_entropy" if labels == 1 else "eval_kl"
    return {
        "output_dir": str(work),
        "max_steps": params.steps,
        "per_device_train_batch_size": params.batch,
        "per_device_eval_batch_size": params.batch,
        "gradient_accumulation_steps": params.accumulate,
        "learning_rate": params.rate,
        "warmup_steps": round(params.warmup * params.steps),
        "weight_decay": params.decay,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 1.0,
        "optim": "adamw_torch",
        "bf16": params.precision == "bfloat16",
        "seed": params.seed,
        "logging_steps": params.evaluate_every,
        "eval_steps": params.evaluate_every,
        "save_steps": params.evaluate_every,
        "metric_for_best_model": best,
    }


def _run_or_resume(trainer: DistillationTrainer, work: Path) -> None:
    checkpoint = last_good(work)
    if checkpoint:
        say(f"distill: resumed after step {checkpoint.name.split('-')[1]}")
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        # Otherwise an interrupted run would leave the terminal without a cursor.
        trainer.monitor.bar.stop()


def _history(trainer: DistillationTrainer, metrics: list[str]) -> list[dict[str, Any]]:
    """{"step", and each metric} of every measurement."""
    history = []
    for entry in trainer.state.log_history:
        if all(f"eval_{metric}" in entry for metric in metrics):
            values = {metric: entry[f"eval_{metric}"] for metric in metrics}
            history.append({"step": entry["step"], **values})
    return history


def _write(
    model: torch.nn.Module, student: CanonicalWeights, params: Params, out: Path
) -> dict[str, Any]:
    if params.train == "weights":
        return {"written": write(model, student, out, params.dtype)}
    if params.train == "lora":
        return {
            "written": quantized_student.write_with_adapter(model, student, out, params.dtype),
            "trained": quantized_student.adapter_summary(out),
        }
    return {
        "written": quantized_student.write(model, student, out),
        "trained": quantized_student.trained_summary(student, params.train == "scales+norms"),
    }
