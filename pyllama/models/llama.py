"""Llama and the many models of its shape (Touvron et al. 2023): SwiGLU, RMS norms, rotary positions, grouped heads."""

from __future__ import annotations

from pyllama.gguf import GGUFFile
from pyllama.graph import AttentionParams, Graph, Node
from pyllama.models.hparams import Hparams, make_rope
from pyllama.models.weights import Weights


def read_hparams(gguf: GGUFFile) -> Hparams:
    return Hparams.read(gguf)


def build(g: Graph, hp: Hparams, w: Weights) -> Node:
    rope = make_rope(hp, halves=False, factors=w.get("rope_freqs"))
    attention = AttentionParams(hp.n_head, hp.n_head_kv, hp.head_dim, scale=hp.head_dim**-0.5)
    x = g.embed(w["token_embd"])
    for i in range(hp.n_layer):
        b = w.layer(i)
        h = g.rms_norm(x, b["attn_norm"], hp.rms_eps)
        q, k, v = (g.linear(h, b[n], b.get(f"{n}.bias")) for n in ("attn_q", "attn_k", "attn_v"))
        h = g.attention(i, g.rope(q, rope), g.rope(k, rope), v, attention)
        x = g.add(x, g.linear(h, b["attn_output"], b.get("attn_output.bias")))
        h = g.rms_norm(x, b["ffn_norm"], hp.rms_eps)
        x = g.add(x, g.linear(g.silu_mul(g.linear(h, b["ffn_gate"]), g.linear(h, b["ffn_up"])), b["ffn_down"]))
    return g.logits(g.rms_norm(g.select_outputs(x), w["output_norm"], hp.rms_eps), w.output)
