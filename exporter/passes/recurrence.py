"""Writes recurrences over the tokens of a text in standard operators.

Where all features of a state decay alike, tokens are taken in chunks: products of matrices within a chunk, and a Scan
over the chunks (Dao and Gu 2024, section 6; Yang et al. 2024, section 3.3). Elsewhere a Scan goes over the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from rankbook.exporter.recurrence import DELTA, GATED, KIND, RECURRENCE, SELECTIVE
from rankbook.exporter.rewrite import TRACE_DOMAIN, AttributeValue, Writer, fixed_size, given

CHUNK = 64
"""Most tokens of a chunk; shorter texts are one chunk."""
_FLOAT = ir.TensorType(ir.DataType.FLOAT)
_HIDDEN = -1e9
"""What a logarithm becomes of which the exponential must be 0."""


class LowerRecurrence(ir.passes.InPlacePass):
    """Replaces the placeholders of `rankbook.exporter.recurrence`."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the model in place.

        Raises:
            ValueError: A recurrence of an unknown kind.
        """
        nodes = [node for node in model.graph if (node.domain, node.op_type) == (TRACE_DOMAIN, RECURRENCE)]
        places: _Places | None = None
        for node in nodes:
            kind = node.attributes[KIND].as_string()
            log_decay = node.inputs[4] if kind != SELECTIVE else None
            if kind == SELECTIVE:
                _Tokens(model.graph, node).selective()
            elif kind == DELTA and log_decay is not None and log_decay.shape is not None and len(log_decay.shape) == 4:
                _Tokens(model.graph, node).delta()
            elif kind in (DELTA, GATED):
                places = places or _Places(model.graph, node)
                _Chunks(model.graph, node, places).write()
            else:
                raise ValueError(f"node {node.name!r} is a recurrence of the unknown kind {kind!r}")
        return ir.passes.PassResult(model, modified=bool(nodes))


class _Lowering:
    """Nodes in the place of one placeholder."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.old = graph, node
        self.writer = Writer(graph, str(node.name))
        self.op = self.writer.op
        self.state, *self.given = (given(node, place) for place in range(len(node.inputs)))

    def ints(self, *numbers: int) -> ir.Value:
        return self.writer.ints(*numbers)

    def row(self, x: ir.Value) -> ir.Value:
        return self.op("Unsqueeze", x, self.ints(-2))

    def column(self, x: ir.Value) -> ir.Value:
        return self.op("Unsqueeze", x, self.ints(-1))

    def scan(self, body: _Body, inputs: Sequence[ir.Value], state: ir.Value, y: ir.Value) -> list[ir.Value]:
        """Return the last state, and what the body returns as ``y`` at every step."""
        attributes: dict[str, AttributeValue] = {"num_scan_inputs": len(inputs)}
        node = self.writer.node("Scan", [self.state, *inputs], attributes, outputs=2)
        node.attributes["body"] = ir.AttrGraph("body", body.graph([state, y]))
        return list(node.outputs)

    def replace(self, y: ir.Value, state: ir.Value) -> None:
        self.writer.replace(self.old, {self.old.outputs[0]: y, self.old.outputs[1]: state})


class _Body:
    """The graph of one step of a Scan: the state first, then what the step is given."""

    def __init__(self, lowering: _Lowering, ranks: Sequence[int]) -> None:
        self.prefix = f"{lowering.old.name}.step"
        self.writer = Writer(lowering.graph, self.prefix)
        self.op = self.writer.op
        self.inputs = [
            ir.Value(name=f"{self.prefix}.{place}", type=_FLOAT, shape=ir.Shape([None] * rank))
            for place, rank in enumerate(ranks)
        ]

    def graph(self, outputs: Sequence[ir.Value]) -> ir.Graph:
        for value in outputs:
            value.type = _FLOAT
        return ir.Graph(self.inputs, outputs, nodes=self.writer.nodes, name=self.prefix)


