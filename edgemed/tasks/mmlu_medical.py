"""The six medical subjects of MMLU.

Prompt and the sentence before it are worded as in lm-evaluation-harness (tasks mmlu_anatomy,
mmlu_clinical_knowledge and so on), so that scores can be compared with published ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgemed.evaluation.lettered import lettered_task
from edgemed.evaluation.task import Example, multiple_choice

SUBJECTS = (
    "anatomy",
    "clinical_knowledge",
    "college_biology",
    "college_medicine",
    "medical_genetics",
    "professional_medicine",
)


def example(row: Mapping[str, Any]) -> Example:
    """Rows: {"id", "question", "options": {"A": text, ...}, "answer": "A", "subject": one of
    SUBJECTS}.

    Without "subject" it is read from an id such as mmlu/college_biology-017.
    """
    subject = row.get("subject") or str(row["id"]).rpartition("/")[2].rpartition("-")[0]
    if subject not in SUBJECTS:
        raise ValueError(f"the subject '{subject}' is none of {', '.join(SUBJECTS)}")
    example = multiple_choice(row)
    return replace(
        example,
        question=example.question.strip(),
        groups={"subject": subject.replace("_", " ")},
    )


TASK = lettered_task(
    name="mmlu_medical",
    template="{question}\n{options}\nAnswer:",
    source="MMLU, six medical subjects (Hendrycks et al. 2021), github.com/hendrycks/test",
    licence="MIT",
    split=(
        "test (official 1,089 of these subjects; the shipped sample takes the same number from"
        " each)"
    ),
    wording=(
        "lm-evaluation-harness mmlu_anatomy, mmlu_clinical_knowledge, mmlu_college_biology,"
        " mmlu_college_medicine, mmlu_medical_genetics, mmlu_professional_medicine"
    ),
    example=example,
    shots="mmlu_medical.shots.jsonl",
    description="The following are multiple choice questions (with answers) about {subject}.\n\n",
)
