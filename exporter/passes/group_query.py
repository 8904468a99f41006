"""Replaces attention by one node with rotary embedding and cache inside: ONNX Runtime's, or rankbook's around it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rankbook.exporter.passes.kv_cache import PAST, cache_layers
from rankbook.exporter.rewrite import Writer, fixed_size, float_attribute, given, producer, standard_nodes, take_over
from rankbook.plugins import attention

Tables = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
"""cos and sin of a rotary embedding by position, (positions, size / 2) each."""


class GroupQueryAttention(ir.passes.InPlacePass):
    """Makes one node of an Attention, the Concats of its cache, and the rotary embedding and transposes before it.

    The node is ``rankbook::GroupQueryAttention``, whose body is ``com.microsoft::GroupQueryAttention``; for what its
    kernel does not take (other types than float32, larger heads) it is the latter itself.

    What differs from the portable graph:

    * Which keys a query sees follows from its place. Of ``attention_mask`` only the number of ones in a row is used, so
      padding must come last; several tokens that continue a cache need a batch of one.
    * ``past_key_values`` may be buffers longer than the past that are given as ``present`` too: nothing is copied then.
    """

    def __init__(self, tables: Tables | None, windows: list[int]) -> None:
        """Give what the graph does not say.

        Args:
            tables: Of the model's rotary embedding; None where it is not one table for all layers: the embedding then
                stays a node of its own.
            windows: How many positions a query sees in each layer, itself included; -1 for all.
        """
        super().__init__()
        self._tables, self._windows = tables, windows

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the model in place.

        Raises:
            ValueError: An attention whose cache or result is not where it is expected; the message names it. Layers
                with another attention, or with masks that are no windows.
        """
        nodes = standard_nodes(model.graph, "Attention")
        layers = cache_layers(model.graph.inputs)
        if len(nodes) != layers:
            raise ValueError(
                f"ONNX Runtime's operator computes the attention of {len(nodes)} of {layers} layers; export with graph"
                " standard"
            )
        fusions = [_Fusion(model.graph, node) for node in nodes]
        self._check_masks(fusions)
        lengths = fusions[0].lengths() if fusions else []
        for fusion in fusions:
            fusion.apply(lengths, self._tables, self._windows)
        return ir.passes.PassResult(model, modified=bool(nodes))

    def _check_masks(self, fusions: list[_Fusion]) -> None:
        """Check that layers share a mask exactly where they share a window: the operator makes its own masks."""
        pairs = {(id(fusion.mask), self._windows[fusion.layer]) for fusion in fusions}
        masks, windows = ({pair[part] for pair in pairs} for part in (0, 1))
        if not len(pairs) == len(masks) == len(windows):
            raise ValueError(
                f"{len(masks)} masks and windows of {', '.join(map(str, sorted(windows)))} positions (-1 is all) do not"
                " belong together, so which keys a layer sees is not known; export with graph standard"
            )


