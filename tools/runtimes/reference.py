"""The numpy reference of single operators, fed with the constants of an exported file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rankbook.tools.inspect import onnx_file
from rankbook.tools.inspect.onnx_file import CustomNode, OnnxFile

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


def constants(model: OnnxFile, node: CustomNode) -> dict[str, Array]:
    """Return the initializers that a node reads, by the formal names of their ports."""
    wanted = {actual: formal for formal, actual in node.ports().items() if actual in model.initializers}
    return {wanted[name]: array for name, array in read_tensors(model, set(wanted)).items()}


def read_tensors(model: OnnxFile, names: set[str]) -> dict[str, Array]:
    """Return stored tensors by name; only their bytes are read from the data files."""
    from onnx import numpy_helper

    from rankbook.exporter.nodes import constants as stored

    folder = str(model.path.parent)
    held = stored(onnx_file.load_graph(model.path).graph)
    return {name: numpy_helper.to_array(held[name], folder) for name in names if name in held}


def run_node(node: CustomNode, values: dict[str, Array]) -> Array:
    """Compute one node from all of its inputs, by the formal names of their ports."""
    import numpy as np

    from rankbook.plugins import reference

    inputs = [values[formal] for formal in node.ports()]
    attributes = {name: value for name, value in node.attributes.items() if isinstance(value, (int, str))}
    result: Array = np.asarray(reference.run(node.op_type, inputs, attributes))
    return result
