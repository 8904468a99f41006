"""The contract is complete and consistent with the reference."""

from __future__ import annotations

import pytest

from rankbook.exporter.bodies import body
from rankbook.plugins import contract, forms, layout, merged
from rankbook.plugins.operators import OPERATORS


def test_every_kind_has_every_width():
    assert len(contract.PACKED) == len(contract.KINDS) * len(layout.BITS)


def test_the_list_holds_all_operators_and_each_has_a_body():
    """Its module is found by name, and writes a function with the ports and attributes of the operator."""
    products = len(contract.PACKED) - len(layout.BITS)  # all but gathers
    assert len(OPERATORS) == len(contract.PACKED) + products * (merged.MOST + 1) + 5
    for operator in OPERATORS.values():
        function = body(operator.name)
        assert tuple(function.input) == operator.input_names()
        assert list(function.output) == [port.name for port in operator.outputs]
        assert list(function.attribute) == [item.name for item in operator.attributes]


def test_names_of_operators_are_unique_and_ports_are_too():
    for op in contract.PACKED.values():
        names = [port.name for port in (*op.inputs, *op.outputs)]
        assert len(names) == len(set(names))
        assert op.name == contract.op_name(op.kind, op.bits)
        assert op.low_rank == ("down" in names)


def test_products_that_round_x_have_the_ports_of_those_that_do_not():
    """Names end in A8 behind the bits, so that one file reads as 4-bit codes and 8-bit activations."""
    assert contract.op_name(contract.MATMUL_LOW_RANK_INT8, 8) == "CodebookMatMulLowRank8A8"
    for low_rank in (False, True):
        kinds = [contract.matmul_kind(low_rank=low_rank, int8_activations=int8) for int8 in (False, True)]
        exact, rounded = (contract.PACKED[contract.op_name(kind, 4)] for kind in kinds)
        assert (exact.inputs, exact.attributes) == (rounded.inputs, rounded.attributes)
        assert (exact.int8_activations, rounded.int8_activations) == (False, True)


def test_an_unknown_operator_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"CodebookMatMul.*2, 3, 4, 8"):
        contract.op_name("CodebookMatMul", 5)


def test_symbolic_shapes_bind_their_letters():
    sizes = contract.known_sizes(3, out_features=40, in_features=48)
    assert sizes == {"N": 40, "K": 48, "NP": 2, "KB": 2, "b": 3, "L": 8}
    found = forms.match_shape(("NP", "G", "Q", 32), (2, 3, 2, 32), sizes)
    assert found is not None
    assert found["G"] == 3
    assert found["Q"] == 2
    assert forms.match_shape(("NP", "G", "Q", 32), (3, 3, 2, 32), sizes) is None
    assert forms.match_shape(("R", "R"), (2, 3), {}) is None


def test_shapes_of_activations_match_what_is_known_of_them():
    assert forms.match_shape(("...", "K"), (None, 7, 48), {"K": 48}) == {"K": 48}
    assert forms.match_shape(("...", "K"), (2, 47), {"K": 48}) is None
    assert forms.match_shape(("...", "K"), (), {"K": 48}) is None
    assert forms.match_shape(("B", "M", "P", "H"), (None, 2, None, 8), {"M": 2}) == {"M": 2, "H": 8}
    assert forms.match_shape(("B", "S", "N * H"), (1, 2, 99), {"N": 3}) == {"N": 3, "B": 1, "S": 2}


def test_a_wrong_number_of_inputs_is_named():
    with pytest.raises(ValueError, match="has 7 inputs"):
        OPERATORS["CodebookMatMul2"].compute([], {})
