"""Fusion, memory planning and the errors of the graph builder."""

from __future__ import annotations

import numpy as np
import pytest

from pyllama.core import CoreError, ThreadPool, create, ffi, lib
from pyllama.graph import AttentionParams, Graph, GraphError, Matrix, Node, Rope, Vector, lower

N_EMBD, N_FF, N_VOCAB = 64, 96, 50
ATTENTION = AttentionParams(n_head=4, n_head_kv=2, head_dim=16, scale=0.25)


def matrix(name: str, rows: int, cols: int, *, is_float: bool = False) -> Matrix:
    return Matrix(name, rows, cols, is_float, ffi.NULL)


def vector(name: str, n: int) -> Vector:
    return Vector(name, np.ones(n, np.float32))


ROPE = Rope(vector("frequencies", 8), halves=False)


def layer(g: Graph, x: Node, i: int, *, post_norms: bool = False) -> Node:
    h = g.rms_norm(x, vector("attn_norm", N_EMBD), 1e-5)
    q, k, v = (g.linear(h, matrix(name, rows, N_EMBD)) for name, rows in (("q", 64), ("k", 32), ("v", 32)))
    if post_norms:
        q, k = (g.rms_norm(t, vector("head_norm", 16), 1e-5) for t in (q, k))
    h = g.linear(g.attention(i, g.rope(q, ROPE), g.rope(k, ROPE), v, ATTENTION), matrix("o", N_EMBD, 64))
    x = g.add(x, g.rms_norm(h, vector("post", N_EMBD), 1e-5) if post_norms else h)
    h = g.rms_norm(x, vector("ffn_norm", N_EMBD), 1e-5)
    h = g.linear(
        g.silu_mul(g.linear(h, matrix("gate", N_FF, N_EMBD)), g.linear(h, matrix("up", N_FF, N_EMBD))),
        matrix("down", N_EMBD, N_FF),
    )
    return g.add(x, g.rms_norm(h, vector("post", N_EMBD), 1e-5) if post_norms else h)


def model(n_layer: int, *, post_norms: bool = False) -> Graph:
    g = Graph()
    x = g.embed(matrix("table", N_VOCAB, N_EMBD))
    for i in range(n_layer):
        x = layer(g, x, i, post_norms=post_norms)
    g.logits(g.rms_norm(g.select_outputs(x), vector("norm", N_EMBD), 1e-5), matrix("output", N_VOCAB, N_EMBD))
    return g


def kinds(g: Graph) -> list[str]:
    names = {getattr(lib, name): name[6:] for name in dir(lib) if name.startswith("PL_OP_")}
    return [names[op.kind] for op in lower(g.nodes)[0]]


def test_a_llama_layer_takes_nine_ops() -> None:
    first = ["EMBED", "RMS_NORM", "LINEAR", "ROPE_TABLE", "QKV", "ATTENTION", "QUANTIZE", "LINEAR", "RMS_NORM", "GLU", "LINEAR"]
    last = ["RMS_NORM", "LINEAR", "QKV", "ATTENTION", "SELECT", "QUANTIZE", "LINEAR", "RMS_NORM", "GLU", "LINEAR"]
    assert kinds(model(2)) == first + last + ["RMS_NORM", "HIDDEN", "LOGITS"]


def test_norms_after_the_blocks_join_the_residual_sum() -> None:
    found = kinds(model(1, post_norms=True))
    assert found.count("NORM_ADD") == 2
    assert "ADD" not in found


@pytest.mark.parametrize("post_norms", [False, True])
def test_after_the_last_attention_only_outputs_are_computed(post_norms: bool) -> None:
    ops, values, _ = lower(model(2, post_norms=post_norms).nodes)
    last = max(index for index, op in enumerate(ops) if op.kind == lib.PL_OP_ATTENTION)
    for index, op in enumerate(ops):
        assert all(values[number].per_output == (index > last) for number in op.outputs if number >= 0)
    assert len(ops[last + 1].inputs) == 2  # the residual stream and the heads


def test_outputs_are_selected_late_where_another_needs_all_tokens() -> None:
    g = Graph()
    x = g.embed(matrix("table", N_VOCAB, N_EMBD))
    x = g.add(x, g.linear(x, matrix("w", N_EMBD, N_EMBD)))
    g.logits(g.scale(g.select_outputs(x), 0.5), matrix("output", N_VOCAB, N_EMBD))
    q = g.linear(x, matrix("q", 64, N_EMBD))
    g.attention(0, q, *(g.linear(x, matrix(name, 32, N_EMBD)) for name in "kv"), ATTENTION)
    found = kinds(g)
    assert found.index("LINEAR") < found.index("SELECT") < found.index("SCALE")


