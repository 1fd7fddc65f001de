"""Distillation with transformers' Trainer.

The Trainer brings mixed precision, gradient accumulation, checkpoints, resuming and early stopping.
Order, sampling and seeds come from the step's number, so that a killed run ends with the same
bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import Progress

from edgemed.distillation.objective import DistillationData, batch_loss, validation_metrics
from edgemed.errors import EdgemedError

LOGGED = ("loss", "eval_kl", "eval_cross_entropy")  # what the progress bar shows


class TrainingOrder(torch.utils.data.Dataset[dict[str, int]]):
    """Which sequence is trained at each place of a run: {"row", "place"}.

    The sequences themselves never leave the DistillationData.
    """

    def __init__(self, data: DistillationData, places: int) -> None:
        self.data = data
        self.places = places

    def __len__(self) -> int:
        return self.places

    def __getitem__(self, place: int) -> dict[str, int]:
        return {"row": self.data.row(place), "place": place}


class DistillationTrainer(transformers.Trainer):
    """A Trainer whose loss and whose evaluation are the objective's. rows: the sequences of the
    last batch, for messages.
    """

    def __init__(self, data: DistillationData, model: torch.nn.Module, **options: Any) -> None:
        super().__init__(model=model, **options)
        self.distillation = data
        self.student_module = model
        self.rows: list[int] = []
        self.monitor = TrainingMonitor(self)
        self.add_callback(self.monitor)

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        """The objective on one batch. Raises EdgemedError where it is not finite."""
        rows = inputs["row"].tolist()
        place = int(inputs["place"][0])
        loss = batch_loss(self.distillation, model, rows, place, self.args.device)
        if not torch.isfinite(loss):
            stop_run(self, f"the loss is {float(loss)}", rows)
        self.rows = rows
        return loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The validation split's metrics, logged as 'eval_...'."""
        metrics = validation_metrics(
            self.distillation, self.student_module, self.args.eval_batch_size, self.args.device
        )
        logged = {f"eval_{name}": value for name, value in metrics.items()}
        self.log(dict(logged))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, logged
        )
        return logged


class TrainingMonitor(transformers.TrainerCallback):
    """Shows progress on a terminal, evaluates after the last step, and stops before a step with a
    broken gradient is taken.
    """

    def __init__(self, trainer: DistillationTrainer) -> None:
        console = Console(stderr=True)
        self.trainer = trainer
        self.bar = Progress(console=console, transient=True, disable=not console.is_terminal)
        self.task = self.bar.add_task("distill")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(self.task, total=state.max_steps, completed=state.global_step)
        self.bar.start()

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                stop_run(self.trainer, "the gradient is not finite", self.trainer.rows)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        values = [
            f"{name.removeprefix('eval_')} {value:.4g}"
            for name, value in logs.items()
            if name in LOGGED
        ]
        self.bar.update(self.task, description=f"distill {', '.join(values)}".strip())


def distillation_trainer(
    data: DistillationData, model: torch.nn.Module, arguments: dict[str, Any], patience: int
) -> DistillationTrainer:
    """A Trainer of a student. arguments: of transformers' TrainingArguments. patience: evaluations
    without a better validation value before it stops, 0 for none.
    """
    options = transformers.TrainingArguments(
        # The order is TrainingOrder's own.
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        load_best_model_at_end=True,
        greater_is_better=False,
        save_total_limit=2,
        eval_strategy="steps",
        save_strategy="steps",
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        restore_callback_states_from_checkpoint=True,
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
        **arguments,
    )
    # On several GPUs the Trainer would split the batches that teacher, cache and images answer for
    # as a whole.
    options._n_gpu = min(options.n_gpu, 1)
    places = (
        arguments["max_steps"]
        * arguments["per_device_train_batch_size"]
        * arguments["gradient_accumulation_steps"]
    )
    trainer = DistillationTrainer(
        data,
        model,
        args=options,
        train_dataset=TrainingOrder(data, places),
        eval_dataset=TrainingOrder(data, places),
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    if patience:
        trainer.add_callback(transformers.EarlyStoppingCallback(patience))
    return trainer


def stop_run(trainer: DistillationTrainer, problem: str, rows: Sequence[int]) -> None:
    """Raise the one error of a run that has gone wrong."""
    checkpoint = last_good(Path(str(trainer.args.output_dir)))
    state = (
        f"The last good state is kept in {checkpoint}" if checkpoint else "Nothing was saved yet"
    )
    raise EdgemedError(
        f"distill: {problem} at step {trainer.state.global_step + 1}, training sequences"
        f" {list(rows)}",
        f"{state}. Try a lower rate, or precision: float32",
    )


def last_good(folder: Path) -> Path | None:
    """The newest complete checkpoint of the Trainer in `folder`. One that a kill left half-written
    is removed.
    """
    complete = []
    for path in folder.glob("checkpoint-*"):
        try:
            # The Trainer writes this file last.
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            complete.append(path)
        except (OSError, ValueError):
            shutil.rmtree(path)
    return max(complete, key=lambda path: int(path.name.split("-")[1]), default=None)
