"""What all tokenizers share: the vocabulary, special tokens, and turning tokens back into text.

A tokenizer is made from the metadata of a GGUF file and never changes afterwards, so any number of threads may use it. The
metadata are not trusted: whatever is wrong with them is a ``ValueError`` that names the key. This module knows nothing of
models or requests.
"""

from __future__ import annotations

import codecs
import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import numpy as np

from pyllama.core import CoreError, call, create, ffi, lib
from pyllama.gguf import GGUFFile, StringArray

__all__ = ["StreamDecoder", "Tokenizer"]

TOKENS = "tokenizer.ggml.tokens"
TOKEN_TYPE = "tokenizer.ggml.token_type"

# Converters do not always say which tokens end a text or fill in a middle, so these are also known by their texts; the
# first that a vocabulary has is taken.
END_OF_TURN = (
    "<|eot_id|>",
    "<|im_end|>",
    "<end_of_turn>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "▁<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
)
END_OF_MESSAGE = ("<|eom_id|>",)
FIM_PREFIX = (
    "<|fim_prefix|>",
    "<fim-prefix>",
    "<fim_prefix>",
    "<｜fim▁begin｜>",
    "<PRE>",
    "▁<PRE>",
    "<|code_prefix|>",
    "<|prefix|>",
)
FIM_SUFFIX = (
    "<|fim_suffix|>",
    "<fim-suffix>",
    "<fim_suffix>",
    "<｜fim▁hole｜>",
    "<SUF>",
    "▁<SUF>",
    "<|code_suffix|>",
    "<|suffix|>",
)
FIM_MIDDLE = (
    "<|fim_middle|>",
    "<fim-middle>",
    "<fim_middle>",
    "<｜fim▁end｜>",
    "<MID>",
    "▁<MID>",
    "<|code_middle|>",
    "<|middle|>",
)
FIM_PAD = ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]")
FIM_REPOSITORY = ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>")
FIM_FILE = ("<|file_sep|>",)

# All of these end a generation, whatever the metadata say.
END_OF_GENERATION = (*END_OF_TURN, *END_OF_MESSAGE, "[EOS]", "<eos>", "<|return|>", "<|call|>")


_CONTROL = (lib.PL_TOKEN_CONTROL, lib.PL_TOKEN_UNKNOWN)


class StreamDecoder:
    """Decodes one token after the other and never gives out a part of a character."""

    def __init__(self, tokenizer: Tokenizer, special: bool) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that ``token`` completes. Raises ``ValueError`` when it is not in the vocabulary."""
        data = self._tokenizer.token_bytes(token, special=self._special)
        if data.isascii() and not self._utf8.buffer:  # nearly always, and much faster
            return data.decode("ascii")
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an incomplete character, else nothing."""
        return self._utf8.decode(b"", final=True)

    @property
    def pending(self) -> bool:
        """Is the beginning of a character being held back?"""
        return self._utf8.buffer != b""


