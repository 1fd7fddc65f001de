"""A BPE tokenizer of SentencePiece's kind, as Llama 2 has it: a sign for spaces, and bytes for what
it does not know.
"""

from __future__ import annotations

from typing import Any

from tokenizers import decoders, normalizers


def write_spaces_as_signs(tokenizer: Any) -> None:
    """Give a tokenizer the normalizer and the decoder of that kind."""
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
