"""SentencePiece's kind of byte-pair encoding (Kudo & Richardson 2018, "SentencePiece"), ``tokenizer.ggml.model`` = "llama".

A text is a run of characters with U+2581 for each space; of all pairs of neighbours that make a token, the one with the
highest score is merged first. A character that is no token falls back to the tokens of its bytes, <0x00> to <0xFF>.
"""

from __future__ import annotations

import numpy as np

from pyllama.core import create, ffi, lib
from pyllama.gguf import GGUFFile
from pyllama.tokenizer.base import Tokenizer, blame, number_array, pointer

__all__ = ["SentencePieceBPE"]

SCORES = "tokenizer.ggml.scores"


class SentencePieceBPE(Tokenizer):
    """The tokenizer of Llama 1 and 2, Mistral, Gemma and others."""

    byte_level = False

    def __init__(self, gguf: GGUFFile) -> None:
        super().__init__(gguf, bos_id=1, eos_id=2, unk_id=0, add_bos=True, add_space_prefix=True)

    def _make_rules(self, gguf: GGUFFile) -> ffi.CData:
        scores = number_array(gguf, SCORES, np.float32, self.n_vocab)
        unknown = -1 if self.unk_id is None else self.unk_id
        with blame(SCORES):
            return create(lib.pl_bpe_new_scored, lib.pl_bpe_free, self._vocab, pointer(scores), len(scores), unknown)
