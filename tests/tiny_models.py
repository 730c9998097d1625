"""Tiny models with random weights and small but complete vocabularies, written as GGUF files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from pyllama.gguf import GGUFWriter

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' "
    "else message['role']) + '\n' + message['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
WORDS = "the and ing ion you that with this have from they will what there one all her hello world time day not are for".split()

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# K formats: where a block keeps its scale and, if it has one, the factor of its minima (bytes from its beginning), and the
# mean of the codes, which the minima have to take away for the values to have a mean of about nothing.
_K_FORMATS: dict[str, tuple[int, int | None, float]] = {
    "Q2_K": (80, 82, 1.5),
    "Q3_K": (108, None, 0.0),
    "Q4_K": (0, 2, 7.5),
    "Q5_K": (0, 2, 15.5),
    "Q6_K": (208, None, 0.0),
}


def byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    characters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    return [characters[b] for b in range(256)]


def _prefixes(space: str) -> list[tuple[str, str]]:
    """Merges that build every word letter by letter, with and without a space before it; each once."""
    words = [prefix + word for word in WORDS for prefix in (space, "")]
    pairs = [(word[:i], word[i]) for word in words for i in range(1, len(word))]
    return list(dict.fromkeys(pairs))


def add_byte_level_vocabulary(writer: GGUFWriter, specials: Sequence[str] = ()) -> int:
    """Adds a byte-level BPE vocabulary with ChatML's special tokens, and more; the number of its tokens."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *specials]
    merges = _prefixes("\u0120")
    tokens = specials + byte_characters() + [a + b for a, b in merges]
    types = [CONTROL] * len(specials) + [NORMAL] * (len(tokens) - len(specials))
    writer.add("tokenizer.ggml.model", "gpt2")
    writer.add("tokenizer.ggml.pre", "smollm")
    writer.add("tokenizer.ggml.tokens", tokens)
    writer.add("tokenizer.ggml.token_type", types, "i4")
    writer.add("tokenizer.ggml.merges", [f"{a} {b}" for a, b in merges])
    writer.add("tokenizer.ggml.bos_token_id", 1)
    writer.add("tokenizer.ggml.eos_token_id", 2)
    writer.add("tokenizer.ggml.unknown_token_id", 0)
    writer.add("tokenizer.ggml.padding_token_id", 2)
    writer.add("tokenizer.ggml.add_bos_token", False)
    writer.add("tokenizer.ggml.add_space_prefix", False)
    writer.add("tokenizer.chat_template", CHATML)
    return len(tokens)


def add_sentencepiece_vocabulary(writer: GGUFWriter, specials: Sequence[str] = (), space_prefix: bool = False) -> int:
    """Adds a SentencePiece-style vocabulary with byte fallback and Gemma's special tokens, and more; the number of its
    tokens. ``space_prefix``: texts begin with a space."""
    more = list(specials)
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    characters = ["\u2581", "\n", *map(chr, range(33, 127)), "é", "日", "本"]
    pieces = list(dict.fromkeys(a + b for a, b in _prefixes("\u2581")))
    tokens = specials + [f"<0x{b:02X}>" for b in range(256)] + pieces + characters + more
    types = [CONTROL] * 3 + [UNKNOWN] + [CONTROL] * 2 + [BYTE] * 256 + [NORMAL] * (len(pieces) + len(characters))
    types += [CONTROL] * len(more)
    scores = [0.0] * (len(specials) + 256) + [-float(i) for i in range(len(pieces) + len(characters) + len(more))]
    writer.add("tokenizer.ggml.model", "llama")
    writer.add("tokenizer.ggml.pre", "default")
    writer.add("tokenizer.ggml.tokens", tokens)
    writer.add("tokenizer.ggml.scores", scores, "f4")
    writer.add("tokenizer.ggml.token_type", types, "i4")
    writer.add("tokenizer.ggml.bos_token_id", 2)
    writer.add("tokenizer.ggml.eos_token_id", 1)
    writer.add("tokenizer.ggml.unknown_token_id", 3)
    writer.add("tokenizer.ggml.padding_token_id", 0)
    writer.add("tokenizer.ggml.add_bos_token", True)
    writer.add("tokenizer.ggml.add_eos_token", False)
    writer.add("tokenizer.ggml.add_space_prefix", space_prefix)
    writer.add("tokenizer.chat_template", TURNS)
    return len(tokens)