class _Tokens(_Lowering):
    """A Scan over tokens."""

    def selective(self) -> None:
        """Write `SELECTIVE`; all steps are of shapes (batch, features or 1, states or 1)."""
        x, dt, a, b, c = self.given
        wide = [self.column(self.op("Mul", x, dt)), self.column(dt), self.row(b), self.column(c)]
        body = _Body(self, [3, 3, 3, 3, 3])
        state, new, step, keys, queries = body.inputs
        kept = body.op("Mul", state, body.op("Exp", body.op("Mul", step, a)))
        after = body.op("Add", kept, body.op("Mul", new, keys))
        y = body.op("MatMul", after, queries)
        last, rows = self.scan(body, self._steps(wide), after, y)
        self.replace(self.op("Squeeze", self.op("Transpose", rows, perm=[1, 0, 2, 3]), self.ints(3)), last)

    def delta(self) -> None:
        """Write `DELTA` with a decay for each key; all steps are of shapes (batch, heads, keys or 1, values or 1)."""
        q, k, v, g, beta = self.given
        factors = self.column(self.op("Exp", g))
        wide = [self.row(q), self.row(k), self.column(k), self.row(v), factors, self.column(self.column(beta))]
        body = _Body(self, [4] * 7)
        state, queries, keys, columns, values, decays, weights = body.inputs
        kept = body.op("Mul", state, decays)
        new = body.op("Mul", weights, body.op("Sub", values, body.op("MatMul", keys, kept)))
        after = body.op("Add", kept, body.op("MatMul", columns, new))
        last, rows = self.scan(body, self._steps(wide), after, body.op("MatMul", queries, after))
        self.replace(self.op("Squeeze", self.op("Transpose", rows, perm=[1, 0, 2, 3, 4]), self.ints(3)), last)

    def _steps(self, inputs: Sequence[ir.Value]) -> list[ir.Value]:
        ranks = [5 if self.old.attributes[KIND].as_string() == DELTA else 4] * len(inputs)
        return [self.op("Transpose", x, perm=[1, 0, *range(2, rank)]) for x, rank in zip(inputs, ranks, strict=True)]


class _Places:
    """What all recurrences of a graph share: how a text is cut into chunks, and masks of a chunk.

    Attributes:
        length: Tokens, (1,).
        size: Tokens of a chunk, (1,).
        padding: Tokens that the last chunk lacks, (1,).
        single: Whether there is one token.
        causal: Whether a row is not before a column, (size, size).
        one: The unit matrix.
        below: For blocks of 1, 2, 4 ... tokens 1 where a row is in the second and a column in the first of two
            neighbours, 0 elsewhere.
    """

    def __init__(self, graph: ir.Graph, first: ir.Node) -> None:
        """Write it before the first recurrence."""
        self._writer = Writer(graph, "recurrence")
        op, ints = self._writer.op, self._writer.ints
        self.length = op("Shape", given(first, 1), start=1, end=2)
        self.size = op("Min", self.length, ints(CHUNK))
        behind = op("Sub", self.size, op("Mod", self.length, self.size))
        self.padding = op("Mod", behind, self.size)
        zero, one = (self._writer.number(number, ir.DataType.INT64) for number in (0, 1))
        self.single = op("Equal", op("Squeeze", self.length), one)
        places = op("Range", zero, op("Squeeze", self.size), one)
        row, column = op("Unsqueeze", places, ints(-1)), op("Unsqueeze", places, ints(-2))
        self.causal = op("GreaterOrEqual", row, column)
        self.one = op("Cast", op("Equal", row, column), to=ir.DataType.FLOAT)
        self.below = []
        for size in (2**power for power in range(CHUNK.bit_length() - 1)):
            blocks = [op("Div", place, ints(size)) for place in (row, column)]
            pairs = [op("Div", place, ints(2 * size)) for place in (row, column)]
            inside = op("And", op("Equal", *pairs), op("Greater", *blocks))
            self.below.append(op("Cast", inside, to=ir.DataType.FLOAT))
        graph.insert_before(first, self._writer.nodes)


