"""The graph builder: what an architecture says, turned into one flat program for the core.

A model's ``build`` function calls the methods of :class:`Graph`; each returns a :class:`Node`, a matrix with one row per
token (after :meth:`Graph.select_outputs`: per requested output). :meth:`Graph.compile` then

1. *fuses* what belongs together: products of one input (q, k, v) into one op; gate, up and activation into one; a residual
   sum into the product or norm before it; head norms, rotation and the storing of K and V into one; a norm with the
   quantization of its result; and lets the selection of outputs come as early as it may, so that what follows the last
   attention is computed for the outputs alone,
2. *plans memory*: values whose lives do not overlap share a slot,
3. hands the list to the core, which checks it and runs it from then on in one call a step.

This module knows ops and shapes, never an architecture's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pyllama.core import ThreadPool, create, ffi, lib

__all__ = ["AttentionParams", "Graph", "GraphError", "Matrix", "Node", "Program", "Rope", "Vector"]

_ROW_BY_ROW = ("rms_norm", "linear", "glu", "add", "scale")  # a row of the result needs only this row of the inputs
_WIDEST_NORM_WITHOUT_FLOAT = 8192  # the core keeps such a row on its stack


class GraphError(ValueError):
    """Tensors or parameters that do not fit together; the message names them."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight matrix in the core: ``rows`` outputs of ``cols`` inputs each."""

    name: str
    rows: int
    cols: int
    is_float: bool
    handle: Any  # pl_weight *


@dataclass(frozen=True, eq=False)
class Vector:
    """A float32 vector that the core reads in place."""

    name: str
    data: np.ndarray

    @property
    def pointer(self) -> Any:
        return ffi.cast("const float *", self.data.ctypes.data)

    def __len__(self) -> int:
        return self.data.shape[0]


@dataclass(frozen=True, eq=False)
class Rope:
    """A rotary embedding: inverse frequencies [n_rotated / 2], which columns pair up, and a factor on cos and sin."""

    frequencies: Vector
    halves: bool
    magnitude: float = 1.0

    @property
    def n_rotated(self) -> int:
        return 2 * len(self.frequencies)


@dataclass(frozen=True)
class AttentionParams:
    """Heads, the factor on q, and the two optional limits of one attention layer."""

    n_head: int
    n_head_kv: int
    head_dim: int
    scale: float
    window: int = 0
    """A token sees itself and the ``window - 1`` tokens before it; 0: all before it."""
    softcap: float = 0.0


@dataclass(eq=False)
class Node:
    """A matrix that will be computed: ``width`` columns, a row per token or per output."""

    op: str
    inputs: tuple[Node, ...]
    width: int
    per_output: bool
    weight: Matrix | None = None
    vector: Vector | None = None
    attrs: dict[str, Any] = field(default_factory=dict)


