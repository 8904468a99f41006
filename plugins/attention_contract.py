"""The attention operator as data: names, ports, attributes. No other file spells these strings.

``rankbook::GroupQueryAttention`` is ``com.microsoft::GroupQueryAttention`` of ONNX Runtime in float32, with the ports
and attributes that the exporter gives it; its body is that one node. It is not in
`rankbook.plugins.contract.OPERATORS`: those hold packed weights.

Letters in the shapes: B rows of the batch, S new tokens of each, N query heads, M heads of keys and values, H numbers
of a head, P positions of the past's buffer, L = max(P, total) of the present's, R rows of the tables.
"""

from __future__ import annotations

NAME = "GroupQueryAttention"
"""The op_type, in our domain and in `STOCK_DOMAIN`."""
STOCK_DOMAIN = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

INPUTS = {
    "query": "float32 (B, S, N * H)",
    "key": "float32 (B, S, M * H), of the new tokens",
    "value": "float32 (B, S, M * H), of the new tokens",
    "past_key": "float32 (B, M, P, H)",
    "past_value": "float32 (B, M, P, H)",
    "seqlens_k": "int32 (B): keys of a row less one, new ones included",
    "total_sequence_length": "int32, one number: keys of the longest row",
}
"""Inputs that every node has."""
ROTARY_INPUTS = {
    "cos": "float32 (R, H / 2), an initializer",
    "sin": "float32 (R, H / 2), an initializer",
    "position_ids": "int64 (B, S), each in [0, R)",
}
"""Inputs of nodes with ``do_rotary`` 1; others end before them."""
OUTPUTS = {
    "output": "float32 (B, S, N * H)",
    "present_key": "float32 (B, M, L, H); may be the memory of past_key",
    "present_value": "float32 (B, M, L, H); may be the memory of past_value",
}

INT_ATTRIBUTES = {"num_heads": 1, "kv_num_heads": 1, "local_window_size": -1, "do_rotary": 0}
"""Integer attributes, all required, with the smallest value of each."""
FLOAT_ATTRIBUTES = {"scale": 0.0, "softcap": 0.0}
"""Float attributes, all required, with the smallest value of each; a scale of 0 is H ** -0.5, a softcap of 0 none."""

LARGEST_HEAD = 512
"""Largest H."""
HEAD_STEP, ROTARY_STEP = 8, 16
"""What H is a multiple of, without and with a rotary embedding inside (ONNX Runtime's node asks for the same)."""


def supports(head: int, *, rotary: bool) -> bool:
    """Say whether the kernel takes heads of so many numbers."""
    return 0 < head <= LARGEST_HEAD and head % (ROTARY_STEP if rotary else HEAD_STEP) == 0