class _Chunks(_Lowering):
    """A Scan over chunks of up to `CHUNK` tokens, and for a single token its arithmetic alone.

    What is padded has keys and decays of zero, and leaves the state as it is. In chunks all values are of the shape
    (chunks, batch, heads, tokens of a chunk, features).
    """

    def __init__(self, graph: ir.Graph, node: ir.Node, places: _Places) -> None:
        super().__init__(graph, node)
        self._places = places
        self._delta = node.attributes[KIND].as_string() == DELTA

    def write(self) -> None:
        """Replace the placeholder."""
        branches = {}
        for name, results in (("then", self._token), ("else", self._chunks)):
            self.writer = Writer(self.graph, f"{self.old.name}.{name}")
            self.op = self.writer.op
            branches[f"{name}_branch"] = ir.Graph([], results(), nodes=self.writer.nodes, name=self.writer.prefix)
        self.writer = Writer(self.graph, str(self.old.name))
        node = self.writer.node("If", [self._places.single], outputs=2)
        node.attributes.update({name: ir.AttrGraph(name, branch) for name, branch in branches.items()})
        self.replace(*node.outputs)

    def _token(self) -> list[ir.Value]:
        """Return y and the state of one token; all values are of the shape (batch, heads, keys or 1, values or 1).

        Queries and keys read the state in one product: ``q S' = exp(g) q S + (q k) n`` for ``S' = exp(g) S + k n``.
        """
        q, k, v = (self.op("Transpose", x, perm=[0, 2, 1, 3]) for x in self.given[:3])
        decay, *beta = (self.column(self.op("Transpose", x, perm=[0, 2, 1])) for x in self.given[3:])
        decay, column = self.op("Exp", decay), self.op("Transpose", k, perm=[0, 1, 3, 2])
        similar = self.op("MatMul", q, column)
        if self._delta:
            both = self.op("MatMul", self.op("Concat", q, k, axis=2), self.state)
            read, known = (self.op("Slice", both, self.ints(at), self.ints(at + 1), self.ints(2)) for at in (0, 1))
            new = self.op("Mul", beta[0], self.op("Sub", v, self.op("Mul", decay, known)))
            more = self.op("Mul", column, new)
        else:  # the state is turned
            read = self.op("MatMul", self.state, self.op("Transpose", q, perm=[0, 1, 3, 2]))
            read, new = self.op("Transpose", read, perm=[0, 1, 3, 2]), v
            more = self.op("Mul", self.op("Transpose", v, perm=[0, 1, 3, 2]), k)
        y = self.op("Add", self.op("Mul", decay, read), self.op("Mul", similar, new))
        state = self.op("Add", self.op("Mul", self.state, decay), more)
        return [self.op("Transpose", y, perm=[0, 2, 1, 3]), state]

    def _chunks(self) -> list[ir.Value]:
        """Return y and the state of any number of tokens."""
        q, k, v, g = (self._chunked(x) for x in self.given[:4])
        total = self.op("CumSum", g, self._scalar(3))
        last = self.op("Slice", total, self.ints(-1), self.ints(2**62), self.ints(3))
        between = self.op("Sub", self.column(total), self.row(total))
        decay = self.op("Exp", self.op("Where", self._places.causal, between, self._number(_HIDDEN)))
        scores = self.op("Mul", self._products(q, k), decay)
        grown = self.column(self.op("Exp", total))
        read = self.op("Mul", q, grown)
        remaining = self.column(self.op("Exp", self.op("Sub", last, total)))
        kept = self.column(self.op("Exp", last))
        if self._delta:
            beta = self.column(self._chunked(self.given[4]))
            weighted = self.op("Mul", k, beta)
            solved = self._inverse(self.op("Mul", self._products(weighted, k), decay))
            new = self.op("MatMul", solved, self.op("Mul", v, beta))
            seen = self.op("MatMul", solved, self.op("Mul", weighted, grown))
            written = self.op("Transpose", self.op("Mul", k, remaining), perm=[0, 1, 2, 4, 3])
            rows, state = self._corrected([read, written, kept, scores, new, seen])
        else:
            turned = self.op("MatMul", self.op("Transpose", v, perm=[0, 1, 2, 4, 3]), self.op("Mul", k, remaining))
            rows, state = self._summed([read, kept, turned])
            rows = self.op("Add", rows, self.op("MatMul", scores, v))
        return [self._joined(rows), state]

    def _corrected(self, inputs: Sequence[ir.Value]) -> tuple[ir.Value, ir.Value]:
        """Scan with what is new less what the state says already."""
        body = _Body(self, [4] * 7)
        state, read, written, kept, scores, new, seen = body.inputs
        values = body.op("Sub", new, body.op("MatMul", seen, state))
        y = body.op("Add", body.op("MatMul", read, state), body.op("MatMul", scores, values))
        after = body.op("Add", body.op("Mul", state, kept), body.op("MatMul", written, values))
        last, rows = self.scan(body, inputs, after, y)
        return rows, last

    def _summed(self, inputs: Sequence[ir.Value]) -> tuple[ir.Value, ir.Value]:
        """Scan with what is new as it is."""
        body = _Body(self, [4] * 4)
        state, read, kept, new = body.inputs
        y = body.op("MatMul", read, body.op("Transpose", state, perm=[0, 1, 3, 2]))
        after = body.op("Add", body.op("Mul", state, kept), new)
        last, rows = self.scan(body, inputs, after, y)
        return rows, last

    def _inverse(self, lower: ir.Value) -> ir.Value:
        """Return the inverse of 1 + the part of a matrix below its diagonal.

        Of blocks on the diagonal that are solved, two become one: [[A, 0], [L, C]] has the inverse [[A', 0],
        [-C' L A', C']]. Every block of an inverse is one of the whole inverse, so that nothing grows on the way.
        """
        first, *others = self._places.below
        solved = self.op("Sub", self._places.one, self.op("Mul", lower, first))
        for below in others:
            part = self.op("Mul", lower, below)
            solved = self.op("Sub", solved, self.op("MatMul", self.op("MatMul", solved, part), solved))
        return solved

    def _products(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.op("MatMul", a, self.op("Transpose", b, perm=[0, 1, 2, 4, 3]))

    def _chunked(self, x: ir.Value) -> ir.Value:
        """Cut (batch, sequence, heads, features) or (batch, sequence, heads) into chunks."""
        rank = 0 if x.shape is None else len(x.shape)
        sizes = [fixed_size(x, axis) for axis in range(2, rank)]
        before, behind = self.ints(*[0] * (rank + 1)), self.ints(*[0] * (rank - 2))
        padded = self.op("Pad", x, self.op("Concat", before, self._places.padding, behind, axis=0))
        shape = self.op("Concat", self.ints(0, -1), self._places.size, self.ints(*sizes), axis=0)
        return self.op("Transpose", self.op("Reshape", padded, shape), perm=[1, 0, 3, 2, 4][: rank + 1])

    def _joined(self, rows: ir.Value) -> ir.Value:
        """Return (batch, sequence, heads, features) of chunks."""
        sizes = [fixed_size(self.old.outputs[0], axis) for axis in (2, 3)]
        joined = self.op("Reshape", self.op("Transpose", rows, perm=[1, 0, 3, 2, 4]), self.ints(0, -1, *sizes))
        return self.op("Slice", joined, self.ints(0), self._places.length, self.ints(1))

    def _scalar(self, number: int) -> ir.Value:
        return self.writer.number(number, ir.DataType.INT64)

    def _number(self, number: float) -> ir.Value:
        return self.writer.number(number, ir.DataType.FLOAT)
