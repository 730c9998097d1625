"""Tokenizers: text to the numbers that a model reads, and back. One module per family; ``from_gguf`` picks it."""

from __future__ import annotations

from pyllama.gguf import GGUFFile
from pyllama.tokenizer.base import StreamDecoder, Tokenizer
from pyllama.tokenizer.bpe import ByteLevelBPE
from pyllama.tokenizer.spm import SentencePieceBPE

__all__ = ["ByteLevelBPE", "SentencePieceBPE", "StreamDecoder", "Tokenizer", "from_gguf"]

FAMILIES = {"gpt2": ByteLevelBPE, "llama": SentencePieceBPE}
"""By the names of ``tokenizer.ggml.model``."""


def from_gguf(gguf: GGUFFile) -> Tokenizer:
    """The tokenizer that a file describes.

    Raises:
        ValueError: the metadata are incomplete or contradict each other, or the kind is not known; the key is named.
    """
    model = gguf.require("tokenizer.ggml.model", str)
    if model not in FAMILIES:
        raise ValueError(
            f"tokenizer.ggml.model is {model!r}, which pyllama does not know (it knows {', '.join(FAMILIES)})"
        )
    return FAMILIES[model](gguf)
