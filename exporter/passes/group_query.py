"""Replaces attention by one node with rotary embedding and cache inside: ONNX Runtime's, or rankbook's around it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rankbook.exporter import cache_names
from rankbook.exporter.cache_names import PAST
from rankbook.exporter.passes.attention import is_attention
from rankbook.exporter.passes.kv_cache import nearest_layer
from rankbook.exporter.rewrite import Writer, fixed_size, float_attribute, given, producer, take_over
from rankbook.plugins import attention

Tables = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
"""cos and sin of a rotary embedding by position, (positions, size / 2) each."""


class GroupQueryAttention(ir.passes.InPlacePass):
    """Makes one node of an Attention, the Concats of its cache, and the rotary embedding and transposes before it.

    The node is ``rankbook::GroupQueryAttention``, whose body is ``com.microsoft::GroupQueryAttention``; for what its
    kernel does not take (other types than float32, larger heads, sinks) it is the latter itself. Where `HalveCache` has
    made the cache float16 it is one of the operators for that (`rankbook.plugins.attention`). A layer whose
    attention it cannot express keeps the standard one, and the reason is in ``kept``; its cache is then joined in a
    Concat, so none of the file's grows in place.

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
            windows: How many positions a query sees in each layer, itself included; -1 for all, 0 where keys are
                hidden in another way.
        """
        super().__init__()
        self._tables, self._windows = tables, windows
        self.kept: dict[str, str] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the model in place."""
        readers: dict[int, list[ir.Node]] = {}
        for node in model.graph:
            if is_attention(node):
                readers.setdefault(nearest_layer(given(node, 1)), []).append(node)
        tried = [self._fusion(model.graph, layer, nodes) for layer, nodes in readers.items()]
        fusions = [fusion for fusion in tried if fusion is not None]
        if self._masks_are_windows(fusions):
            lengths = fusions[0].lengths() if fusions else []
            for fusion in fusions:
                fusion.apply(lengths, self._tables, self._windows)
        fused = {str(fusion.layer) for fusion in fusions} - set(self.kept)
        names = [str(value.name) for value in model.graph.inputs]
        for number in sorted({cache_names.layer_of(name) for name in names if name.startswith(PAST)}):
            if str(number) not in fused:
                self.kept.setdefault(str(number), "its attention is code of its own")
        return ir.passes.PassResult(model, modified=bool(fused))

    def _fusion(self, graph: ir.Graph, layer: int, nodes: list[ir.Node]) -> _Fusion | None:
        """Return what takes the place of the attention of a layer; None where it stays, with the reason in ``kept``."""
        try:
            if len(nodes) > 1:
                raise _KeptError(f"{len(nodes)} attentions read its cache")
            if not self._windows[layer]:
                raise _KeptError("which keys a token sees is no window")
            return _Fusion(graph, nodes[0], layer)
        except _KeptError as error:
            self.kept[str(layer)] = str(error)
        return None

    def _masks_are_windows(self, fusions: list[_Fusion]) -> bool:
        """Return whether layers share a mask exactly where they share a window: the operator makes its own masks."""
        pairs = {(id(fusion.mask), self._windows[fusion.layer]) for fusion in fusions}
        masks, windows = ({pair[part] for pair in pairs} for part in (0, 1))
        if len(pairs) == len(masks) == len(windows):
            return True
        shown = ", ".join(map(str, sorted(windows)))
        why = f"its mask is not known: {len(masks)} masks for windows of {shown} positions (-1 is all)"
        self.kept |= {str(fusion.layer): why for fusion in fusions}
        return False


class _KeptError(ValueError):
    """Why an attention stays what it is."""


