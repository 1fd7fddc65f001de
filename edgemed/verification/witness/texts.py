"""Token ids, chat and stop tokens: edgemed's beside those of transformers' tokenizer.

A token too many or too few at the beginning is worth as much as a damaged layer, and no test of the
numbers behind it can see it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgemed.documents.witness import WitnessRow
from edgemed.errors import EdgemedError
from edgemed.models.checkpoint import Checkpoint
from edgemed.models.weights import CanonicalWeights
from edgemed.verification.witness import native, reading, samples
from edgemed.verification.witness.tally import Tally, shortened

Ids = list[int]
# What a turn about an image says in the form that published templates take.
IMAGE_MESSAGES = [
    {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": samples.QUESTION}],
    }
]


def text_rows(weights: CanonicalWeights, folder: Path) -> list[WitnessRow]:
    """The rows about tokens and chat. folder: where image files may be written.

    Raises EdgemedError where a tokenizer is missing or damaged.
    """
    checkpoint = weights.checkpoint
    if checkpoint.random_weights and not has_tokenizer(checkpoint):
        return [WitnessRow(what="token ids", comparisons=0, differ=0, note="it has no tokenizer")]
    tokens = reading.Tokens(checkpoint.path, weights.decoder)
    try:
        theirs = native.native_tokenizer(checkpoint.path, checkpoint.config)
    except native.REFUSALS as error:
        tally = Tally("token ids")
        tally.differs(f"{native.LIBRARY} refuses the tokenizer: {first_line(error)}")
        return [tally.row()]
    if weights.vision is None:
        return [token_row(tokens, theirs), chat_row(tokens, theirs)]
    processor = native.native_processor(checkpoint.path)
    try:
        template = native.processor_template(checkpoint.path, theirs, processor)
    except native.REFUSALS as error:
        tally = Tally("chat")
        tally.differs(f"{native.LIBRARY} refuses the chat template: {first_line(error)}")
        return [token_row(tokens, theirs), tally.row()]
    image_row = image_chat_row(weights, tokens, theirs, (processor, template), folder)
    if not (checkpoint.path / "chat_template.jinja").is_file():
        # Tokenizers read that file alone; other templates are the processor's first.
        theirs.chat_template = template
    return [token_row(tokens, theirs), chat_row(tokens, theirs), image_row]


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether there is any file of a tokenizer."""
    names = ("tokenizer.json", "vocab.json", "tokenizer.model", "tokenizer_config.json")
    return any((checkpoint.path / name).is_file() for name in names)


def token_row(tokens: reading.Tokens, theirs: Any) -> WitnessRow:
    """Ids of every sample text, and of texts that hold the tokenizer's special tokens."""
    tally = Tally("token ids")
    special = list(dict.fromkeys([*theirs.all_special_tokens, *theirs.get_added_vocab()]))
    texts = {**samples.TEXTS, "special tokens in a text": samples.special_texts(special)}
    for kind, several in texts.items():
        for text in several:
            compare_ids(tally, f"{kind}: {shortened(text)}", tokens, tokens.ids(text), theirs(text))
    return tally.row()


def compare_ids(
    tally: Tally, where: str, tokens: reading.Tokens, ours: Ids, theirs: Mapping[str, Any]
) -> None:
    """Count one comparison of ids. theirs: what a call of transformers' tokenizer gave."""
    expected = [int(token) for token in theirs["input_ids"]]
    if ours == expected:
        tally.same()
        return
    tally.differs(f"{where}: {id_difference(tokens.word, ours, expected)}")


