"""The list of all operators. Checks, bodies, the C++ header and the numpy reference are loops over it."""

from __future__ import annotations

from rankbook.plugins import attention, contract, experts, merged, rows

OPERATORS: dict[str, contract.Operator] = {
    operator.name: operator
    for operator in (
        *contract.PACKED.values(),
        *merged.OPERATORS,
        *experts.OPERATORS,
        *attention.OPERATORS,
        *rows.OPERATORS,
    )
}
"""Every operator by its op_type."""