def test_memory_does_not_grow_with_the_layers() -> None:
    assert lower(model(2).nodes)[2] == lower(model(20).nodes)[2]


def test_values_that_live_at_once_do_not_share_a_slot() -> None:
    ops, values, _ = lower(model(3, post_norms=True).nodes)
    first, last = {}, {}
    for index, op in enumerate(ops):
        for number in (*op.inputs, *op.outputs):
            if number >= 0:
                first.setdefault(number, index)
                last[number] = index
    for a in first:
        for b in first:
            if a < b and values[a].slot == values[b].slot:
                assert last[a] < first[b] or last[b] < first[a]


def test_tensors_that_do_not_fit_are_named() -> None:
    g = Graph()
    x = g.embed(matrix("table", N_VOCAB, N_EMBD))
    with pytest.raises(GraphError, match="'?wide'? has 65 columns"):
        g.linear(x, matrix("wide", 8, 65))
    with pytest.raises(GraphError, match="odd has 7 elements"):
        g.rms_norm(x, vector("odd", 7), 1e-5)
    with pytest.raises(GraphError, match="layer 3"):
        g.attention(3, x, x, x, ATTENTION)
    with pytest.raises(GraphError, match="two products"):
        g.silu_mul(x, x)


def float_matrix(name: str, rows: int, cols: int) -> Matrix:
    """One that the core has."""
    data = np.zeros((rows, cols), np.float32)
    handle = create(
        lib.pl_weight_new, lib.pl_weight_free,
        ffi.NULL, lib.PL_F32, rows, cols, ffi.from_buffer(data), data.nbytes, ffi.NULL,
    )  # fmt: skip
    return Matrix(name, rows, cols, True, handle)


@pytest.mark.parametrize("n_rows", [N_VOCAB - 1, N_VOCAB, N_VOCAB + 1])
def test_the_core_wants_a_logit_for_each_token(n_rows: int) -> None:
    g = Graph()
    x = g.embed(float_matrix("table", N_VOCAB, N_EMBD))
    g.logits(g.select_outputs(x), float_matrix("output", n_rows, N_EMBD))
    sizes = {"max_tokens": 8, "max_outputs": 8, "kv": ffi.NULL, "pool": ThreadPool(1)}
    if n_rows == N_VOCAB:
        assert g.compile(**sizes).handle
    else:
        with pytest.raises(CoreError, match="vocabulary"):
            g.compile(**sizes)


def test_the_core_refuses_a_program_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    g = Graph()
    g.logits(g.select_outputs(g.embed(float_matrix("table", N_VOCAB, N_EMBD))), float_matrix("output", N_VOCAB, N_EMBD))
    monkeypatch.setenv("PYLLAMA_CPU", "sse")
    with pytest.raises(CoreError, match="no such kernels"):
        g.compile(max_tokens=8, max_outputs=8, kv=ffi.NULL, pool=ThreadPool(1))


def test_the_core_refuses_a_program_that_does_not_fit() -> None:
    table = float_matrix("table", N_VOCAB, N_EMBD).handle
    pool = ThreadPool(1)

    def program(width: int, slot: int, kind: int = lib.PL_OP_EMBED):
        op, value = ffi.new("pl_op[1]"), ffi.new("pl_value[1]")
        op[0].kind, op[0].src, op[0].dst, op[0].w[0] = kind, [-1] * 4, [0, -1, -1], table
        op[0].f[0] = 1.0
        value[0].kind, value[0].width, value[0].slot = lib.PL_VALUE_F32, width, slot
        return create(
            lib.pl_program_new, lib.pl_program_free, op, 1, value, 1, 1, 8, 8, ffi.NULL, pool.handle
        )

    assert program(N_EMBD, 0)
    wrong = [
        (N_EMBD + 1, 0, lib.PL_OP_EMBED),
        (N_EMBD, 1, lib.PL_OP_EMBED),
        (N_EMBD, 0, 99),
        (N_EMBD, 0, lib.PL_OP_ATTENTION),
        (N_EMBD, 0, lib.PL_OP_LINEAR),
        (-1, 0, lib.PL_OP_EMBED),
    ]
    for width, slot, kind in wrong:
        with pytest.raises(CoreError, match="op 0|value 0"):
            program(width, slot, kind)
