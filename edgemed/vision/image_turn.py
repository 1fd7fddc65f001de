"""One user turn with images as the prompt that a model was trained on.

A checkpoint's own chat template writes it where the template takes images: text and ids are then
those of transformers' `processor.apply_chat_template` (processing_utils.py of 5.23). Everywhere
else the model's family does. Runs on the device, without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgemed.errors import EdgemedError
from edgemed.models.architecture import Architecture, VisionConfig
from edgemed.models.chat_template import Message, image_template, rendered_messages
from edgemed.models.special_tokens import special_tokens
from edgemed.vision.preprocessing import prompt_tokens

# What a template is tried with. It has no image token, so one in the result is the template's.
TRIAL = "What is this?"


@dataclass(frozen=True)
class ImageTurn:
    """A prompt. v: the numbers its ids are made with; begun: its text has the begin token already,
    so none is put in front.
    """

    text: str
    v: VisionConfig
    begun: bool = False

    def tokens(self, tokenizer: Any, add_special_tokens: bool = True) -> list[int]:
        """Its ids, with one image token where each image stands. add_special_tokens: False leaves
        the begin tokens out.
        """
        return prompt_tokens(tokenizer, self.text, self.v, add_special_tokens and not self.begun)


def image_turn(
    family: Architecture,
    v: VisionConfig,
    path: Path,
    tokenizer: Any,
    text: str,
    images: int,
) -> ImageTurn:
    """A user's text with its images in front. path: of the checkpoint or engine.

    The family's form stands where the checkpoint has no template, one for texts alone, or
    'conversation' in config.json. An image token in the text itself is a place too many, which
    `check_places` refuses. Raises EdgemedError where the template is broken or refuses this text,
    and for a family that has no form.
    """
    if family.chat is None:
        raise EdgemedError(
            f"{path} has no chat form for questions about images", "Give a vision-language model"
        )
    template = None if v.conversation_stated else image_template(path)
    # The tokenizer puts the begin tokens in front, as transformers' processor lets it.
    own = replace(v, start=())
    if template is None or not takes_images(template, own, path, tokenizer):
        return ImageTurn(family.chat(text, images, v.conversation), v)
    prompt = rendered_messages(path, template, user_turn(text, images))
    begin = special_tokens(path).get("bos_token")
    return ImageTurn(prompt, own, begun=bool(begin) and prompt.startswith(begin or ""))


def takes_images(template: str, v: VisionConfig, path: Path, tokenizer: Any) -> bool:
    """Whether a chat template gives an image a place. Templates for texts alone refuse the list of
    contents, or print it.

    Raises EdgemedError for a template that refuses a plain text too.
    """
    try:
        prompt = rendered_messages(path, template, user_turn(TRIAL, 1))
    except EdgemedError:
        rendered_messages(path, template, [{"role": "user", "content": TRIAL}])
        return False
    return v.token in prompt_tokens(tokenizer, prompt, v)


def user_turn(text: str, images: int) -> Sequence[Message]:
    """A turn in the form that published templates take."""
    image = {"type": "image"}
    return [{"role": "user", "content": [*[image] * images, {"type": "text", "text": text}]}]
