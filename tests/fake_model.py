"""A model without arithmetic, for tests of the engine: its logits are a hash of the tokens that are really in the given blocks,
so that a wrong block, position, copy or shift shows as another text."""

from __future__ import annotations

import codecs
import hashlib
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from pyllama.core import BLOCK_TOKENS, call, ffi, lib
from pyllama.scheduler import truncated

N_VOCAB = 300
EOS = 299


class FakeTokenizer:
    """Token 0-255: that byte; the others but the last: a letter twice; the last: the end."""

    n_vocab = N_VOCAB
    bos_id, eos_id, nl_id = None, EOS, 10
    eog_ids = frozenset({EOS})
    add_bos = False
    special_ids: dict[str, int] = {}

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        if token == EOS:
            return b""
        return bytes([token]) if token < 256 else bytes([65 + token - 256]) * 2

    def token_table(self) -> tuple[bytes, np.ndarray]:
        pieces = [self.token_bytes(token) for token in range(N_VOCAB)]
        return b"".join(pieces), np.cumsum([0, *map(len, pieces)], dtype=np.int32)

    def stream_decoder(self, special: bool = False) -> FakeDecoder:
        return FakeDecoder(self)


class FakeDecoder:
    def __init__(self, tokenizer: FakeTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def pending(self) -> bool:
        return bool(self._decoder.getstate()[0])

    def push(self, token: int) -> str:
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class FakeModel:
    """The surface of ``pyllama.models.Model`` that the engine uses."""

    def __init__(
        self, *, n_ctx: int = 128, n_batch: int = 64, max_sequences: int = 8, ascii_only: bool = True, n_exact: int = 64
    ) -> None:
        self.n_ctx, self.n_batch, self.max_sequences = n_ctx, n_batch, max_sequences
        self.n_exact = n_exact
        self.n_blocks = -(-n_ctx // BLOCK_TOKENS) + 2
        self.hp = SimpleNamespace(n_vocab=N_VOCAB, n_embd=4)
        self.tokenizer = FakeTokenizer()
        self.cells: list[list[tuple[int, int] | None]] = [[None] * BLOCK_TOKENS for _ in range(self.n_blocks)]
        self.ascii_only = ascii_only
        self.seconds_per_token = 0.0
        self.batches: list[list[int]] = []  # tokens of each sequence of each run
        self.peaks = np.empty((0, -(-N_VOCAB // lib.PL_PEAK_LOGITS)), np.float32)
        self.fail_on: int | None = None  # a token that makes the run fail

    def _history(self, blocks: list[int], n: int) -> list[int]:
        tokens = []
        for position in range(n):
            cell = self.cells[blocks[position // BLOCK_TOKENS]][position % BLOCK_TOKENS]
            assert cell is not None, f"position {position} was never written"
            assert cell[1] == position, f"position {position} holds keys of position {cell[1]}"
            tokens.append(cell[0])
        return tokens

    def _logits(self, history: list[int]) -> np.ndarray:
        digest = hashlib.blake2b(np.array(history, np.int32).tobytes(), digest_size=8).digest()
        rng = np.random.default_rng(int.from_bytes(digest, "little"))
        logits = rng.normal(size=N_VOCAB).astype(np.float32)
        if self.ascii_only:
            logits[:97] -= 20
            logits[123:256] -= 20
        logits[EOS] -= 2
        return logits

    def run(self, inputs, *, hidden: bool = False) -> np.ndarray:
        assert 0 < len(inputs) <= self.max_sequences
        assert 0 < sum(len(item.tokens) for item in inputs) <= self.n_batch
        self.batches.append([len(item.tokens) for item in inputs])
        rows = []
        for item in inputs:
            if self.fail_on in item.tokens:
                raise RuntimeError("the model failed")
            for i, token in enumerate(item.tokens):
                position = item.n_past + i
                self.cells[item.blocks[position // BLOCK_TOKENS]][position % BLOCK_TOKENS] = (token, position)
        for item in inputs:
            for n in range(len(item.tokens) - item.outputs, len(item.tokens)):
                row = self._logits(self._history(item.blocks, item.n_past + n + 1))
                rows.append(row[:4] if hidden else row)
        time.sleep(self.seconds_per_token * sum(len(item.tokens) for item in inputs))
        padding = -N_VOCAB % lib.PL_PEAK_LOGITS
        if not hidden:
            padded = np.pad(np.reshape(rows, (len(rows), N_VOCAB)), ((0, 0), (0, padding)), constant_values=-np.inf)
            self.peaks = padded.reshape(len(rows), self.peaks.shape[1], lib.PL_PEAK_LOGITS).max(axis=2).astype(np.float32)
        return np.array(rows, np.float32).reshape(len(rows), 4 if hidden else N_VOCAB)

    def generate(self, inputs, samplings, randoms, ends) -> list[int]:
        tokens: list[int] = []
        while len(tokens) < len(randoms):
            rows = self.run(inputs)
            for row, peaks, sampling in zip(rows, self.peaks, samplings):
                out = ffi.from_buffer("float[]", row), ffi.from_buffer("float[]", peaks)
                n = call(lib.pl_sample, sampling, *out, randoms[len(tokens)])
                tokens.append(sampling.tokens[sampling.chosen] if n else -1)
                if n:
                    lib.pl_accept(sampling, tokens[-1])
            chosen = tokens[-len(inputs) :]
            if any(token < 0 or token in ends for token in chosen):
                break
            inputs = [replace(item, tokens=[token], n_past=item.n_past + 1) for item, token in zip(inputs, chosen)]
        return tokens

    def kv_copy(self, src_blocks, src_pos, dst_blocks, dst_pos, n) -> None:
        for i in range(n):  # in this order, as the core does, so that a range may move down over itself
            source, target = src_pos + i, dst_pos + i
            cell = self.cells[src_blocks[source // BLOCK_TOKENS]][source % BLOCK_TOKENS]
            assert cell is not None
            moved = (cell[0], cell[1] + dst_pos - src_pos)
            self.cells[dst_blocks[target // BLOCK_TOKENS]][target % BLOCK_TOKENS] = moved

    def greedy(self, prompt: list[int], n: int, *, n_keep: int = 0, ignore_eos: bool = False) -> list[int]:
        """What a lone greedy request should give, ended by EOS or ``n``."""
        n_keep = min(n_keep if n_keep >= 0 else len(prompt), len(prompt), self.n_ctx - 4)
        history, out = truncated(list(prompt), n_keep, self.n_ctx), []
        while len(out) < n:
            if len(history) > self.n_ctx:
                del history[n_keep : n_keep + (self.n_ctx - n_keep) // 2]
            logits = self._logits(history)
            if ignore_eos:
                logits[EOS] = -np.inf
            token = int(logits.argmax())
            if token == EOS:
                break
            out.append(token)
            history.append(token)
        return out
