"""Packed nodes one by one: alone against the numpy reference, in the file against the torch module of their name."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from rankbook.calibration.notes import note
from rankbook.plugins.experts import NUMBERS
from rankbook.tools.evaluate.node_model import graph_with_outputs, single_node
from rankbook.tools.evaluate.options import ParityOptions
from rankbook.tools.evaluate.runners import Agreement, Array, compare, function_runner
from rankbook.tools.evaluate.tolerance import ROUNDED_TOLERANCE, exact_tolerance, rounds_inside
from rankbook.tools.runtimes import reference
from rankbook.tools.runtimes.exported import FileModel
from rankbook.tools.runtimes.torch import TorchModel

if TYPE_CHECKING:
    from rankbook.exporter.file import ExportedModel, Node
    from rankbook.tools.runtimes.base import Tokens


@dataclass(frozen=True)
class OperatorCheck:
    """One kind of custom node (operator and shapes) against the numpy reference.

    Attributes:
        op_type: The operator.
        node: The node that stands for its kind.
        nodes: How many nodes are of this kind.
        shape: (N, K).
        error: Largest difference relative to the largest value.
        passed: Whether it is within tolerance.
    """

    op_type: str
    node: str
    nodes: int
    shape: tuple[int, int]
    error: float
    passed: bool


@dataclass(frozen=True)
class LayerCheck:
    """The output of one custom node against the torch module of the same name.

    Attributes:
        name: The layer.
        error: Difference relative to the largest value, with the errors of all layers before it.
        passed: Whether it is within tolerance.
    """

    name: str
    error: float
    passed: bool


@dataclass(frozen=True, kw_only=True)
class Depth:
    """Where an error begins.

    Attributes:
        layers: Packed layers against torch modules, in graph order.
        first_bad_layer: Name of the first layer out of tolerance, or None.
        own_error: Error of that layer alone, fed with the torch module's input; small if the error is older.
    """

    layers: tuple[LayerCheck, ...] = ()
    first_bad_layer: str | None = None
    own_error: float | None = None


def compare_operators(model: FileModel, tolerance: float, options: ParityOptions) -> tuple[OperatorCheck, ...]:
    """Compare custom nodes, each alone in its runtime, with the numpy reference on random inputs."""
    file = model.file
    if model.is_reference:
        return ()
    kinds: dict[tuple[Any, ...], list[Node]] = {}
    for node in file.packed:
        shapes = tuple(tensor.shape for tensor in node.constants.values())
        key = (node.name,) if options.every_node else (node.op_type, node.attributes.get("offset"), shapes)
        kinds.setdefault(key, []).append(node)
    checks = []
    for nodes in kinds.values():
        node = nodes[0]
        rng = np.random.default_rng(options.seed)
        agreement = compare_node(model, node, random_inputs(file, node, rng), tolerance)
        shape = int(node.attributes.get("out_features", 0)), int(node.attributes.get("in_features", 0))
        checks.append(OperatorCheck(node.op_type, node.name, len(nodes), shape, agreement.error, agreement.passed))
    return tuple(checks)


def random_inputs(file: ExportedModel, node: Node, rng: np.random.Generator) -> dict[str, Array]:
    """Return random values for the inputs of a node that are not constants: 5 rows of activations or of indices."""
    inputs: dict[str, Array] = {}
    lead = (5,) if NUMBERS in node.ports() else (1, 5)
    for formal in node.ports():
        if formal in node.constants:
            continue
        if formal == "x":
            inputs[formal] = rng.standard_normal((*lead, int(node.attributes["in_features"]))).astype(_activation(file))
        else:  # numbers of rows, or of experts
            most = node.constants["codes"].shape[0] if formal == NUMBERS else int(node.attributes["out_features"])
            inputs[formal] = rng.integers(0, most, lead)
    return inputs


def _activation(file: ExportedModel) -> Any:
    import ml_dtypes

    return {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}.get(file.metadata.dtype, np.float32)


def compare_node(model: FileModel, node: Node, inputs: dict[str, Array], tolerance: float) -> Agreement:
    """Compare one node in its runtime with the numpy reference."""
    constants = reference.constants(node)

    def infer(values: Any) -> dict[str, Array]:
        return reference.run_node(node, {**constants, **{name: np.asarray(values[name]) for name in inputs}})

    runner = _node_runner(model, node, constants, inputs)
    (agreement,) = compare(function_runner(f"numpy {node.name}", inputs, infer), runner, inputs, tolerance)
    return agreement


def _node_runner(model: FileModel, node: Node, constants: dict[str, Array], inputs: dict[str, Array]) -> Any:
    """Return a runner of one node alone."""
    serialized = single_node(model.file, node, constants, inputs)
    outputs = {port.name: port.name for port in node.operator.outputs} if node.operator else {}
    name = f"{model.name} {node.name}"
    return function_runner(name, inputs, lambda given: model.run_graph(serialized, outputs, given))


@dataclass
class Captured:
    """Inputs and outputs of torch modules by name, in the order of their calls."""

    inputs: dict[str, tuple[Array, ...]] = field(default_factory=dict)
    outputs: dict[str, Array] = field(default_factory=dict)


def capture_layers(torch_model: TorchModel, tokens: Tokens) -> Captured:
    """Run the torch model once and keep what goes into and comes out of every packed layer."""
    from rankbook.calibration.model.adapter import adapter_of
    from rankbook.calibration.model.experts import ExpertMatrices
    from rankbook.calibration.model.packed_modules import CodebookEmbedding, packed_modules

    captured, adapter = Captured(), adapter_of(torch_model.model)

    def remember(name: str, scale: float, _: Any, inputs: Any, output: Any) -> None:
        captured.inputs[name] = tuple(value.detach().cpu().numpy() for value in inputs)
        # The factor of a scaled embedding is a node of its own in the graph.
        captured.outputs[name] = (output.detach().float() / scale).cpu().numpy()

    stacked = {name: item for name, item in torch_model.model.named_modules() if isinstance(item, ExpertMatrices)}
    with ExitStack() as hooks:
        for stored, module in {**packed_modules(torch_model.model), **stacked}.items():
            name = adapter.language_name(stored)  # that of the language model alone
            scale = float(module.spec.scale) if isinstance(module, CodebookEmbedding) else 1.0
            hooks.enter_context(module.register_forward_hook(partial(remember, name, scale)))
        torch_model.logits(tokens)
    return captured


def compare_layers(model: FileModel, captured: Captured, tokens: Tokens, tolerance: float) -> tuple[LayerCheck, ...]:
    """Compare the output of every packed layer with that of the torch module of its name, in graph order."""
    outputs = {name: output for name, output in model.file.outputs_of.items() if name in captured.outputs}
    if left := [name for name in model.file.outputs_of if name not in outputs]:
        note(
            f"{len(left)} packed layers ({left[0]}, ...) have no module of their name in PyTorch: they are not compared"
        )
    if not outputs:
        return ()
    graph, feeds = graph_with_outputs(model.file, list(outputs.values())), model.feeds(tokens)
    # With `--logits last` the output layer sees the last position only.
    expected = {
        name: captured.outputs[name][:, -1:] if model.last_only and name == "lm_head" else captured.outputs[name]
        for name in outputs
    }

    def infer(given: Any) -> dict[str, Array]:
        found = model.run_graph(graph, outputs, given)
        return {name: _written(model, value, expected[name]) for name, value in found.items()}

    first = function_runner("torch layers", {"input_ids": tokens}, lambda _: expected)
    agreements = compare(first, function_runner(f"{model.name} layers", feeds, infer), feeds, tolerance)
    return tuple(LayerCheck(item.name, item.error, item.passed) for item in agreements)


def _written(model: FileModel, found: Array, expected: Array) -> Array:
    """Leave out the slots of a cache of a fixed length that hold no token yet.

    Latent attention (DeepSeek-V3) multiplies what the cache holds, so that such a layer computes all slots.
    """
    slots, tokens = int(model.file.metadata.max_context or 0), expected.shape[-2]
    return found[..., :tokens, :] if slots and found.shape[-2] == slots else found


def _own_error(model: FileModel, name: str, captured: Captured, tolerance: float) -> float | None:
    """Feed one node with the input of its torch module: is the layer wrong, or what it was given?"""
    file = model.file
    node = next((node for node in file.packed if node.name == name), None)
    if node is None:  # a layer of another dialect is more than one node
        return None
    formals = [formal for formal in node.ports() if formal not in node.constants]
    given = zip(formals, captured.inputs[name], strict=True)
    inputs = {formal: values.astype(_activation(file)) if formal == "x" else values for formal, values in given}
    expected = {"y": captured.outputs[name]}
    runner = _node_runner(model, node, reference.constants(node), inputs)
    (agreement,) = compare(function_runner("torch", inputs, lambda _: expected), runner, inputs, tolerance)
    return agreement.error


def bisect(model: FileModel, torch_model: TorchModel, tokens: Tokens, tolerance: float) -> Depth:
    """Compare layer by layer and find the first one out of tolerance."""
    captured = capture_layers(torch_model, tokens)
    layers = compare_layers(model, captured, tokens, tolerance)
    if rounds_inside(model.file):
        layers = tuple(judged_alone(model, layer, captured) for layer in layers)
    bad = next((layer.name for layer in layers if not layer.passed), None)
    own = None if bad is None else _own_error(model, bad, captured, tolerance)
    return Depth(layers=layers, first_bad_layer=bad, own_error=own)


def judged_alone(model: FileModel, layer: LayerCheck, captured: Captured) -> LayerCheck:
    """Pass a layer that is right on the input of its torch module, however far its own input has drifted.

    Where every layer rounds its input, one last digit that differs moves a value by a whole step, and the steps add up
    with depth: 0.1 of the largest value in SmolLM2-135M, whose logits differ by 0.03. Alone a layer must be exact.
    """
    if layer.passed:
        return layer
    own = _own_error(model, layer.name, captured, ROUNDED_TOLERANCE)
    return replace(layer, passed=own is not None and own <= exact_tolerance(model.file))