def id_difference(word: Callable[[int], str], ours: Ids, theirs: Ids) -> str:
    """How two lists of ids differ, by cause where it is at an end. word: an id for a person."""
    extra = len(theirs) - len(ours)
    library = native.LIBRARY
    if extra > 0 and theirs[extra:] == ours:
        return f"{library} puts {words(word, theirs[:extra])} in front, edgemed does not"
    if extra > 0 and theirs[: len(ours)] == ours:
        return f"{library} puts {words(word, theirs[len(ours) :])} behind, edgemed does not"
    if extra < 0 and ours[-extra:] == theirs:
        return f"edgemed puts {words(word, ours[:-extra])} in front, {library} does not"
    if extra < 0 and ours[: len(theirs)] == theirs:
        return f"edgemed puts {words(word, ours[len(theirs) :])} behind, {library} does not"
    pairs = list(zip(ours, theirs, strict=False))
    place = next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
    ours_there = words(word, ours[place : place + 1]) or "nothing"
    theirs_there = words(word, theirs[place : place + 1]) or "nothing"
    return f"token {place} is {theirs_there} in {library} and {ours_there} in edgemed"


def words(word: Callable[[int], str], ids: Ids) -> str:
    return ", ".join(f"{word(token)} ({token})" for token in ids)


def chat_row(tokens: reading.Tokens, theirs: Any) -> WitnessRow:
    """Conversations as text and as ids, in the checkpoint's own template."""
    tally = Tally("chat")
    if not theirs.chat_template and not tokens.has_template:
        tally.note = "the checkpoint has no chat template"
        return tally.row()
    for kind, turns in samples.CONVERSATIONS.items():
        messages = [{"role": role, "content": content} for role, content in turns]
        asked, expected = rendered_turns(theirs, messages)
        ours, refusal = attempted(functools.partial(tokens.chat, messages))
        if expected is None or ours is None:
            compare_refusals(tally, kind, refusal, expected is None)
            continue
        compare_prompts(tally, kind, ours, expected)
        theirs_ids = theirs.apply_chat_template(
            asked, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        compare_ids(tally, f"ids of {kind}", tokens, tokens.chat_ids(messages), theirs_ids)
    return tally.row()


def rendered_turns(
    theirs: Any, messages: list[dict[str, str]]
) -> tuple[Sequence[Mapping[str, Any]], str | None]:
    """(messages as the template reads them, their rendering, None where it refuses them). A
    template that reads lists of contents only passes a text over, or refuses it: its documented use
    is with lists.
    """
    plain = rendered(theirs, messages)
    question = messages[-1]["content"]
    if plain is not None and question in plain:
        return messages, plain
    lists = [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        for message in messages
    ]
    listed = rendered(theirs, lists)
    if listed is not None and question in listed and "'type': 'text'" not in listed:
        return lists, listed
    return messages, plain


def rendered(
    theirs: Any, messages: Sequence[Mapping[str, Any]], template: str | None = None
) -> str | None:
    """A conversation in transformers' rendering, None where the template refuses it. template: None
    for the tokenizer's own.
    """
    import jinja2

    try:
        return theirs.apply_chat_template(
            list(messages), chat_template=template, add_generation_prompt=True, tokenize=False
        )
    except (jinja2.TemplateError, *native.REFUSALS):
        return None


def attempted(render: Callable[[], str]) -> tuple[str | None, str]:
    """(edgemed's rendering, None where it refuses; its reason)."""
    try:
        return render(), ""
    except EdgemedError as error:
        return None, error.problem


def compare_refusals(tally: Tally, kind: str, refusal: str, expected: bool) -> None:
    """Count one conversation that one of the two refuses. refusal: edgemed's, '' for none.
    expected: whether transformers refuses it.
    """
    if refusal and expected:
        tally.same()
    elif refusal:
        tally.differs(f"{kind}: edgemed refuses it ({refusal}), {native.LIBRARY} does not")
    else:
        tally.differs(f"{kind}: {native.LIBRARY}'s template refuses it, edgemed does not")


def compare_prompts(tally: Tally, kind: str, ours: str, theirs: str) -> None:
    """Count one comparison of rendered conversations."""
    if ours == theirs:
        tally.same()
        return
    pairs = list(zip(ours, theirs, strict=False))
    place = next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
    begin = max(place - 10, 0)
    tally.differs(
        f"{kind}: the prompt is {shortened(theirs[begin:])} in {native.LIBRARY} and"
        f" {shortened(ours[begin:])} in edgemed, from character {begin}"
    )


def image_chat_row(
    weights: CanonicalWeights,
    tokens: reading.Tokens,
    theirs: Any,
    read_by: tuple[Any, str | None],
    folder: Path,
) -> WitnessRow:
    """A question about an image: as text where the checkpoint has a template, and its ids with the
    image's places. read_by: (transformers' processor, None where it cannot be made; its template).
    """
    tally = Tally("chat with an image")
    processor, template = read_by
    turn = reading.image_prompt(weights, tokens, samples.QUESTION)
    expected = rendered(theirs, IMAGE_MESSAGES, template) if template else None
    by_template = False
    if not template:
        tally.note = "the checkpoint has no chat template"
    elif weights.require_vision().conversation_stated:
        tally.note = "config.json names the conversation form"
    elif expected is None or "'type': 'image'" in expected:
        # Templates for texts alone refuse the list of contents, or print it.
        tally.note = "the chat template takes no images"
    else:
        by_template = True
        compare_prompts(tally, "one turn with an image", turn.text, expected)
    file = samples.write_images(folder)["a plain image"]
    # As the processor's own apply_chat_template: a begin token of the template stands alone.
    begun = by_template and bool(theirs.bos_token) and turn.text.startswith(theirs.bos_token)
    places = image_ids(weights, theirs, processor, turn.text, file, not begun)
    if places is None:
        note = f"ids of its places need a processor that {native.LIBRARY} cannot make here"
        tally.note = f"{tally.note}; {note}" if tally.note else note
    else:
        ours = reading.image_prompt_ids(weights, tokens, turn, file)
        compare_ids(tally, "ids of a turn with an image", tokens, ours, {"input_ids": places})
    return tally.row()


def image_ids(
    weights: CanonicalWeights,
    theirs: Any,
    processor: Any,
    prompt: str,
    file: Path,
    add_special_tokens: bool,
) -> Ids | None:
    """Ids of a prompt with one image as transformers' processor gives them, None where there is no
    such processor.

    Where it cannot be made for want of a package, its tokenizer and its image processor are asked
    one by one, and the image's token is repeated for the patches that the latter gave.
    """
    image = native.load_image(file)
    special = {"add_special_tokens": add_special_tokens}
    try:
        if processor is not None:
            batch = processor(images=image, text=prompt, return_tensors="pt", **special)
            return [int(token) for token in batch["input_ids"][0]]
        images = native.native_image_processor(weights.checkpoint.path)(image, return_tensors="pt")
    except native.REFUSALS:
        return None
    grid = images.get("image_grid_thw")
    merge = getattr(native.native_image_processor(weights.checkpoint.path), "merge_size", None)
    token = weights.require_vision().token
    if grid is None or not merge:
        return None
    count = int(grid[0].prod()) // merge**2
    ids: Ids = []
    for each in theirs(prompt, **special)["input_ids"]:
        ids += [each] * (count if each == token else 1)
    return ids


def stop_row(weights: CanonicalWeights, config: Any) -> WitnessRow:
    """Where generation stops. config: transformers' config object, None where it has no class."""
    tally = Tally("stop tokens")
    checkpoint = weights.checkpoint
    if config is None and not (checkpoint.path / "generation_config.json").is_file():
        tally.note = f"{native.LIBRARY} has no class for this model, and no file names them"
        return tally.row()
    try:
        theirs, file = native.native_stop_ids(checkpoint.path, config)
    except native.REFUSALS as error:
        tally.differs(f"{native.LIBRARY} refuses generation_config.json: {first_line(error)}")
        return tally.row()
    ours = reading.stop_ids(weights)
    for token in sorted(theirs | ours):
        if token in theirs and token in ours:
            tally.same()
        elif token in theirs:
            tally.differs(f"{file}: {native.LIBRARY} stops at token {token}, edgemed does not")
        else:
            tally.differs(f"{file}: edgemed stops at token {token}, {native.LIBRARY} does not")
    if not theirs and not ours:
        tally.same()
    return tally.row()


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