class Tokenizer(ABC):
    """Text to tokens and back.

    Attributes:
        n_vocab: number of tokens.
        bos_id, eos_id, eot_id, unk_id, pad_id, nl_id: begin of sequence, end of sequence, end of turn, unknown, padding,
            line feed; None where the vocabulary has none.
        fim_pre_id, fim_suf_id, fim_mid_id: the tokens before the prefix, the suffix and the middle when a model fills in
            the middle of a text, or None.
        eog_ids: all tokens that end a generation.
        add_bos, add_eos: does the model want these around a prompt?
        add_space_prefix: does the model want a space before a text?
        special_ids: text and number of the tokens that ``encode`` finds verbatim: control, unknown and user-defined ones.
        chat_template: Jinja2 source, or None.
    """

    byte_level: ClassVar[bool]
    """Are tokens spelled in GPT-2's alphabet of bytes?"""

    def __init__(
        self,
        gguf: GGUFFile,
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        unk_id: int | None = None,
        add_bos: bool = False,
        add_space_prefix: bool = False,
    ) -> None:
        """The keyword arguments are what holds when the metadata do not say.

        Raises:
            ValueError: naming the key that is missing or wrong.
        """
        tokens = string_array(gguf, TOKENS)
        self.n_vocab = len(tokens)
        with blame(TOKENS):
            self._vocab = create(lib.pl_vocab_new, lib.pl_vocab_free, *string_arguments(tokens))
        self._types = self._read_types(gguf)
        texts, starts = np.empty(lib.pl_vocab_bytes(self._vocab), np.uint8), np.empty(self.n_vocab + 1, np.int32)
        lib.pl_vocab_texts(self._vocab, pointer(texts), pointer(starts))
        self._texts, self._starts = texts.tobytes(), memoryview(starts)

        self.bos_id = self._read_id(gguf, "bos", default=bos_id)
        self.eos_id = self._read_id(gguf, "eos", default=eos_id)
        self.unk_id = self._read_id(gguf, "unknown", default=unk_id)
        self.pad_id = self._read_id(gguf, "padding")
        self.eot_id = self._read_id(gguf, "eot", texts=END_OF_TURN)
        eom_id = self._read_id(gguf, "eom", texts=END_OF_MESSAGE)
        self.fim_pre_id = self._read_id(gguf, "fim_pre", "prefix", texts=FIM_PREFIX)
        self.fim_suf_id = self._read_id(gguf, "fim_suf", "suffix", texts=FIM_SUFFIX)
        self.fim_mid_id = self._read_id(gguf, "fim_mid", "middle", texts=FIM_MIDDLE)
        self.eog_ids = self._find_eog_ids(
            self.eos_id,
            self.eot_id,
            eom_id,
            self._read_id(gguf, "fim_pad", texts=FIM_PAD),
            self._read_id(gguf, "fim_rep", texts=FIM_REPOSITORY),
            self._read_id(gguf, "fim_sep", texts=FIM_FILE),
        )
        self.add_bos = gguf.get("tokenizer.ggml.add_bos_token", add_bos, bool)
        self.add_eos = gguf.get("tokenizer.ggml.add_eos_token", False, bool)
        # Byte-level vocabularies have no such rule; some files say true all the same.
        wants_space = gguf.get("tokenizer.ggml.add_space_prefix", add_space_prefix, bool)
        self.add_space_prefix = wants_space and not self.byte_level
        for wanted, token, name in ((self.add_bos, self.bos_id, "bos"), (self.add_eos, self.eos_id, "eos")):
            if wanted and token is None:
                raise ValueError(
                    f"tokenizer.ggml.add_{name}_token is true, but tokenizer.ggml.{name}_token_id is missing"
                )
        self.chat_template: str | None = gguf.get("tokenizer.chat_template", None, str)

        special = (lib.PL_TOKEN_CONTROL, lib.PL_TOKEN_UNKNOWN, lib.PL_TOKEN_USER_DEFINED)
        self.special_ids = self._texts_of_types(*special)
        self._special_splitter = self._make_splitter(self.special_ids)
        self._plain_splitter = self._make_splitter(self._texts_of_types(lib.PL_TOKEN_USER_DEFINED))
        self._decoded, self._decoded_starts = self._decode_vocabulary()
        self._rules = self._make_rules(gguf)
        self.nl_id = self._find_nl_id()

    # ---- text to tokens ----

    @property
    def opening(self) -> list[int]:
        """What the model wants at the beginning of every prompt: BOS, or nothing."""
        return [self.bos_id] if self.add_bos else []

    def encode(
        self, text: str, *, add_special: bool = False, parse_special: bool = True, space_prefix: bool = True
    ) -> list[int]:
        """The tokens of a text.

        Args:
            text: any string; unpaired surrogates count as U+FFFD.
            add_special: put begin and end of sequence around the tokens if the model wants them.
            parse_special: read control tokens where their texts stand in ``text`` (user-defined ones always are).
            space_prefix: put a space before the text if the model wants one; not so where ``text`` continues another.

        Raises:
            ValueError: the text is longer than 256 MB.
        """
        tokens = self.opening if add_special else []
        if text:
            splitter = self._special_splitter if parse_special else self._plain_splitter
            tokens += self._encode(to_utf8(text), splitter, space_prefix=space_prefix)
        if add_special and self.add_eos:
            tokens.append(self.eos_id)
        return tokens

    def infill(self, prefix: str | Sequence[int], suffix: str) -> list[int]:
        """The prompt whose answer stands between two texts: prefix and suffix, each after its mark, and the mark of the middle
        (Bavarian et al. 2022, "Efficient Training of Language Models to Fill in the Middle", there called PSM).

        Raises:
            ValueError: the vocabulary has no tokens for that; the message says which.
        """
        marks = {"fim_pre": self.fim_pre_id, "fim_suf": self.fim_suf_id, "fim_mid": self.fim_mid_id}
        if missing := [f"tokenizer.ggml.{name}_token_id" for name, token in marks.items() if token is None]:
            raise ValueError(
                f"the model cannot fill in the middle of a text: its vocabulary has no {', '.join(missing)}"
                " and no token with one of the usual texts for that"
            )
        before = self.encode(prefix, parse_special=False) if isinstance(prefix, str) else prefix
        after = self.encode(suffix, parse_special=False, space_prefix=False)
        return [*self.opening, marks["fim_pre"], *before, marks["fim_suf"], *after, marks["fim_mid"]]

    def _encode(self, data: bytes, splitter: ffi.CData, *, space_prefix: bool = True) -> list[int]:
        sizes, tokens = np.empty(len(data), np.int32), np.empty(len(data), np.int32)
        with blame("text"):
            n = call(lib.pl_split, splitter, data, len(data), pointer(sizes), pointer(tokens))
            sizes, tokens = self._pre_tokenize(data, sizes[:n], tokens[:n])
            out = np.empty(3 * (len(data) + len(sizes)), np.int32)
            n = call(
                lib.pl_bpe_encode,
                self._rules,
                data,
                len(data),
                pointer(sizes),
                pointer(tokens),
                len(sizes),
                self.add_space_prefix and space_prefix,
                pointer(out),
                len(out),
            )
        return out[:n].tolist()

    def _pre_tokenize(self, data: bytes, sizes: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cuts pieces further: ``sizes`` (int32, bytes) and ``tokens`` (int32, -1 for what is to be encoded)."""
        return sizes, tokens

    # ---- tokens to text ----

    def token_text(self, token: int) -> str:
        """The spelling of a token in the vocabulary. Raises ``ValueError`` for an unknown token."""
        return self._raw(token).decode("utf-8", "replace")

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        """What a token stands for in a text; control tokens stand for nothing, or with ``special`` for their spelling.

        Raises:
            ValueError: there is no such token.
        """
        if not 0 <= token < self.n_vocab or self._types[token] in _CONTROL:
            raw = self._raw(token)
            return raw if special else b""
        return self._decoded[self._decoded_starts[token] : self._decoded_starts[token + 1]]

    def token_table(self) -> tuple[bytes, np.ndarray]:
        """The bytes of all tokens: those of token i are blob[offsets[i]:offsets[i + 1]] (int32[n_vocab + 1]).

        Control tokens are empty.
        """
        return self._decoded, np.asarray(self._decoded_starts)

    def decode(self, tokens: Iterable[int], *, special: bool = False, space_prefix: bool = True) -> str:
        """The text of tokens, with U+FFFD for what is not UTF-8.

        Args:
            special: spell control tokens out.
            space_prefix: take the space away that ``encode`` put first.

        Raises:
            ValueError: one of them is not in the vocabulary.
        """
        tokens = list(tokens)
        pieces = [self.token_bytes(token, special=special) for token in tokens]
        if self.add_space_prefix and space_prefix:
            first = next((i for i, token in enumerate(tokens) if not self._is_control(token)), None)
            if first is not None and self._types[tokens[first]] != lib.PL_TOKEN_USER_DEFINED:
                pieces[first] = pieces[first].removeprefix(b" ")
        return b"".join(pieces).decode("utf-8", "replace")

    def stream_decoder(self, special: bool = False) -> StreamDecoder:
        """A decoder for tokens that come one by one, anywhere in a text."""
        return StreamDecoder(self, special)

    def _raw(self, token: int) -> bytes:
        if not 0 <= token < self.n_vocab:
            raise ValueError(f"token {token} is not in the vocabulary of {self.n_vocab}")
        return self._texts[self._starts[token] : self._starts[token + 1]]

    def _is_control(self, token: int) -> bool:
        return self._types[token] in _CONTROL

    # ---- reading the metadata ----

    @abstractmethod
    def _make_rules(self, gguf: GGUFFile) -> ffi.CData:
        """The ``pl_bpe`` of this family."""

    def _find(self, text: str) -> int | None:
        data = text.encode()
        token = lib.pl_vocab_find(self._vocab, data, len(data))
        return None if token < 0 else token

    def _read_types(self, gguf: GGUFFile) -> memoryview:
        types = number_array(gguf, TOKEN_TYPE, np.int32, self.n_vocab, required=False)
        if types is None:
            types = np.full(self.n_vocab, lib.PL_TOKEN_NORMAL, np.int32)
        wrong = np.flatnonzero((types < 0) | (types > lib.PL_TOKEN_BYTE))
        if wrong.size:
            raise ValueError(f"{TOKEN_TYPE}: token {wrong[0]} has the unknown type {types[wrong[0]]}")
        return memoryview(types)

    def _read_id(
        self, gguf: GGUFFile, *names: str, texts: tuple[str, ...] = (), default: int | None = None
    ) -> int | None:
        """The token that ``tokenizer.ggml.<name>_token_id`` gives, else the one with one of the texts, else ``default``.

        A token that is found by its text becomes a control token: its type is often forgotten.
        """
        for name in names:
            key = f"tokenizer.ggml.{name}_token_id"
            token = gguf.get(key, None, int)
            if token in (-1, 0xFFFFFFFF):  # a converter's way to say "none"
                token = None
            if token is not None:
                if not 0 <= token < self.n_vocab:
                    raise ValueError(f"{key} is {token}, but the vocabulary has {self.n_vocab} tokens")
                return token
        for text in texts:
            if (token := self._find(text)) is not None:
                self._types[token] = lib.PL_TOKEN_CONTROL
                return token
        return default if default is not None and default < self.n_vocab else None

    def _find_eog_ids(self, *ids: int | None) -> frozenset[int]:
        found = {token for token in ids if token is not None}
        for text in END_OF_GENERATION:
            if (token := self._find(text)) is not None:
                self._types[token] = lib.PL_TOKEN_CONTROL
                found.add(token)
        # In some vocabularies this is only an HTML tag, user-defined.
        token = self._find("</s>")
        if token is not None and self._is_control(token):
            found.add(token)
        return frozenset(found)

    def _find_nl_id(self) -> int | None:
        tokens = self._encode(b"\n", self._plain_splitter)
        newlines = [token for token in tokens if self.token_bytes(token) == b"\n"]
        return newlines[0] if newlines else None

    def _texts_of_types(self, *types: int) -> dict[str, int]:
        found = {}
        for token in np.flatnonzero(np.isin(self._types, types)).tolist():
            try:
                text = self._raw(token).decode()
            except UnicodeDecodeError:
                raise ValueError(f"{TOKENS}: the special token {token} is not UTF-8") from None
            if text:
                found[text] = token
        return found

    def _make_splitter(self, ids: dict[str, int]) -> ffi.CData:
        # In UTF-8 the order of bytes is the order of characters, which is Python's order of strings.
        ordered = np.array([ids[text] for text in sorted(ids)], np.int32)
        return create(lib.pl_splitter_new, lib.pl_splitter_free, self._vocab, pointer(ordered), len(ordered))

    def _decode_vocabulary(self) -> tuple[bytes, memoryview]:
        decoded, starts = np.empty(len(self._texts), np.uint8), np.empty(self.n_vocab + 1, np.int32)
        with blame(TOKENS):
            types = pointer(np.asarray(self._types))
            call(lib.pl_vocab_decode, self._vocab, types, self.byte_level, pointer(decoded), pointer(starts))
        return decoded[: starts[-1]].tobytes(), memoryview(starts).toreadonly()


def to_utf8(text: str) -> bytes:
    """UTF-8 of any string; pairs of surrogates are joined, lone ones become U+FFFD."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()


def pointer(array: np.ndarray) -> ffi.CData:
    """The data of a contiguous array as the core wants them; the array lives as long as the pointer."""
    kind = {"uint8": "uint8_t[]", "int32": "int32_t[]", "int64": "int64_t[]", "float32": "float[]"}[array.dtype.name]
    return ffi.from_buffer(kind, array)


def string_array(gguf: GGUFFile, key: str) -> StringArray:
    """The array of strings at ``key``. Raises ``ValueError`` when there is none."""
    value = gguf.metadata.get(key)
    if isinstance(value, StringArray):
        return value
    raise ValueError(f"{key} is missing" if value is None else f"{key} is not an array of strings")


def string_arguments(strings: StringArray) -> tuple[ffi.CData, int, ffi.CData, ffi.CData, int]:
    """An array of strings as the core's functions take it: data, bytes of data, starts, sizes, number."""
    starts, sizes = np.ascontiguousarray(strings.offsets, np.int64), np.ascontiguousarray(strings.lengths, np.int64)
    data = ffi.from_buffer("uint8_t[]", strings.blob)
    return data, len(strings.blob), pointer(starts), pointer(sizes), len(strings)


def number_array(gguf: GGUFFile, key: str, dtype: type, n: int, *, required: bool = True) -> np.ndarray | None:
    """A copy of the ``n`` numbers at ``key`` as ``dtype``; None when they are missing and not required.

    Raises:
        ValueError: they are missing, not numbers, not ``n``, or do not fit ``dtype``.
    """
    value = gguf.metadata.get(key)
    if value is None and not required:
        return None
    if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype.kind not in "iuf":
        raise ValueError(f"{key} is missing" if value is None else f"{key} is not an array of numbers")
    if len(value) != n:
        raise ValueError(f"{key} has {len(value)} elements, but {TOKENS} has {n}")
    with np.errstate(all="ignore"):
        converted = value.astype(dtype)
        if np.dtype(dtype).kind == "i" and not np.array_equal(converted, value):
            raise ValueError(f"{key} has elements that are no {np.dtype(dtype).name}")
    return converted


@contextlib.contextmanager
def blame(what: str) -> Iterator[None]:
    """Turns the core's errors into ``ValueError``s that begin with ``what``."""
    try:
        yield
    except CoreError as error:
        raise ValueError(f"{what}: {error}") from None
