"""OmniMedVQA: multiple choice about images of a dozen modalities, made from classification sets;
MedVLM-R1 is published on its MRI, CT and X-ray part.

The published QA_information files work as they are. What is shipped is a synthetic stand-in,
because every image set has a licence of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgemed.evaluation.lettered import lettered_task
from edgemed.evaluation.task import LETTERS, Example, multiple_choice, text

MODALITIES = {"mr": "MRI", "ct": "CT", "x-ray": "X-ray"}


def modality(row: Mapping[str, Any]) -> str:
    """The three of MedVLM-R1 under one spelling each ('MR (Mag-netic Resonance Imaging)' is MRI),
    others as they are.
    """
    # One published file has the second name.
    name = text(row, "modality_type" if "modality_type" in row else "modality")
    return MODALITIES.get(name.split("(")[0].strip().lower(), name)


def radiology(row: Mapping[str, Any]) -> bool:
    return modality(row) in MODALITIES.values()


def example(row: Mapping[str, Any]) -> Example:
    """Rows of the published files: {"question_id", "image_path", "question", "option_A", ...
    "option_D", "gt_answer": an option's text, "modality_type"}.
    """
    options = {letter: row[f"option_{letter}"] for letter in LETTERS if row.get(f"option_{letter}")}
    answer = [letter for letter, option in options.items() if option == row["gt_answer"]]
    if not answer:
        raise ValueError(f"the answer {row['gt_answer']!r} is none of the {len(options)} options")
    question = multiple_choice(
        {
            "id": row["question_id"],
            "question": row["question"],
            "options": options,
            "answer": answer[0],
        }
    )
    return replace(question, groups={"modality": modality(row)}, images=(text(row, "image_path"),))


def everything(row: Mapping[str, Any]) -> bool:
    return True


TASK = lettered_task(
    name="omnimedvqa",
    template="{question}\n{options}",
    source="OmniMedVQA (Hu et al., CVPR 2024), github.com/OpenGVLab/Multi-Modality-Arena",
    licence="a licence for every image set, see the source",
    split=(
        "all published questions about MRI, CT and X-ray; part all: every modality. The shipped"
        " sample is synthetic"
    ),
    wording="edgemed's own, in the form of the model's family",
    example=example,
    images="omnimedvqa.zip",
    place=(
        "Download OmniMedVQA and put its folder Images beside the QA_information file"
        " (omnimedvqa:PATH/FILE.json)"
    ),
    parts={"mri_ct_xray": radiology, "all": everything},
)