class Graph:
    """Builds nodes in the order of computation."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def _node(self, op: str, inputs: Sequence[Node], width: int, *, weight: Matrix | None = None, vector: Vector | None = None,
              **attrs: Any) -> Node:
        per_output = bool(inputs) and inputs[0].per_output
        node = Node(op, tuple(inputs), width, per_output or op == "select", weight, vector, attrs)
        self.nodes.append(node)
        return node

    def embed(self, table: Matrix, factor: float = 1.0) -> Node:
        """Rows of ``table`` for the batch's tokens, times ``factor``: [n_tokens, n_embd]."""
        return self._node("embed", (), table.cols, weight=table, factor=factor)

    def rms_norm(self, x: Node, factor: Vector, epsilon: float) -> Node:
        """Root-mean-square norm (Zhang and Sennrich 2019) of each row, or, if ``factor`` is a whole fraction of the row, of
        each head of ``len(factor)`` columns."""
        if x.width % len(factor):
            raise GraphError(f"{factor.name} has {len(factor)} elements and cannot norm rows of {x.width}")
        op = "rms_norm" if len(factor) == x.width else "head_norm"
        return self._node(op, (x,), x.width, vector=factor, epsilon=epsilon)

    def linear(self, x: Node, weight: Matrix, bias: Vector | None = None) -> Node:
        """``x`` times the transpose of ``weight``, plus ``bias``: [n, weight.rows]."""
        if weight.cols != x.width:
            raise GraphError(f"{weight.name} has {weight.cols} columns, its input {x.width}")
        if bias is not None and len(bias) != weight.rows:
            raise GraphError(f"{bias.name} has {len(bias)} elements, {weight.name} {weight.rows} rows")
        return self._node("linear", (x,), weight.rows, weight=weight, vector=bias)

    def rope(self, x: Node, rope: Rope) -> Node:
        """Rotates each head of q or k by its token's position (Su et al. 2021)."""
        return self._node("rope", (x,), x.width, rope=rope)

    def attention(self, layer: int, q: Node, k: Node, v: Node, params: AttentionParams) -> Node:
        """Causal attention of q over the sequence's keys and values, the new ones stored first: [n, n_head * head_dim]."""
        kv_width = params.n_head_kv * params.head_dim
        if (q.width, k.width, v.width) != (params.n_head * params.head_dim, kv_width, kv_width):
            raise GraphError(
                f"layer {layer}: q, k, v of {q.width}, {k.width}, {v.width} columns are not {params.n_head} and "
                f"{params.n_head_kv} heads of {params.head_dim}"
            )
        return self._node("attention", (q, k, v), q.width, layer=layer, params=params)

    def add(self, a: Node, b: Node) -> Node:
        """``a + b``."""
        if a.width != b.width:
            raise GraphError(f"cannot add rows of {a.width} and {b.width} columns")
        return self._node("add", (a, b), a.width)

    def scale(self, x: Node, factor: float) -> Node:
        """``factor * x``."""
        return self._node("scale", (x,), x.width, factor=factor)

    def silu_mul(self, gate: Node, up: Node) -> Node:
        """``silu(gate) * up`` (SwiGLU, Shazeer 2020); both must be products of one input."""
        return self._glu(gate, up, lib.PL_SILU)

    def gelu_mul(self, gate: Node, up: Node) -> Node:
        """``gelu(gate) * up`` in gelu's tanh form (GeGLU, Shazeer 2020); both must be products of one input."""
        return self._glu(gate, up, lib.PL_GELU_TANH)

    def _glu(self, gate: Node, up: Node, activation: int) -> Node:
        if gate.op != "linear" or up.op != "linear" or gate.inputs != up.inputs or gate.vector or up.vector:
            raise GraphError("a gated unit needs two products of one input, without bias")
        if gate.width != up.width:
            raise GraphError(f"gate and up are {gate.width} and {up.width} wide")
        return self._node("glu", (gate, up), gate.width, activation=activation)

    def select_outputs(self, x: Node) -> Node:
        """The rows of the tokens whose logits were asked for: [n_outputs, width]."""
        return self._node("select", (x,), x.width)

    def logits(self, x: Node, weight: Matrix, *, factor: float = 1.0, softcap: float = 0.0) -> Node:
        """The program's result: ``softcap * tanh(factor * x @ weight.T / softcap)`` (no cap if 0), [n_outputs, n_vocab]."""
        if weight.cols != x.width:
            raise GraphError(f"{weight.name} has {weight.cols} columns, its input {x.width}")
        return self._node("logits", (x,), weight.rows, weight=weight, factor=factor, softcap=softcap)

    def compile(self, *, max_tokens: int, max_outputs: int, kv: Any, pool: ThreadPool) -> Program:
        """The program of all nodes.

        Args:
            max_tokens: most tokens of one run.
            max_outputs: most rows of logits of one run.
            kv: the core's ``pl_kv *``.
            pool: threads; kept alive by the program.
        """
        return Program(*lower(self.nodes), max_tokens, max_outputs, kv, pool)


