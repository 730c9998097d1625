"""The architectures once more, in plain NumPy and float64, as an oracle: no batching, no cache, no blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFReader, dequantize


class Reference:
    """``logits(tokens)`` of a GGUF file of architecture llama or gemma3: float64 [n_tokens, n_vocab]."""

    def __init__(self, path: Path) -> None:
        reader = GGUFReader(path)
        self.meta = {key: field.contents() for key, field in reader.fields.items()}
        self.arch = self.meta["general.architecture"]
        self.w = {
            t.name: np.asarray(dequantize(t.data, t.tensor_type), np.float64).reshape(tuple(reversed(t.shape)))
            for t in reader.tensors
        }

    def key(self, name: str, default=None):
        return self.meta.get(f"{self.arch}.{name}", default)

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        eps = self.key("attention.layer_norm_rms_epsilon")
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * self.w[f"{name}.weight"]

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        y = x @ self.w[f"{name}.weight"].T
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def rope(self, x: np.ndarray, base: float, halves: bool) -> np.ndarray:
        """x: [n_tokens, n_heads, head_dim]."""
        n = x.shape[-1]
        angles = np.arange(len(x))[:, None] * base ** (-np.arange(0, n, 2) / n)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        y = x.copy()
        first, second = (slice(0, n // 2), slice(n // 2, n)) if halves else (slice(0, n, 2), slice(1, n, 2))
        a, b = x[..., first], x[..., second]
        y[..., first], y[..., second] = a * cos - b * sin, a * sin + b * cos
        return y

    def attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int) -> np.ndarray:
        n, n_head, head_dim = q.shape
        k, v = (np.repeat(t, n_head // t.shape[1], axis=1) for t in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(head_dim)
        distance = np.arange(n)[:, None] - np.arange(n)[None]
        scores = np.where((distance < 0) | (window and distance >= window), -np.inf, scores)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), v).reshape(n, -1)

    def logits(self, tokens: list[int]) -> np.ndarray:
        gemma = self.arch == "gemma3"
        n_embd, n_head = self.key("embedding_length"), self.key("attention.head_count")
        n_head_kv = self.key("attention.head_count_kv", n_head)
        head_dim = self.key("attention.key_length", n_embd // n_head)
        x = self.w["token_embd.weight"][tokens] * (np.sqrt(n_embd) if gemma else 1)
        for i in range(self.key("block_count")):
            b = f"blk.{i}."
            is_local = gemma and (i + 1) % 6 != 0
            base = 10000.0 if is_local else self.key("rope.freq_base", 10000.0)
            h = self.norm(x, b + "attn_norm")
            q, k, v = (
                self.linear(h, b + name).reshape(len(tokens), heads, head_dim)
                for name, heads in (("attn_q", n_head), ("attn_k", n_head_kv), ("attn_v", n_head_kv))
            )
            if gemma:
                q, k = self.norm(q, b + "attn_q_norm"), self.norm(k, b + "attn_k_norm")
            q, k = (self.rope(t, base, halves=gemma) for t in (q, k))
            h = self.attend(q, k, v, self.key("attention.sliding_window") if is_local else 0)
            h = self.linear(h, b + "attn_output")
            x = x + (self.norm(h, b + "post_attention_norm") if gemma else h)
            h = self.norm(x, b + "ffn_norm")
            gate, up = self.linear(h, b + "ffn_gate"), self.linear(h, b + "ffn_up")
            if gemma:
                gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
            else:
                gate = gate / (1 + np.exp(-gate))
            h = self.linear(gate * up, b + "ffn_down")
            x = x + (self.norm(h, b + "post_ffw_norm") if gemma else h)
        output = "output" if "output.weight" in self.w else "token_embd"
        return self.linear(self.norm(x, "output_norm"), output)