class _Fusion:
    """The nodes that take the place of one Attention node."""

    def __init__(self, graph: ir.Graph, node: ir.Node, layer: int) -> None:
        self._graph, self._node, self.layer = graph, node, layer
        self._writer = Writer(graph, str(node.name))
        self._op = self._writer.op
        self._caches = [_cache(value) for value in node.inputs[1:3]]
        self._query = given(node, 0)
        self._new = [_unrounded(given(cache, 1)) for cache in self._caches]
        self._past = [given(cache, 0) for cache in self._caches]
        self._heads, self._size = fixed_size(self._query, 1), fixed_size(self._query, 3)
        if fixed_size(self._past[1], 3) != self._size:
            raise _KeptError(f"keys have {self._size} elements and values {fixed_size(self._past[1], 3)}")
        if self._size % attention.HEAD_STEP:
            raise _KeptError(f"heads of {self._size} elements, no multiple of {attention.HEAD_STEP}")
        self._half = self._past[0].dtype == ir.DataType.FLOAT16 != self._query.dtype
        if self._half and (node.domain or not attention.supports(self._size, rotary=True)):
            raise _KeptError(
                f"a cache in float16 is for heads of up to {attention.LARGEST_HEAD} elements, a multiple of"
                f" {attention.ROTARY_STEP}, and no sinks"
            )
        self._end = _into_rows(node)

    @property
    def mask(self) -> ir.Value | None:
        """Mask of the attention node, which is left out."""
        return self._node.inputs[3] if len(self._node.inputs) > 3 else None

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
        }
        operator = attention.OPERATOR
        if self._half:
            operator = attention.ROTARY_HALF if rotary else attention.HALF
        else:
            attributes[attention.ROTARY] = int(bool(rotary))
        rows = [self._rows(value) for value in (self._query, *self._new)]
        inputs: list[ir.Value | None] = [*rows, *self._past, *lengths, *rotary]
        own = self._query.dtype == ir.DataType.FLOAT and attention.supports(self._size, rotary=bool(rotary))
        if self._node.domain:  # with sinks: the last input of ONNX Runtime's node
            own, inputs = False, [*inputs, *[None] * (attention.SINKS - len(inputs)), given(self._node, 4)]
        results = self._writer.call(operator, inputs, attributes, stock=not own)
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
        for new, concat in zip((rows, *presents), (self._end, *self._caches), strict=True):
            take_over(concat.outputs[0], new)

    def _input(self, name: str) -> ir.Value:
        found = next((value for value in self._graph.inputs if value.name == name), None)
        if found is None:
            raise ValueError(f"the graph has no input {name!r}")
        return found


def _cache(value: ir.Value | None) -> ir.Node:
    """Return the Concat of a part of the cache with what is new, which attention reads, widened if it is float16."""
    wide = producer(value, "Cast")
    concat = producer(wide.inputs[0] if wide else value, "Concat")
    if concat is None or len(concat.inputs) != 2 or not str(getattr(concat.inputs[0], "name", "")).startswith(PAST):
        raise _KeptError("keys or values are not what the cache holds")
    return concat


def _unrounded(value: ir.Value) -> ir.Value:
    """Return new keys or values before they are rounded to the type of the cache, if they are."""
    cast = producer(value, "Cast")
    rounds = cast is not None and value.dtype == ir.DataType.FLOAT16 != given(cast, 0).dtype
    return given(cast, 0) if cast is not None and rounds else value


def _into_rows(node: ir.Node) -> ir.Node:
    """Return the Reshape that makes rows of what an attention gives, and alone uses it."""
    swaps = [use for use in node.outputs[0].consumers() if _swaps_heads(use)]
    users = [user for swap in swaps for user in swap.outputs[0].consumers()]
    if len(users) != 1 or users[0].op_type != "Reshape":
        raise _KeptError("its result is not brought into rows")
    return users[0]


def _rotary(value: ir.Value) -> ir.Node | None:
    """Return the rotary embedding of a whole head that makes a value, if one does."""
    node = producer(value, "RotaryEmbedding")
    if node is None or len(node.inputs) != 3:
        return None
    parts = [node.attributes.get(name) for name in ("interleaved", "rotary_embedding_dim")]
    return None if any(part is not None and part.as_int() for part in parts) else node


def _swaps_heads(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [0, 2, 1, 3]