def lower(nodes: list[Node]) -> tuple[list[Op], list[Value], int]:
    """Ops, values and the number of slots for ``nodes``: fusion and memory planning without the core."""
    return _Compiler(_select_early(nodes)).lower()


def _consumers(nodes: list[Node]) -> dict[Node, list[Node]]:
    consumers: dict[Node, list[Node]] = {node: [] for node in nodes}
    for node in nodes:
        for source in node.inputs:
            consumers[source].append(node)
    return consumers


def _select_early(nodes: list[Node]) -> list[Node]:
    """The same computation with each selection of outputs moved to before the nodes that only it needs, as far as they
    compute row by row."""
    consumers = _consumers(nodes)
    passed: set[Node] = set()  # selections, and what they move to before
    for node in reversed(nodes):
        if node.op == "select" or (node.op in _ROW_BY_ROW and consumers[node] and passed.issuperset(consumers[node])):
            passed.add(node)
    result: list[Node] = []
    whole: dict[Node, Node] = {}  # the new form of each node
    selected: dict[Node, Node] = {}

    def rows_of(node: Node) -> Node:
        if whole[node].per_output:
            return whole[node]
        if node not in selected:
            selected[node] = Node("select", (whole[node],), node.width, per_output=True)
            result.append(selected[node])
        return selected[node]

    for node in nodes:
        if node.op == "select":
            whole[node] = rows_of(node.inputs[0])
            continue
        form = rows_of if node in passed else whole.__getitem__
        whole[node] = replace(
            node, inputs=tuple(form(source) for source in node.inputs), per_output=node.per_output or node in passed
        )
        result.append(whole[node])
    return result


@dataclass
class Value:
    """A matrix that the program keeps for a while: see ``pl_value`` in the core's header."""

    quantized: bool
    per_output: bool
    width: int
    slot: int = -1


@dataclass
class Op:
    """One op of a program: see ``pl_op`` in the core's header."""

    kind: int
    inputs: list[int]
    outputs: list[int]
    n: tuple[int, ...] = ()
    f: tuple[float, ...] = ()
    weights: tuple[Matrix, ...] = ()
    vectors: tuple[Vector | None, ...] = ()


