"""The numpy reference: single operators, and whole files in onnx's own evaluator with the references as operators.

Nothing of ONNX Runtime or of the native library takes part, so that what differs from it is wrong elsewhere. It decodes
every packed weight at every step: seconds a token for a model of 100 million weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankbook.calibration.source import Kind
from rankbook.tools.errors import UsageError
from rankbook.tools.runtimes.base import Runtime, Setting
from rankbook.tools.runtimes.exported import FileModel

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from rankbook.exporter.file import ExportedModel, Node
    from rankbook.plugins.contract import Operator, Stock
    from rankbook.tools.runtimes.base import Tokens

    Array = np.ndarray[Any, Any]


def constants(node: Node) -> dict[str, Array]:
    """Return the stored tensors that a node reads, by the formal names of their ports."""
    return {formal: tensor.numpy() for formal, tensor in node.constants.items()}


def run_node(node: Node, values: dict[str, Array]) -> dict[str, Array]:
    """Compute the outputs of one node from all of its inputs, by the formal names of their ports.

    Raises:
        ValueError: There is no such operator.
    """
    operator = node.operator
    if operator is None:
        raise ValueError(f"there is no operator {node.op_type}")
    results = operator.compute([values[formal] for formal in node.ports()], node.attributes)
    return dict(zip((port.name for port in operator.outputs), results, strict=True))


class ReferenceModel(FileModel):
    """An exported file in numpy."""

    kernels = "reference"
    is_reference = True

    def __init__(self, path: Path | ExportedModel) -> None:
        """Open a file or an exported folder.

        Raises:
            UsageError: It cannot be given text, or has an operator without a reference.
        """
        super().__init__(path)
        self.name = f"numpy {self.file.path}"
        self._evaluator = _evaluator(self.file, self.file.proto)

    def run_graph(self, graph: bytes, outputs: Mapping[str, str], feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Compute a graph."""
        import onnx

        evaluator = _evaluator(self.file, onnx.load_from_string(graph))
        return dict(zip(outputs, evaluator.run(list(outputs.values()), dict(feeds)), strict=True))

    def _compute(self, tokens: Tokens, outputs: Collection[str]) -> dict[str, Any]:
        results = self._evaluator.run(list(outputs), self._inputs(tokens) | self._cache)
        return dict(zip(outputs, results, strict=True))


def _evaluator(file: ExportedModel, graph: onnx.ModelProto) -> Any:
    """Return an evaluator of a graph whose data files are those of ``file``."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    from rankbook.exporter.stored import Stored

    class Evaluator(ReferenceEvaluator):
        """Reads external data in place."""

        def retrieve_external_data(self, initializer: onnx.TensorProto) -> Array:
            """Return the elements of a tensor."""
            return Stored(initializer, file.path).array

    model = onnx.ModelProto()
    model.CopyFrom(graph)
    del model.functions[:]  # bodies, which call operators of ONNX Runtime
    for node in model.graph.node:
        for place, name in enumerate(node.output):
            node.output[place] = name or f"{node.name}.unused.{place}"  # nothing may hide the empty name of inputs
    try:
        return Evaluator(model, new_ops=list(_operators()))
    except NotImplementedError as error:
        raise UsageError(
            f"{file.path} has an operator without a numpy reference ({error}); export with --dialect rankbook or qdq"
        ) from None


def _operators() -> Iterator[type]:
    """Yield classes of onnx's evaluator: operators of this project, and those of ONNX Runtime that compute the same."""
    from rankbook.plugins.operators import OPERATORS

    for operator in OPERATORS.values():
        yield _operator(operator)
        if operator.stock is not None:
            yield _operator(operator, operator.stock)


def _operator(operator: Operator, stock: Stock | None = None) -> type:
    """Return the class of an operator, or of ``stock`` in its place, which computes in the type of its first input."""
    from onnx.reference.op_run import OpRun

    from rankbook.plugins import contract

    def run(_: Any, *inputs: Array, **attributes: Any) -> tuple[Array, ...]:
        results = operator.compute(inputs, attributes)
        if stock is None:
            return results
        found = dict(zip(stock.places, results, strict=True))
        return tuple(found.get(i, results[0]).astype(inputs[0].dtype) for i in range(stock.places[-1] + 1))

    name, domain = (stock.name, contract.STOCK_DOMAIN) if stock else (operator.name, contract.DOMAIN)
    return type(name, (OpRun,), {"op_domain": domain, "op_schema": None, "_run": run})


def _prepare(source: Any) -> None:
    import onnx.reference  # noqa: F401

    from rankbook.exporter.file import ExportedModel

    ExportedModel.open(source.path)


def _open(file: Path | ExportedModel, setting: Setting) -> FileModel:
    del setting  # numpy's own threads
    return ReferenceModel(file)


RUNTIMES = (
    Runtime(
        "reference",
        "numpy reference",
        "parity, eval and generate without any runtime: slow, seconds a token",
        lambda: None if find_spec("onnx") else "onnx is not installed: pip install onnx",
        lambda: f"onnx {version('onnx')}, numpy {version('numpy')}",
        frozenset({Kind.ONNX}),
        open=lambda source, setting: _open(source.path, setting),
        open_file=_open,
        prepare=_prepare,
    ),
)