class _Fusion:
    """The nodes that take the place of one Attention node."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self._graph, self._node = graph, node
        self._writer = Writer(graph, str(node.name))
        self._op = self._writer.op
        self._caches = [_cache(node, value) for value in node.inputs[1:3]]
        self._query = given(node, 0)
        self._new = [given(cache, 1) for cache in self._caches]
        self._past = [given(cache, 0) for cache in self._caches]
        self._heads, self._size = fixed_size(self._query, 1), fixed_size(self._query, 3)
        if fixed_size(self._past[1], 3) != self._size:
            raise ValueError("ONNX Runtime's attention takes keys and values of one size; export with graph standard")
        if self._size % attention.HEAD_STEP:
            raise ValueError(
                f"ONNX Runtime's attention takes heads of a multiple of {attention.HEAD_STEP} numbers,"
                f" and these have {self._size}; export with graph standard"
            )

    @property
    def mask(self) -> ir.Value | None:
        """Mask of the attention node, which is left out."""
        return self._node.inputs[3] if len(self._node.inputs) > 3 else None

    @property
    def layer(self) -> int:
        """Number of the layer, from the name of its cache."""
        return int(str(self._past[0].name).removeprefix(PAST).split(".")[0])

    def lengths(self) -> list[ir.Value]:
        """Return what all layers share: the number of keys in each row less one, and in the longest row; int32."""
        mask = self._input("attention_mask")
        one = self._writer.number(1, ir.DataType.INT64)
        last = self._op("Sub", self._op("ReduceSum", mask, self._writer.ints(1), keepdims=0), one)
        total = self._op("Squeeze", self._op("Shape", mask, start=1, end=2))
        return [self._op("Cast", value, to=ir.DataType.INT32) for value in (last, total)]

    def apply(self, lengths: list[ir.Value], tables: Tables | None, windows: list[int]) -> None:
        """Replace the node."""
        rotary = self._take_rotary(tables)
        attributes: dict[str, int | float] = {
            "num_heads": self._heads,
            "kv_num_heads": fixed_size(self._past[0], 1),
            "scale": float_attribute(self._node, "scale", self._size**-0.5),
            "softcap": float_attribute(self._node, "softcap", 0.0),
            "local_window_size": windows[self.layer],
            "do_rotary": int(bool(rotary)),
        }
        rows = [self._rows(value) for value in (self._query, *self._new)]
        inputs = [*rows, *self._past, *lengths, *rotary]
        own = self._past[0].dtype == ir.DataType.FLOAT and attention.supports(self._size, rotary=bool(rotary))
        results = self._writer.call(attention.OPERATOR, inputs, attributes, stock=not own)
        self._graph.insert_before(self._node, self._writer.nodes)
        self._finish(*results)

    def _take_rotary(self, tables: Tables | None) -> list[ir.Value]:
        """Step over the rotary embedding of query and key; return the inputs that do it inside, or nothing."""
        before = [_rotary(value) for value in (self._query, self._new[0])]
        query, key = before
        if tables is None or query is None or key is None or list(query.inputs[1:]) != list(key.inputs[1:]):
            return []
        if 2 * tables[0].shape[1] != self._size or self._query.dtype is None:
            return []
        self._query, self._new[0] = given(query, 0), given(key, 0)
        dtype = self._query.dtype or ir.DataType.FLOAT
        names = [f"rotary.{name}.{dtype.name}" for name in ("cos", "sin")]
        found = [
            self._writer.array(name, table.astype(dtype.numpy())) for name, table in zip(names, tables, strict=True)
        ]
        return [*found, self._input("position_ids")]

    def _rows(self, value: ir.Value) -> ir.Value:
        """Turn (batch, heads, sequence, size) into (batch, sequence, heads * size), undoing the way there."""
        transpose = value.producer()
        if transpose is not None and _swaps_heads(transpose):
            value = given(transpose, 0)
            reshape = value.producer()
            source = reshape.inputs[0] if reshape is not None and reshape.op_type == "Reshape" else None
            if source is not None and source.shape is not None and len(source.shape) == 3:
                return source
        else:
            value = self._op("Transpose", value, perm=[0, 2, 1, 3])
        return self._op("Reshape", value, self._writer.ints(0, 0, -1))

    def _finish(self, rows: ir.Value, *presents: ir.Value) -> None:
        """Put the results in the places of the old ones."""
        result = self._node.outputs[0]
        users = [user for use in result.consumers() if _swaps_heads(use) for user in use.outputs[0].consumers()]
        if len(users) != 1 or users[0].op_type != "Reshape":
            raise ValueError(f"the result of attention node {self._node.name!r} is not brought into rows")
        for new, concat in zip((rows, *presents), (users[0], *self._caches), strict=True):
            take_over(concat.outputs[0], new)

    def _input(self, name: str) -> ir.Value:
        found = next((value for value in self._graph.inputs if value.name == name), None)
        if found is None:
            raise ValueError(f"the graph has no input {name!r}")
        return found


def _cache(node: ir.Node, value: ir.Value | None) -> ir.Node:
    """Return the Concat of a part of the cache with what is new."""
    concat = None if value is None else value.producer()
    joins = concat is not None and concat.op_type == "Concat" and len(concat.inputs) == 2
    if concat is None or not joins or not str(getattr(concat.inputs[0], "name", "")).startswith(PAST):
        raise ValueError(
            f"attention node {node.name!r} does not read its cache from one Concat with the past; export with graph"
            " standard"
        )
    return concat


def _rotary(value: ir.Value) -> ir.Node | None:
    """Return the rotary embedding of a whole head that makes a value, if one does."""
    node = producer(value, "RotaryEmbedding")
    if node is None or len(node.inputs) != 3:
        return None
    parts = [node.attributes.get(name) for name in ("interleaved", "rotary_embedding_dim")]
    return None if any(part is not None and part.as_int() for part in parts) else node


def _swaps_heads(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [0, 2, 1, 3]