class _Compiler:
    """Nodes in, ops out; one ``_emit_`` method per op."""

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes
        self.ops: list[Op] = []
        self.values: list[Value] = []
        self.floats: dict[Node, int] = {}
        self.quantized: dict[Node, int] = {}
        self.rope_tables: dict[Rope, int] = {}
        self.grouped: set[Node] = set()  # products and selections that an earlier op computes beside its own
        self.consumers = _consumers(nodes)
        self.absorbed = self._find_absorbed()

    # -- what is part of a later op -----------------------------------------------------------------------------------

    def _only_for(self, node: Node, consumer: Node) -> bool:
        return self.consumers[node] == [consumer]

    def _find_absorbed(self) -> dict[Node, Node]:
        """Nodes that have no op of their own, each with the node whose op does their work."""
        absorbed: dict[Node, Node] = {}
        for node in self.nodes:
            if node.op == "attention":
                for source in node.inputs:
                    while source.op in ("rope", "head_norm"):
                        absorbed[source] = node
                        source = source.inputs[0]
            elif node.op == "glu":
                if not all(self._only_for(source, node) for source in node.inputs):
                    raise GraphError("the products of a gated unit cannot be used elsewhere")
                absorbed.update(dict.fromkeys(node.inputs, node))
            elif node.op == "add":
                for source in reversed(node.inputs):  # the second operand is the branch, the first the residual stream
                    if source.op in ("linear", "rms_norm") and self._only_for(source, node) and source not in absorbed:
                        absorbed[source] = node
                        break
        return absorbed

    # -- values -------------------------------------------------------------------------------------------------------

    def _new_value(self, node: Node, *, quantized: bool, width: int | None = None) -> int:
        self.values.append(Value(quantized, node.per_output, node.width if width is None else width))
        return len(self.values) - 1

    def _wants(self, node: Node) -> tuple[bool, bool]:
        """Whether float and quantized forms of ``node`` are read by its consumers."""
        wants_float = wants_quantized = False
        for consumer in self.consumers[node]:
            if consumer.op in ("linear", "logits") and not consumer.weight.is_float:
                wants_quantized = True
                wants_float |= consumer.op == "logits"  # the hidden state is an output too
            else:
                wants_float = True
        return wants_float, wants_quantized

    def _float(self, node: Node) -> int:
        return self.floats[node]

    def _operand(self, node: Node, weight: Matrix) -> int:
        """The form of ``node`` that a product with ``weight`` reads."""
        if weight.is_float:
            return self._float(node)
        if node not in self.quantized:
            self.quantized[node] = self._new_value(node, quantized=True)
            self.ops.append(Op(lib.PL_OP_QUANTIZE, [self._float(node)], [self.quantized[node]]))
        return self.quantized[node]

    def _produce_both(self, node: Node) -> list[int]:
        """Outputs [float or -1, quantized or -1] of an op that can give either."""
        wants_float, wants_quantized = self._wants(node)
        if wants_quantized and node.op == "rms_norm" and node.width > _WIDEST_NORM_WITHOUT_FLOAT:
            wants_float = True
        if wants_float or not wants_quantized:
            self.floats[node] = self._new_value(node, quantized=False)
        if wants_quantized:
            self.quantized[node] = self._new_value(node, quantized=True)
        return [self.floats.get(node, -1), self.quantized.get(node, -1)]

    def _float_output(self, node: Node) -> int:
        self.floats[node] = self._new_value(node, quantized=False)
        return self.floats[node]

    # -- ops ----------------------------------------------------------------------------------------------------------

    def _emit_embed(self, node: Node) -> None:
        self.ops.append(
            Op(lib.PL_OP_EMBED, [], [self._float_output(node)], f=(node.attrs["factor"],), weights=(node.weight,))
        )

    def _emit_rms_norm(self, node: Node) -> None:
        source = self._float(node.inputs[0])
        outputs = self._produce_both(node)
        self.ops.append(
            Op(lib.PL_OP_RMS_NORM, [source], outputs, f=(node.attrs["epsilon"],), vectors=(node.vector,))
        )

    def _emit_linear(self, node: Node) -> None:
        """This product and those of the same input that come with it (up to three)."""
        group = [
            other
            for other in self.consumers[node.inputs[0]]
            if other.op == "linear"
            and other not in self.absorbed
            and other not in self.grouped
            and other.weight.is_float == node.weight.is_float
        ][:3]
        source = self._operand(node.inputs[0], node.weight)
        outputs = [self._float_output(other) for other in group]
        self.grouped.update(group)
        self.ops.append(
            Op(
                lib.PL_OP_LINEAR,
                [source],
                outputs,
                weights=tuple(other.weight for other in group),
                vectors=tuple(other.vector for other in group),
            )
        )

    def _emit_glu(self, node: Node) -> None:
        gate, up = node.inputs
        if gate.weight.is_float != up.weight.is_float:
            raise GraphError(f"{gate.weight.name} and {up.weight.name} must both be quantized or both be floats")
        source = self._operand(gate.inputs[0], gate.weight)
        if node.width % 32:  # the core quantizes whole groups of 32 columns only
            outputs = [self._float_output(node), -1]
        else:
            outputs = self._produce_both(node)
        self.ops.append(
            Op(lib.PL_OP_GLU, [source], outputs, n=(node.attrs["activation"],), weights=(gate.weight, up.weight))
        )

    def _emit_add(self, node: Node) -> None:
        branch = next((source for source in node.inputs if self.absorbed.get(source) is node), None)
        if branch is None:
            inputs = [self._float(source) for source in node.inputs]
            self.ops.append(Op(lib.PL_OP_ADD, inputs, [self._float_output(node)]))
            return
        residual = self._float(node.inputs[0] if node.inputs[1] is branch else node.inputs[1])
        if branch.op == "linear":
            source = self._operand(branch.inputs[0], branch.weight)
            self.ops.append(
                Op(
                    lib.PL_OP_LINEAR,
                    [source, residual],
                    [self._float_output(node)],
                    weights=(branch.weight,),
                    vectors=(branch.vector,),
                )
            )
        else:
            source = self._float(branch.inputs[0])
            self.ops.append(
                Op(
                    lib.PL_OP_NORM_ADD,
                    [residual, source],
                    [self._float_output(node)],
                    f=(branch.attrs["epsilon"],),
                    vectors=(branch.vector,),
                )
            )

    def _emit_scale(self, node: Node) -> None:
        source = self._float(node.inputs[0])
        self.ops.append(Op(lib.PL_OP_SCALE, [source], [self._float_output(node)], f=(node.attrs["factor"],)))

    def _rope_table(self, rope: Rope, node: Node) -> int:
        if rope not in self.rope_tables:
            table = self._new_value(node, quantized=False, width=rope.n_rotated)
            self.rope_tables[rope] = table
            op = Op(lib.PL_OP_ROPE_TABLE, [], [table], n=(rope.n_rotated,), f=(rope.magnitude,), vectors=(rope.frequencies,))
            self.ops.append(op)
        return self.rope_tables[rope]

    def _emit_attention(self, node: Node) -> None:
        params: AttentionParams = node.attrs["params"]
        layer: int = node.attrs["layer"]
        bases, norms, ropes, epsilon = [], [], [], 0.0
        for source in node.inputs:
            norm = rope = None
            while source.op in ("rope", "head_norm"):
                if source.op == "rope":
                    if norm is not None or rope is not None:
                        raise GraphError(f"layer {layer}: a head is normed first, then rotated, each once")
                    rope = source.attrs["rope"]
                else:
                    norm, epsilon = source.vector, source.attrs["epsilon"]
                source = source.inputs[0]
            if len({id(consumer) for consumer in self.consumers[source]}) != 1:
                raise GraphError(f"layer {layer}: q, k and v are changed in place and cannot be used elsewhere")
            bases.append(source)
            norms.append(norm)
            ropes.append(rope)
        if ropes[0] is not ropes[1] or ropes[2] is not None or norms[2] is not None:
            raise GraphError(f"layer {layer}: q and k take one rotation; v none, and no norm")
        for norm in norms[:2]:
            if norm is not None and len(norm) != params.head_dim:
                raise GraphError(f"{norm.name} has {len(norm)} elements, a head {params.head_dim}")
        rope = ropes[0]
        if rope is not None and rope.n_rotated > params.head_dim:
            raise GraphError(f"layer {layer}: {rope.n_rotated} columns of a head of {params.head_dim} cannot be rotated")
        table = -1 if rope is None else self._rope_table(rope, node)
        q, k, v = (self._float(base) for base in bases)
        kind = lib.PL_ROPE_HALVES if rope is not None and rope.halves else lib.PL_ROPE_PAIRS
        self.ops.append(
            Op(
                lib.PL_OP_QKV,
                [q, k, v, table],
                [q],
                n=(layer, params.n_head, 0 if rope is None else rope.n_rotated, kind),
                f=(epsilon, params.scale),
                vectors=(norms[0], norms[1]),
            )
        )
        self.ops.append(
            Op(
                lib.PL_OP_ATTENTION,
                [q],
                [self._float_output(node)],
                n=(layer, params.n_head, params.window),
                f=(params.softcap,),
            )
        )

    def _emit_select(self, node: Node) -> None:
        """This selection and others whose inputs are there (up to three)."""
        group = [
            other
            for other in self.nodes
            if other.op == "select" and other not in self.grouped and other.inputs[0] in self.floats
        ][:3]
        sources = [self._float(other.inputs[0]) for other in group]
        self.grouped.update(group)
        self.ops.append(Op(lib.PL_OP_SELECT, sources, [self._float_output(other) for other in group]))

    def _emit_logits(self, node: Node) -> None:
        self.ops.append(Op(lib.PL_OP_HIDDEN, [self._float(node.inputs[0])], []))
        source = self._operand(node.inputs[0], node.weight)
        factors = (node.attrs["factor"], node.attrs["softcap"])
        self.ops.append(Op(lib.PL_OP_LOGITS, [source], [], f=factors, weights=(node.weight,)))

    # -- memory -------------------------------------------------------------------------------------------------------

    def _plan_slots(self) -> int:
        """Gives each value a slot that is free while the value lives; returns the number of slots."""
        last_use = {}
        for index, op in enumerate(self.ops):
            for value in (*op.inputs, *op.outputs):
                last_use[value] = index
        free: dict[tuple[bool, int], list[int]] = {}  # a slot has room for all tokens if one of its values has a row for each
        n_slots = 0
        for index, op in enumerate(self.ops):
            for number in op.outputs:
                if number >= 0 and self.values[number].slot < 0:
                    value = self.values[number]
                    same = free.get((value.quantized, value.width))
                    if same:
                        value.slot = same.pop()
                    else:
                        value.slot = n_slots
                        n_slots += 1
            for number in {*op.inputs, *op.outputs}:
                if number >= 0 and last_use[number] == index:
                    value = self.values[number]
                    free.setdefault((value.quantized, value.width), []).append(value.slot)
        return n_slots

    # -- the whole ----------------------------------------------------------------------------------------------------

    def lower(self) -> tuple[list[Op], list[Value], int]:
        for node in self.nodes:
            if node not in self.absorbed and node not in self.grouped:
                emit = getattr(self, f"_emit_{node.op}", None)
                if emit is None:
                    raise GraphError(f"{_described(node)} is possible only for the inputs of attention")
                emit(node)
        return self.ops, self.values, self._plan_slots()


