"""Gemma 3's text model (Gemma Team 2025): norms before and after each block, normed heads, and five layers with a sliding
window and a low rotary base for each layer that sees everything."""

from __future__ import annotations

from dataclasses import dataclass, fields

from pyllama.gguf import GGUFFile
from pyllama.graph import AttentionParams, Graph, Node
from pyllama.models.hparams import Hparams, ModelError, make_rope
from pyllama.models.weights import Weights

_LOCAL_ROPE_BASE = 10000.0
_LAYERS_OF_27B = 62  # the one size whose factor on q follows from n_embd / n_head instead of the head's width


@dataclass(frozen=True, kw_only=True)
class Gemma3Hparams(Hparams):
    window: int
    """Tokens that a local layer sees."""
    pattern: int
    """Every ``pattern``-th layer is global."""
    logit_softcap: float


def read_hparams(gguf: GGUFFile) -> Gemma3Hparams:
    common = Hparams.read(gguf, rms_eps=1e-6, rope_base=1e6)
    window = gguf.get("gemma3.attention.sliding_window", 1024, int)
    pattern = gguf.get("gemma3.attention.sliding_window_pattern", 6, int)
    softcap = float(gguf.get("gemma3.final_logit_softcapping", 0.0, float))
    if not 1 <= window <= 1 << 30 or not 1 <= pattern <= 1 << 20 or not 0 <= softcap < 1e6:
        raise ModelError("gemma3's sliding window, its pattern or the logits' soft cap is out of range")
    shared = {f.name: getattr(common, f.name) for f in fields(Hparams)}
    return Gemma3Hparams(**shared, window=window, pattern=pattern, logit_softcap=softcap)


def build(g: Graph, hp: Gemma3Hparams, w: Weights) -> Node:
    local_rope = make_rope(hp, halves=True, base=_LOCAL_ROPE_BASE, stretched=False)
    global_rope = make_rope(hp, halves=True)
    scale = (hp.n_embd / hp.n_head if hp.n_layer == _LAYERS_OF_27B else hp.head_dim) ** -0.5
    x = g.embed(w["token_embd"], factor=hp.n_embd**0.5)
    for i in range(hp.n_layer):
        b = w.layer(i)
        is_global = (i + 1) % hp.pattern == 0
        rope = global_rope if is_global else local_rope
        attention = AttentionParams(hp.n_head, hp.n_head_kv, hp.head_dim, scale, window=0 if is_global else hp.window)
        h = g.rms_norm(x, b["attn_norm"], hp.rms_eps)
        q, k, v = (g.linear(h, b[n]) for n in ("attn_q", "attn_k", "attn_v"))
        q = g.rope(g.rms_norm(q, b["attn_q_norm"], hp.rms_eps), rope)
        k = g.rope(g.rms_norm(k, b["attn_k_norm"], hp.rms_eps), rope)
        h = g.linear(g.attention(i, q, k, v, attention), b["attn_output"])
        x = g.add(x, g.rms_norm(h, b["post_attention_norm"], hp.rms_eps))
        h = g.rms_norm(x, b["ffn_norm"], hp.rms_eps)
        h = g.linear(g.gelu_mul(g.linear(h, b["ffn_gate"]), g.linear(h, b["ffn_up"])), b["ffn_down"])
        x = g.add(x, g.rms_norm(h, b["post_ffw_norm"], hp.rms_eps))
    h = g.rms_norm(g.select_outputs(x), w["output_norm"], hp.rms_eps)
    return g.logits(h, w.output, softcap=hp.logit_softcap)
