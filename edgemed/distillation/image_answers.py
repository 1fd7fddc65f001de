"""Answers about images that models give themselves: a student's, sampled while it trains on-policy,
and a teacher's, kept on disk.

Both are asked what the rows ask. transformers' own generation would look at images and place them
by rules of its own; here they stand where every other pass of a lesson has them, so what was
sampled is what is scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemed.console import track
from edgemed.data.image_text_windows import IGNORED, album_of, asked
from edgemed.distillation.teacher import continuation, kept
from edgemed.errors import need
from edgemed.inference.decoding import Sampling
from edgemed.models.tokenizer import open_tokenizer
from edgemed.models.torch_decoder import TorchSession
from edgemed.models.weights import CanonicalWeights
from edgemed.vision.torch_encoder import TorchVisionEncoder

if TYPE_CHECKING:
    import torch

    # (features of all windows one after the other, positions int64 [parts, rows, length], image
    # token), as Sights.of gives them
    Shown = tuple[torch.Tensor, torch.Tensor, int]


def embedded(student: torch.nn.Module, tokens: torch.Tensor, pictures: Shown) -> torch.Tensor:
    """What a student in transformers reads, [rows, length, hidden]: embeddings of tokens int64
    [rows, length], and features where the images are.
    """
    features, _, token = pictures
    # An image token may lie outside the vocabulary, and is never looked up.
    found = student.get_input_embeddings()(tokens.masked_fill(tokens == token, 0))
    return found.masked_scatter((tokens == token)[..., None], features.to(found.dtype))


def sampled(
    student: torch.nn.Module,
    tokens: torch.Tensor,
    begins: torch.Tensor,
    pictures: Shown,
    vocab: int,
    eos: int | None,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, labels) int64 [rows, length] with everything from `begins` [rows] on answered anew
    by the student; labels: what it sampled, IGNORED elsewhere.

    Sampled at temperature 1 from the first `vocab` tokens but the image's own; an answer ends with
    `eos`, or where its window does. No gradient flows.
    """
    torch = need("torch", "build")
    (count, length) = tokens.shape
    (_, positions, image) = pictures
    rows = torch.arange(len(tokens), device=tokens.device)
    # The questions end side by side; what stands before the shorter ones is masked.
    place = torch.arange(int(begins.max()), device=tokens.device) - (begins.max() - begins)[:, None]
    seen = (place >= 0).long()
    first = place.clamp(min=0)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed % (1 << 63))
        x = embedded(student, tokens, pictures)[rows[:, None], first]
        placed = positions[:, rows[:, None], first]
        cache = None
        tokens = tokens.masked_fill(
            torch.arange(length, device=tokens.device) >= begins[:, None], eos or 0
        )
        labels = torch.full_like(tokens, IGNORED)
        open_ = torch.ones(count, dtype=torch.bool, device=tokens.device)
        for step in range(length - int(begins.min())):
            out = student(
                inputs_embeds=x,
                attention_mask=seen,
                position_ids=placed if len(placed) > 1 else placed[0],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            scores = out.logits[:, -1].float()
            scores[:, vocab:] = -torch.inf
            scores[:, image : image + 1] = -torch.inf
            drawn = torch.multinomial(torch.softmax(scores, -1), 1)[:, 0]
            at = begins + step
            open_ = open_ & (at < length)
            for array in (tokens, labels):
                array[rows[open_], at[open_]] = drawn[open_]
            open_ = open_ if eos is None else open_ & (drawn != eos)
            if not open_.any():
                break
            x = student.get_input_embeddings()(drawn)[:, None]
            placed = positions[:, rows, at.clamp(max=length - 1)][..., None]
            cache = out.past_key_values
            seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
    return tokens, labels


def written(
    weights: CanonicalWeights,
    name: str,
    rows: Sequence[dict[str, Any]],
    sampling: Sampling,
    file: Path,
) -> list[dict[str, Any]]:
    """What the teacher answers to the rows of a set about its images: rows {"prompt": the question,
    "text", "ended"}, kept in `file` line by line.

    ended: the teacher ended its answer itself. The seed of row i is sampling.seed + i, so a resumed
    run writes the same. Raises EdgemedError for an image that cannot be opened, and a question that
    is longer than the teacher's context.
    """

    def more(start: int) -> Iterator[dict[str, Any]]:
        tokenizer = open_tokenizer(weights.checkpoint.path, weights.decoder.vocab)
        vision_encoder = TorchVisionEncoder(weights)
        album = album_of(name)
        session = TorchSession(weights)
        for n in track(range(start, len(rows)), "teacher answers"):
            begin, pictures = asked(vision_encoder, tokenizer, album, rows[n])
            yield {"prompt": rows[n]["question"]} | continuation(
                session, tokenizer, begin, replace(sampling, seed=sampling.seed + n), pictures
            )
        session.close()

    return kept(file, len(rows), more)
