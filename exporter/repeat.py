"""Blocks that are alike are traced once: the graph of the others is a copy with their own weights.

torch takes a second or two for each block, whatever its size. So only the first blocks are traced, until each kind of
block that comes later was met twice (the first block is not counted: sizes of the whole text are taken from its cache).
That two blocks of a kind gave the same graph is checked; where anything differs, every block is traced.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn

from rankbook.calibration.model.adapter import Blocks, adapter_of
from rankbook.calibration.model.packed_modules import replace_module
from rankbook.exporter import cache_names
from rankbook.exporter.rewrite import TRACE_DOMAIN
from rankbook.exporter.skeleton import LAYER, Skeleton

_BOUNDARY = "Boundary"
"""Placeholder of nothing, between two blocks; its attribute is the number of the block behind it."""
_PLAIN = frozenset(vars(nn.Module()))
"""Attributes that every module has."""


class UnlikeError(Exception):
    """Blocks that look alike have graphs that differ."""


@dataclass(frozen=True)
class Plan:
    """Which blocks are traced.

    Attributes:
        blocks: All of them.
        traced: How many, counted from the first.
        templates: For each other block one of its kind that is traced.
        twins: For each template a second one of its kind that is traced.
    """

    blocks: Blocks
    traced: int
    templates: Sequence[int]
    twins: dict[int, int]

    @classmethod
    def of(cls, skeleton: Skeleton) -> Plan | None:
        """Return the plan for a model, or None where nothing would be saved."""
        blocks = adapter_of(skeleton.model).blocks()
        seen: dict[int, list[int]] = {}  # blocks by the first one of their kind, without block 0
        for index in range(1, len(blocks.modules)):
            kind = next((first for first in seen if _alike(blocks, first, index)), index)
            seen.setdefault(kind, []).append(index)
        count = len(blocks.modules)
        # The fewest with two of every kind that comes later.
        traced = max([1, *((found[1] if len(found) > 2 else found[-1]) + 1 for found in seen.values())])
        if traced >= count:
            return None
        kinds = {index: found for found in seen.values() for index in found}
        templates = [kinds[index][0] for index in range(traced, count)]
        return cls(blocks, traced, templates, {index: kinds[index][1] for index in set(templates)})

    @contextlib.contextmanager
    def shortened(self, model: nn.Module) -> Iterator[None]:
        """Leave only the blocks to be traced in a model, with boundaries before each and behind the last."""
        kept = list(self.blocks.modules[: self.traced])
        keyword = adapter_of(model).hidden
        with contextlib.ExitStack() as stack:
            stack.callback(replace_module, model, self.blocks.name, model.get_submodule(self.blocks.name))
            replace_module(model, self.blocks.name, nn.ModuleList(kept))
            for index, block in enumerate(kept):
                hook = block.register_forward_pre_hook(_before(index, keyword), with_kwargs=True)
                stack.callback(hook.remove)
            stack.callback(kept[-1].register_forward_hook(_behind(self.traced)).remove)
            yield

    def complete(self, model: ir.Model, skeleton: Skeleton) -> None:
        """Put in the blocks that were not traced, and take out the boundaries.

        Raises:
            UnlikeError: Two blocks that are alike have different graphs.
        """
        common.CommonSubexpressionEliminationPass()(model)  # what blocks share is one value then
        copier = _Copier(model.graph, skeleton, self.blocks.name)
        for index, twin in self.twins.items():
            copier.compare(index, twin)
        hidden = copier.boundaries[self.traced].inputs[0]
        for index, template in enumerate(self.templates, self.traced):
            hidden = copier.copy(template, index, hidden)
        copier.finish(hidden)


def _before(index: int, keyword: str) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (_boundary(args[0], index), *args[1:]), kwargs
        return args, {**kwargs, keyword: _boundary(kwargs[keyword], index)}

    return hook


def _behind(index: int) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return _boundary(output, index)
        return type(output)([_boundary(output[0], index), *output[1:]])

    return hook


def _boundary(x: Tensor, index: int) -> Tensor:
    name = f"{TRACE_DOMAIN}::{_BOUNDARY}"
    result: Tensor = torch.onnx.ops.symbolic(name, (x,), {LAYER: index}, dtype=x.dtype, shape=x.shape, version=1)
    return result


def _alike(blocks: Blocks, one: int, other: int) -> bool:
    """Return whether two blocks are of one kind: modules, sizes and everything they keep but weights and numbers."""
    pairs = list(blocks.modules[one].named_modules()), list(blocks.modules[other].named_modules())
    if [(name, type(module)) for name, module in pairs[0]] != [(name, type(module)) for name, module in pairs[1]]:
        return False
    names = f"{blocks.name}.{one}.", f"{blocks.name}.{other}."

    def same(a: Any, b: Any) -> bool:
        if a is b or (isinstance(a, int) and (a, b) == (one, other)):  # the number of the block
            return True
        if isinstance(a, str) and isinstance(b, str):
            return a.replace(*names) == b
        if isinstance(a, types.MethodType) and isinstance(b, types.MethodType):  # of a module that has its own forward
            return a.__func__ is b.__func__
        if isinstance(a, functools.partial) and isinstance(b, functools.partial):
            return (a.func, a.args, a.keywords) == (b.func, b.args, b.keywords)
        return type(a) is type(b) and not isinstance(a, (Tensor, nn.Module)) and bool(a == b)

    def sizes(module: nn.Module) -> Any:
        return {name: (p.shape, p.dtype) for name, p in module.named_parameters(recurse=False)}

    for (_, a), (_, b) in zip(*pairs, strict=True):
        kept = [{key: value for key, value in vars(module).items() if key not in _PLAIN} for module in (a, b)]
        if kept[0].keys() != kept[1].keys() or sizes(a) != sizes(b):
            return False
        if not all(same(value, kept[1][key]) for key, value in kept[0].items()):
            return False
        buffers = dict(a.named_buffers(recurse=False)), dict(b.named_buffers(recurse=False))
        if buffers[0].keys() != buffers[1].keys():
            return False
        if not all(torch.equal(value, buffers[1][key]) for key, value in buffers[0].items()):
            return False
    return True


class _Copier:
    """Compares and copies the nodes of blocks in a traced graph."""

    def __init__(self, graph: ir.Graph, skeleton: Skeleton, name: str) -> None:
        self.graph, self.name = graph, name
        self.parameters = dict(skeleton.model.named_parameters())
        self.inputs = {str(value.name): value for value in graph.inputs}
        self.outputs = {str(value.name): value for value in graph.outputs}
        self._found: dict[int, list[ir.Node]] = {}
        self.boundaries: dict[int, ir.Node] = {}
        for node in graph:
            if (node.domain, node.op_type) == (TRACE_DOMAIN, _BOUNDARY):
                self.boundaries[node.attributes[LAYER].as_int()] = node

    def compare(self, one: int, other: int) -> None:
        """Check that the blocks have one graph.

        Raises:
            UnlikeError: They have not.
        """
        first, second = self._nodes(one), self._nodes(other)
        same: dict[ir.Value | None, ir.Value | None] = dict(zip(self._sources(one), self._sources(other), strict=True))
        if len(first) != len(second):
            raise UnlikeError(f"{len(first)} and {len(second)} nodes")
        for a, b in zip(first, second, strict=True):
            kinds = [(node.domain, node.op_type, len(node.inputs), len(node.outputs)) for node in (a, b)]
            if kinds[0] != kinds[1] or self._attributes(a, one, other) != self._attributes(b, other, other):
                raise UnlikeError(f"{a.name} and {b.name} differ")
            for x, y in zip(a.inputs, b.inputs, strict=True):
                if x is not None and y is not None and x.is_initializer() and y.is_initializer():
                    self._compare_constants(x, y, one, other)
                elif (x if x is None else same.get(x, x)) is not y:
                    raise UnlikeError(f"the inputs of {a.name} and {b.name} differ")
            same |= zip(a.outputs, b.outputs, strict=True)
        if [same.get(value) for value in self._results(one)] != self._results(other):
            raise UnlikeError("what leaves them differs")

    def copy(self, template: int, index: int, hidden: ir.Value | None) -> ir.Value | None:
        """Append a block and return its hidden state."""
        self._check_folded(template, index)
        sources = self._sources(template)
        new: dict[ir.Value | None, ir.Value | None] = {sources[0]: hidden}
        for value in sources[1:]:
            past = _like(value, cache_names.of_layer(str(value.name), index))
            self.graph.inputs.append(past)
            new[value] = past
        nodes = []
        for node in self._nodes(template):
            inputs = [None if x is None else self._constant(x, template, index) or new.get(x, x) for x in node.inputs]
            outputs = [_like(value, f"{value.name}.{index}") for value in node.outputs]
            new |= zip(node.outputs, outputs, strict=True)
            nodes.append(
                ir.Node(
                    node.domain,
                    node.op_type,
                    inputs,
                    self._attributes(node, template, index).values(),
                    outputs=outputs,
                    version=node.version,
                    name=f"{node.name}.{index}",
                )
            )
        self.graph.insert_before(self.boundaries[max(self.boundaries)], nodes)
        results = self._results(template)
        for old in results[1:]:
            made = new[old]
            if made is None or old is None:
                raise UnlikeError(f"block {template} does not give all of its cache")
            made.name = cache_names.of_layer(str(old.name), index)
            self.graph.outputs.append(made)
        return new[results[0]]

    def finish(self, hidden: ir.Value | None) -> None:
        """Remove the boundaries; the last one gives way to the hidden state of the last block."""
        for index, node in self.boundaries.items():
            source = hidden if index == max(self.boundaries) else node.inputs[0]
            if source is None:
                raise ValueError(f"nothing enters block {index}")
            ir.convenience.replace_all_uses_with(node.outputs[0], source)
        self.graph.remove(self.boundaries.values(), safe=True)

    def _sources(self, index: int) -> list[ir.Value]:
        """Return what enters a block: its hidden state and the parts of its cache."""
        return [self.boundaries[index].outputs[0], *self._cached(self.inputs, index, cache_names.is_past)]

    def _results(self, index: int) -> list[ir.Value | None]:
        """Return what leaves a block: its hidden state and the parts of its cache."""
        return [self.boundaries[index + 1].inputs[0], *self._cached(self.outputs, index, cache_names.is_present)]

    def _cached(self, values: Mapping[str, ir.Value], index: int, belongs: Callable[[str], bool]) -> list[ir.Value]:
        return [value for name, value in values.items() if belongs(name) and cache_names.layer_of(name) == index]

    def _nodes(self, index: int) -> list[ir.Node]:
        """Return the nodes of a block in order: those that depend on what enters it, but for its sizes.

        And those that compute from its parameters alone, as the decays of a recurrence.
        """
        if index in self._found:
            return self._found[index]
        reached, begin = set(self._sources(index)), f"{self.name}.{index}."
        own = {value for name, value in self.graph.initializers.items() if name.startswith(begin)}
        found = []
        for node in self.graph:
            values = {value for value in node.inputs if value is not None}
            if node.op_type in (_BOUNDARY, "Shape"):
                continue
            if values & reached:
                found.append(node)
                reached.update(node.outputs)
            elif values & own and all(value in own or value.is_initializer() for value in values):
                found.append(node)
                own.update(node.outputs)
        self._found[index] = found
        return found

    def _attributes(self, node: ir.Node, old: int, new: int) -> dict[str, ir.Attr]:
        found = dict(node.attributes)
        if any(attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in found.values()):
            raise UnlikeError(f"{node.name} holds a graph")
        if node.domain == TRACE_DOMAIN and LAYER in found:
            found[LAYER] = ir.AttrString(LAYER, self._renamed(found[LAYER].as_string(), old, new))
        return found

    def _renamed(self, name: str, old: int, new: int) -> str:
        begin = f"{self.name}.{old}."
        return f"{self.name}.{new}.{name.removeprefix(begin)}" if name.startswith(begin) else name

    def _compare_constants(self, a: ir.Value, b: ir.Value, one: int, other: int) -> None:
        """Check that two constants are weights of the same place, or equal."""
        wanted = self._renamed(str(a.name), one, other)
        if a is b or (wanted != a.name and wanted == b.name and self._is_parameter(a) and self._is_parameter(b)):
            return
        x, y = (None if value.const_value is None else value.const_value.numpy() for value in (a, b))
        if x is None or y is None or x.dtype != y.dtype or not np.array_equal(x, y):
            raise UnlikeError(f"{a.name} and {b.name} differ")

    def _check_folded(self, template: int, index: int) -> None:
        """Check that what the exporter computed from small parameters beforehand holds for another block, too."""
        for name, parameter in self.parameters.items():
            other = self._renamed(name, template, index)
            if (
                other != name
                and name not in self.graph.initializers
                and not torch.equal(parameter, self.parameters[other])
            ):
                raise UnlikeError(f"{name} and {other} differ, and {name} is part of a constant")

    def _is_parameter(self, value: ir.Value) -> bool:
        parameter, constant = self.parameters.get(str(value.name)), value.const_value
        if parameter is None or constant is None or tuple(constant.shape.numpy()) != tuple(parameter.shape):
            return False
        return 0 in parameter.stride() or np.array_equal(constant.numpy(), TorchTensor(parameter).numpy())

    def _constant(self, value: ir.Value, template: int, index: int) -> ir.Value | None:
        """Return the constant of a block in the place of that of another one; None for what all share."""
        name = self._renamed(str(value.name), template, index)
        if not value.is_initializer() or name == value.name or name not in self.parameters:
            return None
        if name not in self.graph.initializers:
            tensor = TorchTensor(self.parameters[name], name=name)
            new = _like(value, name)
            new.const_value = tensor
            self.graph.register_initializer(new)
        return self.graph.initializers[name]


def _like(value: ir.Value, name: str) -> ir.Value:
    """Return a value of the same type and shape."""
    return ir.Value(name=name, type=value.type, shape=None if value.shape is None else value.shape.copy())
