"""The task "which section of an abstract is this passage?", its prompt and its scoring.

It is the quickstart's task because its labels are the authors' own, they come free with PubMedQA,
and a model this small can really learn it.
"""

import re

import torch
from corpus import pubmedqa

ANSWERS = ["background", "methods", "results", "conclusions"]

# A label is used when all its words are known and those that name a section name the same one:
# mixed labels (METHODS AND RESULTS) and case reports drop out.
WORDS = {
    "background": (
        "BACKGROUND INTRODUCTION CONTEXT CONTEXTS OBJECTIVE OBJECTIVES OBJECT AIM AIMS PURPOSE"
        " PURPOSES HYPOTHESIS HYPOTHESES RATIONALE GOAL"
    ),
    "methods": (
        "METHOD METHODS METHODOLOGY DESIGN SETTING SETTINGS PATIENT PATIENTS PARTICIPANT"
        " PARTICIPANTS SUBJECTS MATERIAL MATERIALS INTERVENTION INTERVENTIONS MEASURE MEASURES"
        " MEASURED MEASUREMENT MEASUREMENTS POPULATION SAMPLE PROBANDS SOURCE SOURCES EXTRACTION"
        " SELECTION VARIABLES"
    ),
    "results": "RESULT RESULTS FINDINGS",
    None: (
        "AND OR OF THE MAIN KEY PRIMARY SECONDARY PRINCIPAL STUDY SUMMARY DATA INVESTIGATION"
        " EXPERIMENTAL RESEARCH OUTCOME OUTCOMES LOCATION"
    ),
}
SECTION_OF = {word: section for section, words in WORDS.items() for word in words.split()}


def normalise(label):
    words = re.findall(r"[A-Z]+", label.upper())
    if any(word not in SECTION_OF for word in words):
        return None
    sections = {SECTION_OF[word] for word in words} - {None}
    return sections.pop() if len(sections) == 1 else None


def items(data, split):
    """Every labelled passage of a split; the long answer is the abstract's conclusion and takes the
    number after its last context.
    """
    found = []
    for row in pubmedqa(data, split):
        passages = [*row["contexts"], row["long_answer"]]
        answers = [*map(normalise, row["labels"]), "conclusions"]
        found += [
            {"id": f"{row['id']}#{number}", "passage": passage, "answer": answer}
            for number, (passage, answer) in enumerate(zip(passages, answers, strict=True))
            if answer
        ]
    return found


def prompt(passage):
    return f"Passage: {passage}\nSection:"


def answer_text(answer):
    return f" {answer}"


def encode(tokenizer, item, answer, limit=512):
    """Tokens of prompt and answer and the answer's length; a context that is too long loses its
    beginning.
    """
    context = tokenizer.encode(prompt(item["passage"]), verbose=False)
    option = tokenizer.encode(answer_text(answer))
    return (context + option)[-limit:], len(option)


def batch(sequences):
    """Right-padded ids and labels that count only the answers. Padding is never attended from the
    left, so no mask is needed.
    """
    width = max(len(ids) for ids, _ in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, (tokens, answer_length) in enumerate(sequences):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, len(tokens) - answer_length : len(tokens)] = torch.tensor(
            tokens[-answer_length:]
        )
    return ids, labels


def answer_loss(model, ids, labels):
    """Mean negative log-likelihood of the answer tokens. Vocabulary logits are made for the answers
    only: for the rest they would cost a third of the time.
    """
    hidden = model.transformer(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:] != -100
    return torch.nn.functional.cross_entropy(
        model.lm_head(hidden[wanted]).float(), labels[:, 1:][wanted]
    )


@torch.no_grad()
def predictions(model, tokenizer, questions, limit=512):
    """The option with the largest summed log-likelihood, for every question. `model` is the
    language model itself, with or without LoRA layers inside.

    The context runs once and the options share its cache. A context that is too long leaves room
    for the longest option.
    """
    model.eval()
    options, option_labels = batch(
        [(ids, len(ids)) for ids in (tokenizer.encode(answer_text(answer)) for answer in ANSWERS)]
    )
    chosen = []
    for item in questions:
        context = tokenizer.encode(prompt(item["passage"]), verbose=False)[
            -(limit - options.shape[1]) :
        ]
        first = model.transformer(input_ids=torch.tensor([context]), use_cache=True)
        cache = first.past_key_values
        cache.batch_repeat_interleave(len(ANSWERS))
        rest = model.transformer(
            input_ids=options[:, :-1], past_key_values=cache, use_cache=True
        ).last_hidden_state
        hidden = torch.cat(
            [first.last_hidden_state[:, -1:].expand(len(ANSWERS), -1, -1), rest], dim=1
        )
        losses = torch.nn.functional.cross_entropy(
            model.lm_head(hidden).float().transpose(1, 2), option_labels, reduction="none"
        )
        chosen.append(ANSWERS[losses.sum(1).argmin().item()])
    return chosen


def accuracy(predicted, questions):
    return sum(
        guess == item["answer"] for guess, item in zip(predicted, questions, strict=True)
    ) / len(questions)
