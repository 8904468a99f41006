"""The native library on damaged models of one node: what it reads of constants, attributes and calls."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from rankbook.plugins import library
from rankbook.plugins.experts import NUMBERS
from rankbook.plugins.rows import ADD_NORM, SWIGLU
from tests.fuzz.targets import Target
from tests.ops.cases import Case
from tests.plugins import attention_models, merged_ops, row_models

Feeds = Mapping[str, Any]
_NUMBERS = (-1, 0, 1, 7, 2**20, 2**31 - 1, -(2**31))
_SMALL = Case(bits=3, out_features=40, in_features=48, rank=3, bias=True)


def _case(case: Case) -> tuple[onnx.ModelProto, Feeds]:
    op = case.draw()
    model = op.model()
    return model, {model.graph.input[0].name: op.x, **({NUMBERS: op.numbers} if op.records else {})}


def _merged(case: Case) -> tuple[onnx.ModelProto, Feeds]:
    ops = merged_ops.draw_several(case, 2)
    return merged_ops.model_of(ops), {"x": ops[0].x}


def _attention() -> tuple[onnx.ModelProto, Feeds]:
    node = attention_models.Node(body=False)
    return node.model(), attention_models.Call((5,), 2, 8).feeds(node)


def _rows(name: str) -> tuple[onnx.ModelProto, Feeds]:
    model = row_models.model_of(name, np.ones(16, np.float32))
    return model, {value.name: np.ones((2, 3, 16), np.float32) for value in model.graph.input}


MODELS: dict[str, Callable[[], tuple[onnx.ModelProto, Feeds]]] = {
    "native-product": lambda: _case(_SMALL),
    "native-half": lambda: _case(Case(bits=8, param_bits=16, factor_bits=16, rank=2, float_levels=True)),
    "native-int8": lambda: _case(Case(bits=4, int8_activations=True, linear_levels=True)),
    "native-gather": lambda: _case(Case(bits=2, planes=1, gather=True)),
    "native-experts": lambda: _case(Case(experts=3, tokens=(5,), rank=2)),
    "native-merged": lambda: _merged(_SMALL),
    "native-merged-half": lambda: _merged(Case(param_bits=16, bits=2)),
    "native-attention": _attention,
    "native-norm": lambda: _rows(ADD_NORM.name),
    "native-swiglu": lambda: _rows(SWIGLU.name),
}
"""A model of one node, and what it is called with."""


@cache
def _seed(name: str) -> tuple[bytes, Feeds]:
    model, feeds = MODELS[name]()
    del model.functions[:]  # not what is tried here
    return model.SerializeToString(), feeds


def _changed(value: Any, rng: random.Random) -> Any:
    """Return an input of a call, most of the time as it was."""
    draw = rng.random()
    if draw < 0.7:
        return value
    if draw < 0.85 and value.dtype.kind == "i":
        other = value.copy()
        other.reshape(-1)[rng.randrange(other.size)] = rng.choice(_NUMBERS)
        return other
    shape = [*value.shape, 1]
    shape[rng.randrange(len(shape))] = rng.choice((0, 1, 2, 5, 49))
    return np.zeros(shape if rng.random() < 0.5 else shape[:-1], value.dtype)


def _run(folder: Path, name: str) -> None:
    """Open a session and call it twice, the second time with other inputs; what is refused is a ValueError."""
    import onnxruntime as ort

    content = (folder / "model.onnx").read_bytes()
    rng = random.Random(zlib.crc32(content))
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.add_session_config_entry("rankbook.activations", rng.choice(("fp32", "int8")))
    options.add_session_config_entry("rankbook.memory", rng.choice(("huge", "mapped")))
    try:
        options.register_custom_ops_library(str(library.library("ort")))
        session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        seed, feeds = _seed(name)
        session.run(None, dict(feeds))
        if content != seed:
            session.run(None, {key: _changed(value, rng) for key, value in feeds.items()})
    except Exception as error:
        if type(error).__module__.startswith("onnxruntime") or isinstance(error, RuntimeError):
            raise ValueError(str(error)) from error
        raise


def _target(name: str) -> Target:
    def make(folder: Path) -> None:
        (folder / "model.onnx").write_bytes(_seed(name)[0])

    return Target(make, lambda folder: _run(folder, name))


NATIVE = {name: _target(name) for name in MODELS}