def random_matrix(rng: np.random.Generator, quant: str, n_rows: int, n_cols: int) -> bytes:
    """A matrix in a GGUF format whose values have a mean of about 0 and a standard deviation of n_cols ** -0.5."""
    deviation = n_cols**-0.5
    kind = gguf.GGMLQuantizationType[quant]
    if quant not in _K_FORMATS:
        values = rng.normal(0.0, deviation, (n_rows, n_cols)).astype(np.float32)
        return gguf.quants.quantize(values, kind).tobytes()
    scale_at, minima_at, mean = _K_FORMATS[quant]
    elements, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (n_rows, n_cols // elements, n_bytes), dtype=np.uint8)
    scales = rng.uniform(0.5, 1.5, (n_rows, n_cols // elements, 1))

    def put_scales(factor: float) -> None:
        blocks[..., scale_at : scale_at + 2] = (scales * factor).astype(np.float16).view(np.uint8)
        if minima_at is not None:
            blocks[..., minima_at : minima_at + 2] = (scales * factor * mean).astype(np.float16).view(np.uint8)

    put_scales(1.0)
    put_scales(deviation / gguf.dequantize(blocks.reshape(n_rows, -1), kind).std())
    return blocks.tobytes()


class _Tensors:
    """Adds random tensors by name."""

    def __init__(self, writer: GGUFWriter, quant: str, seed: int) -> None:
        self.writer, self.quant, self.rng = writer, quant, np.random.default_rng(seed)

    def matrix(self, name: str, n_rows: int, n_cols: int) -> None:
        data = random_matrix(self.rng, self.quant, n_rows, n_cols)
        self.writer.add_tensor(f"{name}.weight", int(gguf.GGMLQuantizationType[self.quant]), (n_cols, n_rows), data)

    def norm(self, name: str, n: int) -> None:
        self.writer.add_tensor(f"{name}.weight", 0, (n,), self.rng.normal(1.0, 0.1, n).astype(np.float32))


def make_llama(
    path: Path, *, n_layer: int = 2, n_embd: int = 64, n_head: int = 4, n_head_kv: int = 2, n_ff: int = 128,
    n_ctx: int = 512, quant: str = "F32", architecture: str = "llama", seed: int = 0,
    more: Mapping[str, Any] | None = None, rope_factors: bool = False, specials: Sequence[str] = (),
) -> None:  # fmt: skip
    """Writes a llama with a byte-level vocabulary. ``quant`` is the matrices' format, whose blocks must divide their rows;
    ``more``: keys after ``<architecture>.``; ``rope_factors``: with divisors of the rotary frequencies, as Llama 3.1 has them;
    ``specials``: more control tokens, the first has the number 3."""
    writer = GGUFWriter()
    writer.add("general.architecture", architecture)
    writer.add("general.name", "tiny llama")
    for key, value in {
        "block_count": n_layer,
        "context_length": n_ctx,
        "embedding_length": n_embd,
        "feed_forward_length": n_ff,
        "attention.head_count": n_head,
        "attention.head_count_kv": n_head_kv,
        "rope.dimension_count": n_embd // n_head,
        "rope.freq_base": 10000.0,
        "attention.layer_norm_rms_epsilon": 1e-5,
        **(more or {}),
    }.items():
        writer.add(f"{architecture}.{key}", value)
    n_vocab = add_byte_level_vocabulary(writer, specials)
    n_kv = n_embd // n_head * n_head_kv
    tensors = _Tensors(writer, quant, seed)
    tensors.matrix("token_embd", n_vocab, n_embd)
    for i in range(n_layer):
        b = f"blk.{i}."
        tensors.norm(b + "attn_norm", n_embd)
        for name, n_rows in (("q", n_embd), ("k", n_kv), ("v", n_kv), ("output", n_embd)):
            tensors.matrix(f"{b}attn_{name}", n_rows, n_embd)
        tensors.norm(b + "ffn_norm", n_embd)
        tensors.matrix(b + "ffn_gate", n_ff, n_embd)
        tensors.matrix(b + "ffn_up", n_ff, n_embd)
        tensors.matrix(b + "ffn_down", n_embd, n_ff)
    tensors.norm("output_norm", n_embd)
    tensors.matrix("output", n_vocab, n_embd)
    if rope_factors:
        tensors.norm("rope_freqs", n_embd // n_head // 2)
    writer.write(path)


def make_gemma3(
    path: Path, *, n_layer: int = 7, n_embd: int = 64, n_head: int = 2, n_head_kv: int = 1, head_dim: int = 32,
    n_ff: int = 128, n_ctx: int = 512, sliding_window: int = 16, quant: str = "F32", seed: int = 0,
    more: Mapping[str, Any] | None = None, specials: Sequence[str] = (), space_prefix: bool = False,
) -> None:  # fmt: skip
    """Writes a gemma3 with a SentencePiece-style vocabulary; the sixth layer is global. ``more`` as in
    :func:`make_llama`; ``specials``: more control tokens, the last of all; ``space_prefix``: texts begin with a space."""
    writer = GGUFWriter()
    writer.add("general.architecture", "gemma3")
    writer.add("general.name", "tiny gemma")
    for key, value in {
        "block_count": n_layer,
        "context_length": n_ctx,
        "embedding_length": n_embd,
        "feed_forward_length": n_ff,
        "attention.head_count": n_head,
        "attention.head_count_kv": n_head_kv,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.sliding_window": sliding_window,
        "rope.freq_base": 1e6,
        "attention.layer_norm_rms_epsilon": 1e-6,
        **(more or {}),
    }.items():
        writer.add(f"gemma3.{key}", value)
    n_vocab = add_sentencepiece_vocabulary(writer, specials, space_prefix)
    tensors = _Tensors(writer, quant, seed)
    tensors.matrix("token_embd", n_vocab, n_embd)
    for i in range(n_layer):
        b = f"blk.{i}."
        tensors.norm(b + "attn_norm", n_embd)
        tensors.matrix(b + "attn_q", n_head * head_dim, n_embd)
        tensors.matrix(b + "attn_k", n_head_kv * head_dim, n_embd)
        tensors.matrix(b + "attn_v", n_head_kv * head_dim, n_embd)
        tensors.matrix(b + "attn_output", n_embd, n_head * head_dim)
        tensors.norm(b + "attn_q_norm", head_dim)
        tensors.norm(b + "attn_k_norm", head_dim)
        tensors.norm(b + "post_attention_norm", n_embd)
        tensors.norm(b + "ffn_norm", n_embd)
        tensors.matrix(b + "ffn_gate", n_ff, n_embd)
        tensors.matrix(b + "ffn_up", n_ff, n_embd)
        tensors.matrix(b + "ffn_down", n_embd, n_ff)
        tensors.norm(b + "post_ffw_norm", n_embd)
    tensors.norm("output_norm", n_embd)
    writer.write(path)
