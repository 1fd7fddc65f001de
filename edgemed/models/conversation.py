"""The prompt of one user turn in the conversation form a vision model was trained on.

A form is the text before and behind the user's turn. Two published forms are shared by several
families, so their texts are here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ConversationForm:
    """before: what a prompt begins with, up to the user's turn; after: what stands behind it."""

    before: str
    after: str


# conv_vicuna_v1 of haotian-liu/LLaVA's llava/conversation.py; conv_stablelm, conv_phi and conv_qwen
# of PKU-YuanGroup/MoE-LLaVA's moellava/conversation.py are alike.
VICUNA = ConversationForm(
    before="A chat between a curious user and an artificial intelligence assistant. The assistant"
    " gives helpful, detailed, and polite answers to the user's questions. USER: ",
    after=" ASSISTANT:",
)
# The chat template of Qwen2-VL; conv_qwen of LLaVA-VL/LLaVA-NeXT's conversation.py.
CHATML = ConversationForm(
    before="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
    after="<|im_end|>\n<|im_start|>assistant\n",
)


def user_turn(form: ConversationForm, text: str, images: int, image: str) -> str:
    """The prompt of one user turn with its images first. image: what stands for each of them."""
    return form.before + image * images + text + form.after
