"""A llama of any shape with random weights, as large as a real one: `python benchmarks/make_model.py -o model.gguf`.

Speed depends on shapes and formats, not on what the weights say. Blocks are random bytes with scales that keep every layer's
outputs near one in size, so no quantizer is needed and any engine runs the file. The default shape is a 1.1B llama's.
"""

from __future__ import annotations

import argparse
import itertools
import string
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that a checkout needs no installation

from pyllama.core import lib  # noqa: E402
from pyllama.gguf import GGUFWriter  # noqa: E402

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
F32 = 0

# Number of the type; where a block has its half-precision scale and, if it has one, the half of its minima; what the minima's
# half is times the scale, so that values have a mean of about 0; and the deviation of values for a scale of 1. All bytes but
# the halves are random: codes, and the factors of K formats, are uniform over their range.
FORMATS: dict[str, tuple[int, int, int | None, float, float]] = {
    "Q4_0": (2, 0, None, 0, 4.6),
    "Q4_1": (3, 0, 2, -7.5, 4.6),
    "Q8_0": (8, 0, None, 0, 73.9),
    "Q4_K": (12, 0, 2, 7.5, 258.3),
    "Q6_K": (14, 208, None, 0, 1365.7),
}
# general.file_type, which some engines show
FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q4_K_M": 15}


def has_more_bits(layer: int, n_layer: int) -> bool:
    """The layers whose attn_v and ffn_down are Q6_K in llama.cpp's mixture Q4_K_M: half of them."""
    eighth = n_layer // 8
    return layer < eighth or layer >= 7 * n_layer // 8 or (layer - eighth) % 3 == 2


def format_of(name: str, mixture: str, n_layer: int) -> str:
    """The format of a tensor."""
    if mixture != "Q4_K_M":
        return mixture
    if name == "output.weight":
        return "Q6_K"
    parts = name.split(".")
    refined = parts[0] == "blk" and parts[2] in ("attn_v", "ffn_down") and has_more_bits(int(parts[1]), n_layer)
    return "Q6_K" if refined else "Q4_K"


