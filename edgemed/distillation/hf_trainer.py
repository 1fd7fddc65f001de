"""Distillation with transformers' Trainer.

Order, sampling and seeds come from the step's number, so that a killed run ends with the same
bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemed.errors import EdgemedError, need

if TYPE_CHECKING:
    import torch

from edgemed.distillation.objective import Lesson, batch_loss, measure


def trainer(
    lesson: Lesson, model: torch.nn.Module, arguments: dict[str, Any], patience: int
) -> Any:
    """A transformers Trainer of the lesson. arguments: TrainingArguments; patience: evaluations
    without a better held-out value before it stops, 0 for none.
    """
    transformers = need("transformers", "build")
    torch = need("torch", "build")

    class Order(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return (
                arguments["max_steps"]
                * arguments["per_device_train_batch_size"]
                * arguments["gradient_accumulation_steps"]
            )

        def __getitem__(self, place: int) -> dict[str, int]:
            return {"row": lesson.row(place), "place": place}

    class Distiller(transformers.Trainer):
        def compute_loss(
            self,
            model: Any,
            inputs: Any,
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> torch.Tensor:
            rows = inputs["row"].tolist()
            loss = batch_loss(lesson, model, rows, int(inputs["place"][0]), self.args.device)
            if not torch.isfinite(loss):
                stop(self, f"the loss is {float(loss)}", rows)
            self.rows = rows
            return loss

        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            found = {
                f"eval_{name}": value
                for name, value in measure(
                    lesson, self.model, self.args.eval_batch_size, self.args.device
                ).items()
            }
            self.log(dict(found))
            self.control = self.callback_handler.on_evaluate(
                self.args, self.state, self.control, found
            )
            return found

    # The order is the dataset's own; the windows themselves never leave the lesson.
    options = transformers.TrainingArguments(
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
    made = Distiller(
        model=model,
        args=options,
        train_dataset=Order(),
        eval_dataset=Order(),
    )
    made.watch = watch(lambda text: stop(made, text, made.rows))
    made.add_callback(made.watch)
    made.remove_callback(transformers.trainer_callback.PrinterCallback)
    if patience:
        made.add_callback(transformers.EarlyStoppingCallback(patience))
    return made


def stop(trainer: Any, problem: str, rows: Sequence[int]) -> None:
    """Raise the one error of a course that has gone wrong."""
    good = last_good(Path(trainer.args.output_dir))
    kept = f"The last good state is kept in {good}" if good else "Nothing had been saved yet"
    raise EdgemedError(
        f"distill: {problem} at step {trainer.state.global_step + 1}, training windows"
        f" {list(rows)}",
        f"{kept}. Try a lower rate, or precision: float32",
    )


def watch(stopped: Callable[[str], None]) -> Any:
    """A callback that shows progress on a terminal, evaluates after the last step, and stops before
    a step with a broken gradient is taken.
    """
    transformers = need("transformers", "build")
    torch = need("torch", "build")
    from rich.console import Console
    from rich.progress import Progress

    class Watch(transformers.TrainerCallback):
        def __init__(self) -> None:
            console = Console(stderr=True)
            self.bar = Progress(console=console, transient=True, disable=not console.is_terminal)
            self.task = self.bar.add_task("distill")

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar.update(self.task, total=state.max_steps, completed=state.global_step)
            self.bar.start()

        def on_pre_optimizer_step(
            self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
        ) -> None:
            if not all(
                torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None
            ):
                stopped("the gradient is not finite")

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar.update(self.task, completed=state.global_step)
            if state.global_step >= state.max_steps:
                control.should_evaluate = control.should_save = True

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            said = ", ".join(
                f"{name.removeprefix('eval_')} {value:.4g}"
                for name, value in logs.items()
                if name in ("loss", "eval_kl", "eval_cross_entropy")
            )
            self.bar.update(self.task, description=f"distill {said}" if said else "distill")

    return Watch()


def last_good(folder: Path) -> Path | None:
    """The newest whole checkpoint of the Trainer in `folder`; one that a kill left half-written is
    removed.
    """
    good = []
    for path in folder.glob("checkpoint-*"):
        try:
            # Written last.
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            good.append(path)
        except (OSError, ValueError):
            shutil.rmtree(path)
    return max(good, key=lambda path: int(path.name.split("-")[1]), default=None)
