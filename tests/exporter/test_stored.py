"""Names and sizes of element types, and where the bytes of a tensor may lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from rankbook.exporter import stored
from rankbook.exporter.stored import ExportedFileError, Stored


@pytest.mark.parametrize(
    ("number", "name", "bits"),
    [
        (TensorProto.FLOAT, "float32", 32),
        (TensorProto.DOUBLE, "float64", 64),
        (TensorProto.BFLOAT16, "bfloat16", 16),
        (TensorProto.INT4, "int4", 4),
        (TensorProto.BOOL, "bool", 8),
        (TensorProto.FLOAT8E4M3FN, "float8e4m3fn", 8),
        (TensorProto.FLOAT4E2M1, "float4e2m1", 4),
        (TensorProto.STRING, "string", 0),
    ],
)
def test_element_types_have_the_names_of_numpy(number: int, name: str, bits: int) -> None:
    assert stored.dtype_name(number) == name
    assert stored.element_bits(name) == bits


def test_unknown_element_types_have_none() -> None:
    assert stored.dtype_name(0) is None
    assert stored.dtype_name(99) is None


def external(folder: Path, **entries: str) -> onnx.TensorProto:
    """Return a tensor of two floats in ``folder / "data"``."""
    (folder / "data").write_bytes(np.array([0, 1, 2], np.float32).tobytes())
    tensor = onnx.TensorProto(name="w", dims=[2], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "data", "offset": "4", "length": "8", **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def test_elements_are_read_from_inside_and_outside(tmp_path: Path) -> None:
    graph = tmp_path / "model.onnx"
    assert Stored(external(tmp_path), graph).array.tolist() == [1, 2]
    assert Stored(numpy_helper.from_array(np.arange(3), "i"), graph).array.tolist() == [0, 1, 2]
    longer = external(tmp_path)
    longer.dims[0] = 20
    with pytest.raises(ExportedFileError, match="'w' cannot be read"):
        _ = Stored(longer, graph).array


@pytest.mark.parametrize("location", ["", "/data", "a/../../data", "data\0"])
def test_data_outside_of_the_folder_is_refused(location: str, tmp_path: Path) -> None:
    with pytest.raises(ExportedFileError, match="not a path inside the folder"):
        stored.external(external(tmp_path, location=location), tmp_path / "model.onnx")
