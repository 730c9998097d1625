"""Byte-level byte-pair encoding (Radford et al. 2019, GPT-2), ``tokenizer.ggml.model`` = "gpt2".

A pre-tokenizer, which ``tokenizer.ggml.pre`` names, cuts a text into words; within each, pairs of neighbouring bytes are
merged in the order of the list of merges.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pyllama.core import call, create, ffi, lib
from pyllama.gguf import GGUFFile
from pyllama.tokenizer.base import Tokenizer, blame, pointer, string_arguments, string_array

__all__ = ["PRE_TOKENIZERS", "ByteLevelBPE", "PreTokenizer"]

MERGES = "tokenizer.ggml.merges"


@dataclass(frozen=True)
class PreTokenizer:
    """How a text is cut into words.

    Attributes:
        patterns: regular expressions that are applied one after the other, each to the words that the one before it left.
            The matches of each cover the whole text.
        core_words: the core's function that does the same (a ``PL_WORDS_`` number).
        whole_first: a word that is a token is taken at once, without regard to the merges.
        add_bos: a prompt begins with the begin of sequence, unless the metadata say otherwise.
    """

    patterns: tuple[str, ...]
    core_words: int
    whole_first: bool = False
    add_bos: bool = False


GPT2_WORD = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Each digit is a word of its own, and ends what comes before it: white space in front of one counts as if at the end.
SMOLLM_WORD = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3_WORD = (
    r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORD = LLAMA3_WORD.replace(r"\p{N}{1,3}", r"\p{N}")

GPT2 = PreTokenizer((GPT2_WORD,), lib.PL_WORDS_GPT2)
SMOLLM = PreTokenizer((SMOLLM_WORD,), lib.PL_WORDS_SMOLLM)
LLAMA3 = PreTokenizer((LLAMA3_WORD,), lib.PL_WORDS_LLAMA3, whole_first=True, add_bos=True)
SMAUG = PreTokenizer((LLAMA3_WORD,), lib.PL_WORDS_LLAMA3)
QWEN2 = PreTokenizer((QWEN2_WORD,), lib.PL_WORDS_QWEN2)
# For files that do not name one: punctuation by itself, GPT-2's words, digits by themselves, in threes.
DEFAULT = PreTokenizer(
    (
        r"[\p{P}$+<=>^~|]+|[^\p{P}$+<=>^~|]+",
        GPT2_WORD,
        r"\p{N}+|\P{N}+",
        r"[0-9]{3}|(?:(?![0-9]{3})(?s:.))+",
    ),
    lib.PL_WORDS_DEFAULT,
)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": DEFAULT,
    **dict.fromkeys(("gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "exaone4", "trillion", "modern-bert"), GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), SMOLLM),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2"), LLAMA3),
    **dict.fromkeys(("smaug-bpe", "dbrx", "chatglm-bpe", "glm4"), SMAUG),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"), QWEN2),
}
"""By the names of ``tokenizer.ggml.pre``."""


class ByteLevelBPE(Tokenizer):
    """The tokenizer of GPT-2, SmolLM, Llama 3, Qwen and others."""

    byte_level = True

    def __init__(self, gguf: GGUFFile) -> None:
        name = gguf.get("tokenizer.ggml.pre", "default", str)
        if name not in PRE_TOKENIZERS:
            known = ", ".join(PRE_TOKENIZERS)
            raise ValueError(f"tokenizer.ggml.pre is {name!r}, which pyllama does not know (it knows {known})")
        self._pre_tokenizer = PRE_TOKENIZERS[name]
        super().__init__(gguf, add_bos=self._pre_tokenizer.add_bos)

    def _make_rules(self, gguf: GGUFFile) -> ffi.CData:
        merges = string_arguments(string_array(gguf, MERGES))
        with blame(MERGES):
            return create(lib.pl_bpe_new_ranked, lib.pl_bpe_free, self._vocab, *merges, self._pre_tokenizer.whole_first)

    def _pre_tokenize(self, data: bytes, sizes: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        word_sizes, word_tokens = np.empty(len(data), np.int32), np.empty(len(data), np.int32)
        n = call(
            lib.pl_cut_words,
            self._pre_tokenizer.core_words,
            data,
            len(data),
            pointer(sizes),
            pointer(tokens),
            len(sizes),
            pointer(word_sizes),
            pointer(word_tokens),
        )
        return word_sizes[:n], word_tokens[:n]
