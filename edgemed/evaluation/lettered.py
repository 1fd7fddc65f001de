"""Multiple choice whose options stand under letters: one helper that makes such a task.

Most tasks have this form, and only their wording differs. It is written once, as a template, and
what the model reads and what people are shown are both made from it.
"""

from __future__ import annotations

from typing import Any

from edgemed.evaluation.task import LETTERS, Example, Prompt, Task


def lettered_task(name: str, template: str, **fields: Any) -> Task:
    """A task that lists its options under letters and is answered with one.

    template: the prompt, with {question} and {options} in it. fields: the other fields of Task.
    The metric is accuracy and the sample NAME.jsonl where they name none. A task with `images`
    lists its options as 'A) first', as vision models are used to, any other as 'A. first'. The
    family of a vision model puts its own instructions around the prompt.
    """
    mark = ")" if fields.get("images") else "."

    def render(example: Example) -> Prompt:
        listed = "\n".join(
            f"{letter}{mark} {option}"
            for letter, option in zip(LETTERS, example.options, strict=False)
        )
        context = template.format(question=example.question, options=listed)
        letters = LETTERS[: len(example.options)]
        return Prompt(context, tuple(f" {letter}" for letter in letters))

    option_lines = f"A{mark} {{option}}\nB{mark} {{option}}\n..."
    defaults = {
        "metric": "accuracy",
        "sample": f"{name}.jsonl",
        "prompt": template.replace("{options}", option_lines),
    }
    return Task(name=name, render=render, lettered=True, **{**defaults, **fields})
