"""Answers about images that models generate: a student's, sampled while it trains on-policy, and a
teacher's, kept on disk.

Both answer the questions of the rows. transformers' own generation would encode and place images by
rules of its own. Here the images stand where every other pass of a run has them, so what was
sampled is what is scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from edgemed.console import track
from edgemed.data.image_sets import images_album
from edgemed.data.image_text_windows import IGNORED, MultimodalBatch, question_prompt
from edgemed.distillation.teacher import generate_text, resumable_rows
from edgemed.inference.decoding import Sampling
from edgemed.models.tokenizer import open_tokenizer
from edgemed.models.torch_decoder import TorchSession
from edgemed.models.weights import CanonicalWeights
from edgemed.vision.torch_encoder import TorchVisionEncoder


def input_embeddings(student: Any, tokens: torch.Tensor, images: MultimodalBatch) -> torch.Tensor:
    """What a student in transformers reads, [rows, length, hidden]: embeddings of tokens int64
    [rows, length], and features where the images are.
    """
    is_image = tokens == images.token
    # An image token may lie outside the vocabulary, so another token is looked up in its place.
    embeddings = student.get_input_embeddings()(tokens.masked_fill(is_image, 0))
    return embeddings.masked_scatter(is_image[..., None], images.features.to(embeddings.dtype))


def sample_answers(
    student: Any,
    tokens: torch.Tensor,
    begins: torch.Tensor,
    images: MultimodalBatch,
    vocab: int,
    ends: tuple[int, ...],
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, labels) int64 [rows, length] with everything from `begins` [rows] on answered anew
    by the student. labels: what it sampled, IGNORED elsewhere.

    Sampled at temperature 1 from the first `vocab` tokens except the image's own. An answer ends
    with one of `ends`, or where its sequence does. No gradient flows.
    """
    count, length = tokens.shape
    device = tokens.device
    rows = torch.arange(count, device=device)
    # One batch is one left-padded prompt: the questions end side by side, and what stands before
    # the shorter ones is masked.
    longest = begins.max()
    offsets = torch.arange(int(longest), device=device) - (longest - begins)[:, None]
    attention_mask = (offsets >= 0).long()
    read = offsets.clamp(min=0)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed % (1 << 63))
        inputs = input_embeddings(student, tokens, images)[rows[:, None], read]
        positions = images.positions[:, rows[:, None], read]
        cache = None
        is_answer = torch.arange(length, device=device) >= begins[:, None]
        tokens = tokens.masked_fill(is_answer, ends[0] if ends else 0)
        labels = torch.full_like(tokens, IGNORED)
        is_open = torch.ones(count, dtype=torch.bool, device=device)
        for step in range(length - int(begins.min())):
            output = student(
                inputs_embeds=inputs,
                attention_mask=attention_mask,
                position_ids=positions if len(positions) > 1 else positions[0],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            drawn = _draw(output.logits[:, -1].float(), vocab, images.token)
            at = begins + step
            is_open = is_open & (at < length)
            tokens[rows[is_open], at[is_open]] = drawn[is_open]
            labels[rows[is_open], at[is_open]] = drawn[is_open]
            for end in ends:
                is_open = is_open & (drawn != end)
            if not is_open.any():
                break
            inputs = student.get_input_embeddings()(drawn)[:, None]
            positions = images.positions[:, rows, at.clamp(max=length - 1)][..., None]
            cache = output.past_key_values
            attention_mask = torch.cat([attention_mask, torch.ones_like(attention_mask[:, :1])], 1)
    return tokens, labels


def _draw(scores: torch.Tensor, vocab: int, image_token: int) -> torch.Tensor:
    """One token of each row of scores [rows, vocabulary], at temperature 1."""
    scores[:, vocab:] = -torch.inf
    # A slice, because the image token may lie outside the scores.
    scores[:, image_token : image_token + 1] = -torch.inf
    return torch.multinomial(torch.softmax(scores, -1), 1)[:, 0]


def generate_answers(
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

    def answers_from(start: int) -> Iterator[dict[str, Any]]:
        tokenizer = open_tokenizer(weights.checkpoint.path, weights.decoder.vocab)
        vision_encoder = TorchVisionEncoder(weights)
        album = images_album(name)
        session = TorchSession(weights)
        for n in track(range(start, len(rows)), "teacher answers"):
            prompt, images = question_prompt(vision_encoder, tokenizer, album, rows[n])
            row_sampling = replace(sampling, seed=sampling.seed + n)
            answer = generate_text(session, tokenizer, prompt, row_sampling, images)
            yield {"prompt": rows[n]["question"], **answer}
        session.close()

    return resumable_rows(file, len(rows), answers_from)
