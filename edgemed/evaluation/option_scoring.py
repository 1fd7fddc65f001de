"""Reads prompts through a session and scores what could follow: the options of a question, or free
text.

What a prompt shares with the one before it (a question with its options, a question with the solved
examples in front of it) is computed once, because reading is nearly all the cost of an evaluation.
Works on the session primitives alone, so it is the same on every runtime.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgemed.errors import EdgemedError
from edgemed.evaluation.task import Prompt
from edgemed.inference.decoding import Sampling, continued, log_softmax
from edgemed.inference.session import ImageEmbeddings, Session
from edgemed.models.architecture import VisionConfig
from edgemed.models.tokenizer import encode
from edgemed.vision.preprocessing import prompt_tokens

# A shorter shared beginning saves less than the noise costs that splitting a prompt elsewhere
# brings into its last digits.
SHARED = 32


class PrefixReader:
    """A session that remembers which tokens and images it holds. tokens_read, tokens_generated:
    what was computed so far.
    """

    def __init__(self, session: Session):
        self.session = session
        self.held: list[int] = []
        self.tokens_read = 0
        self.tokens_generated = 0
        self.seen: ImageEmbeddings | None = None
        session.rewind(0)

    def clear(self) -> None:
        """The session is another than it was: nothing it holds is used again."""
        self.held = []
        self.seen = None
        self.session.rewind(0)

    def read(self, tokens: Sequence[int], pictures: ImageEmbeddings | None = None) -> np.ndarray:
        """Scores [width] after `tokens`, valid until the next call. A beginning that the session
        already holds is not read again.

        pictures: features that take the place of image tokens; two images have the same tokens, so
        theirs are compared too.
        """
        same = shared_prefix(self.held, tokens, self.seen, pictures)
        if same < SHARED:
            same = 0
        self.session.rewind(same)
        self.held = []  # should the next line fail, nothing is taken to be held
        rest = behind(tokens, pictures, same)
        if rest:
            rows = self.session.prefill(tokens[same:], pictures=rest)
        else:
            rows = self.session.prefill(tokens[same:])
        self.held = list(tokens)
        self.seen = pictures
        self.tokens_read += len(tokens) - same
        return rows[-1]

    def options(
        self,
        context: Sequence[int],
        options: Sequence[Sequence[int]],
        pictures: ImageEmbeddings | None = None,
    ) -> list[float]:
        """Sum of the token log-probabilities of each option after the context, which is read once.

        Raises EdgemedError where an option has no tokens, or context and option do not fit.
        """
        if not all(options):
            raise EdgemedError("an option has no tokens", "Every option needs at least one token")
        first = log_softmax(self.read(context, pictures))
        scores = []
        for option in options:
            total = float(first[option[0]])
            if len(option) > 1:
                rows = log_softmax(self.session.prefill(option[:-1], every=True))
                total += float(rows[np.arange(len(option) - 1), list(option[1:])].sum())
                self.session.rewind(len(context))
                self.tokens_read += len(option) - 1
            scores.append(total)
        return scores

    def sequences(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """One score per whole sequence, from a multiple-choice head."""
        return [float(self.read(sequence)[0]) for sequence in sequences]

    def write(
        self,
        context: Sequence[int],
        sampling: Sampling,
        stop: frozenset[int],
        pictures: ImageEmbeddings | None = None,
    ) -> list[int]:
        """Tokens generated after the context."""
        scores = self.read(context, pictures)
        written = list(continued(self.session, scores, sampling, stop))
        # The newest token was picked and never fed back, so the session holds all but that one.
        self.held = [*context, *written][: self.session.position]
        self.tokens_generated += len(written)
        return written


def shared_prefix(
    held: Sequence[int],
    tokens: Sequence[int],
    seen: ImageEmbeddings | None,
    pictures: ImageEmbeddings | None,
) -> int:
    """How many of the first tokens need not be read again: fewer than all of them, the same images
    in them, and no image begun.
    """
    same = 0
    for one, other in zip(held, tokens[:-1], strict=False):
        if one != other:
            break
        same += 1
    first = seen if seen is not None else pictures
    if first is None:
        return same
    if seen is None or pictures is None or seen.token != pictures.token:
        token = first.token
        return next((i for i in range(same) if tokens[i] == token), same)
    places = [i for i in range(same) if tokens[i] == pictures.token]
    alike = (seen.features[: len(places)] == pictures.features[: len(places)]).all(1)
    same = same if alike.all() else places[int(alike.argmin())]
    # Positions of an image count from where it begins: it is read as a whole.
    while 0 < same < len(tokens) and tokens[same] == tokens[same - 1] == pictures.token:
        same -= 1
    return same


def behind(
    tokens: Sequence[int], pictures: ImageEmbeddings | None, start: int
) -> ImageEmbeddings | None:
    """The image embeddings of tokens[start:], positions counted from 0 again; None where no image
    stands there.
    """
    if pictures is None or not start:
        return pictures
    before = sum(token == pictures.token for token in tokens[:start])
    if before == len(pictures.features):
        return None
    return ImageEmbeddings(
        pictures.features[before:],
        pictures.positions[:, start:] - (pictures.positions[:, :start].max() + 1),
        pictures.token,
    )


def option_tokens(
    tokenizer: Any,
    prompt: Prompt,
    context: Sequence[int],
    where: str,
    v: VisionConfig | None = None,
    add_special_tokens: bool = True,
) -> list[list[int]]:
    """Tokens of each option after the context; v, add_special_tokens: as for prompt_tokens. Raises
    EdgemedError for an option that tokenizes to nothing.
    """
    tokens_of_options = []
    for option in prompt.options:
        # Encoded together, so that a tokenizer that merges across the border is asked what it would
        # really see.
        whole = prompt_tokens(tokenizer, prompt.context + option, v, add_special_tokens)
        if whole[: len(context)] == list(context):
            tokens = whole[len(context) :]
        else:
            tokens = encode(tokenizer, option)
        if not tokens:
            raise EdgemedError(
                f"question {where}: option '{option}' tokenizes to nothing",
                "Give it a text this model's tokenizer knows",
            )
        tokens_of_options.append(tokens)
    return tokens_of_options


def fit_prompt(
    context: Sequence[int], room: int, where: str, begin: Sequence[int] = ()
) -> tuple[list[int], bool]:
    """The last `room` tokens of a context, and whether any were cut. begin: the tokens that begin
    a text, which stay in front. Raises EdgemedError where there is room for none.
    """
    if room < 1 + len(begin):
        raise EdgemedError(
            f"question {where}: its options alone fill the engine's context",
            "Shorten the options, or export with a longer context",
        )
    if len(context) <= room:
        return list(context), False
    return [*begin, *context[len(begin) - room :]], True


def chosen(text: str, options: Sequence[str], lettered: bool) -> int:
    """Which option a generated answer names, -1 where it names none.

    lettered: the first capital letter that stands alone and belongs to an option; otherwise the
    option whose text comes first.
    """
    if lettered:
        letters = "".join(chr(65 + i) for i in range(len(options)))
        named = re.search(rf"(?<![A-Za-z])([{letters}])(?![A-Za-z'])", text)
        return letters.index(named[1]) if named else -1
    places = []
    for index, option in enumerate(options):
        named = re.search(rf"(?<!\w){re.escape(option.strip())}(?!\w)", text, re.IGNORECASE)
        if named:
            # The first in the text wins, of two that begin there the longer one.
            places.append((named.start(), -len(option), index))
    return min(places)[2] if places else -1