def random_blocks(rng: np.random.Generator, quant: str, n_rows: int, n_cols: int) -> np.ndarray:
    """Bytes of a matrix whose values have a mean of about 0 and a standard deviation of n_cols ** -0.5."""
    kind, scale_at, minima_at, minima, deviation = FORMATS[quant]
    elements, n_bytes = lib.pl_type_block_elements(kind), lib.pl_type_block_bytes(kind)
    if n_cols % elements:
        raise SystemExit(f"rows of {n_cols} columns cannot be {quant}, whose blocks have {elements}")
    shape = (n_rows, n_cols // elements)
    blocks = rng.integers(0, 256, (*shape, n_bytes), dtype=np.uint8)
    scales = rng.uniform(0.5, 1.5, (*shape, 1)) * n_cols**-0.5 / deviation
    blocks[..., scale_at : scale_at + 2] = scales.astype(np.float16).view(np.uint8)
    if minima_at is not None:
        blocks[..., minima_at : minima_at + 2] = (scales * minima).astype(np.float16).view(np.uint8)
    return blocks


def words(n: int) -> Iterator[str]:
    """``n`` pieces of which each is made of two shorter ones or is a letter: what a SentencePiece-style BPE needs."""
    letters = "\u2581" + string.ascii_lowercase + string.ascii_uppercase + string.digits + string.punctuation
    by_length = (itertools.product(letters, repeat=length) for length in itertools.count(1))
    return ("".join(word) for word in itertools.islice(itertools.chain.from_iterable(by_length), n))


def add_vocabulary(writer: GGUFWriter, n_vocab: int) -> None:
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    if n_vocab <= len(specials):
        raise SystemExit(f"a vocabulary has more than {len(specials)} tokens")
    n_words = n_vocab - len(specials)
    writer.add("tokenizer.ggml.model", "llama")
    writer.add("tokenizer.ggml.pre", "default")
    writer.add("tokenizer.ggml.tokens", specials + list(words(n_words)))
    writer.add("tokenizer.ggml.scores", [0.0] * len(specials) + [-float(i) for i in range(n_words)], "f4")
    writer.add("tokenizer.ggml.token_type", [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * n_words, "i4")
    writer.add("tokenizer.ggml.bos_token_id", 1)
    writer.add("tokenizer.ggml.eos_token_id", 2)
    writer.add("tokenizer.ggml.unknown_token_id", 0)
    writer.add("tokenizer.ggml.add_bos_token", True)
    writer.add("tokenizer.ggml.add_eos_token", False)


def make(args: argparse.Namespace) -> None:
    """Writes the model that the options describe."""
    if args.n_embd % (2 * args.n_head) or args.n_head % args.n_head_kv:
        raise SystemExit("the width must be a multiple of twice the heads, and these one of the key/value heads")
    writer, rng = GGUFWriter(), np.random.default_rng(args.seed)
    writer.add("general.architecture", "llama")
    writer.add("general.name", f"random llama, {args.n_layer} x {args.n_embd}, {args.type}")
    writer.add("general.file_type", FILE_TYPES[args.type])
    for key, value in {
        "block_count": args.n_layer,
        "context_length": args.n_ctx,
        "embedding_length": args.n_embd,
        "feed_forward_length": args.n_ff,
        "attention.head_count": args.n_head,
        "attention.head_count_kv": args.n_head_kv,
        "rope.dimension_count": args.n_embd // args.n_head,
        "rope.freq_base": 10000.0,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "vocab_size": args.n_vocab,
    }.items():
        writer.add(f"llama.{key}", value)
    add_vocabulary(writer, args.n_vocab)

    def matrix(name: str, n_rows: int, n_cols: int) -> None:
        quant = format_of(name, args.type, args.n_layer)
        writer.add_tensor(name, FORMATS[quant][0], (n_cols, n_rows), random_blocks(rng, quant, n_rows, n_cols))

    def norm(name: str) -> None:
        writer.add_tensor(name, F32, (args.n_embd,), rng.normal(1.0, 0.1, args.n_embd).astype(np.float32))

    n_kv = args.n_embd // args.n_head * args.n_head_kv
    matrix("token_embd.weight", args.n_vocab, args.n_embd)
    for i in range(args.n_layer):
        norm(f"blk.{i}.attn_norm.weight")
        for name, n_rows in (("q", args.n_embd), ("k", n_kv), ("v", n_kv), ("output", args.n_embd)):
            matrix(f"blk.{i}.attn_{name}.weight", n_rows, args.n_embd)
        norm(f"blk.{i}.ffn_norm.weight")
        matrix(f"blk.{i}.ffn_gate.weight", args.n_ff, args.n_embd)
        matrix(f"blk.{i}.ffn_up.weight", args.n_ff, args.n_embd)
        matrix(f"blk.{i}.ffn_down.weight", args.n_embd, args.n_ff)
    norm("output_norm.weight")
    matrix("output.weight", args.n_vocab, args.n_embd)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    writer.write(args.output)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="GGUF file to write")
    parser.add_argument("--type", choices=list(FILE_TYPES), default="Q4_K_M", help="(%(default)s)")
    for flag, value, what in (
        ("--n-embd", 2048, "width"),
        ("--n-layer", 22, "layers"),
        ("--n-head", 32, "heads"),
        ("--n-head-kv", 4, "key/value heads"),
        ("--n-ff", 5632, "width of the feed-forward layer"),
        ("--n-vocab", 32000, "tokens"),
        ("--n-ctx", 8192, "tokens of context"),
    ):
        parser.add_argument(flag, type=int, default=value, metavar="N", help=f"{what} (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(%(default)s)")
    make(parser.parse_args())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