def _described(node: Node) -> str:
    """The op of a node and, if it has one, its vector's name and size."""
    return node.op if node.vector is None else f"{node.op} with {node.vector.name} ({len(node.vector)} elements)"


class Program:
    """A program in the core, with everything it points to kept alive."""

    def __init__(
        self, ops: list[Op], values: list[Value], n_slots: int, max_tokens: int, max_outputs: int, kv: Any, pool: ThreadPool
    ) -> None:
        self.max_tokens, self.max_outputs = max_tokens, max_outputs
        self._keep = (ops, kv, pool)
        c_ops = ffi.new("pl_op[]", len(ops))
        for c_op, op in zip(c_ops, ops, strict=True):
            c_op.kind = op.kind
            c_op.src = op.inputs + [-1] * (4 - len(op.inputs))
            c_op.dst = op.outputs + [-1] * (3 - len(op.outputs))
            c_op.n = list(op.n)
            c_op.f = list(op.f)
            for i, weight in enumerate(op.weights):
                c_op.w[i] = weight.handle
            for i, vector in enumerate(op.vectors):
                if vector is not None:
                    c_op.v[i], c_op.v_len[i] = vector.pointer, len(vector)
        c_values = ffi.new("pl_value[]", len(values))
        for c_value, value in zip(c_values, values, strict=True):
            c_value.kind = lib.PL_VALUE_Q8 if value.quantized else lib.PL_VALUE_F32
            c_value.rows = lib.PL_ROWS_OUTPUTS if value.per_output else lib.PL_ROWS_TOKENS
            c_value.width, c_value.slot = value.width, value.slot
        self.handle = create(
            lib.pl_program_new,
            lib.pl_program_free,
            c_ops,
            len(ops),
            c_values,
            len(values),
            n_slots,
            max_tokens,
            max_outputs,
            kv,
            pool.handle,
        )
        self.n_bytes: int = lib.pl_program_bytes(self.handle)
