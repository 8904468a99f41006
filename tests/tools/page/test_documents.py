"""Reports of verbs are read back as what they were written from, and anything else is refused in a sentence."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from rankbook.calibration.schema import SchemaError
from rankbook.tools.bench.device_bench import DeviceReport, Footprint, Missing
from rankbook.tools.evaluate.engine_parity import EngineParityReport
from rankbook.tools.page import documents
from rankbook.tools.report import plain
from tests.tools.page.reports import CELL, ENGINE, FILE, LAYER, SPEED


def stored(folder: Path, value: Any) -> Path:
    path = folder / "report.json"
    path.write_text(json.dumps(plain(value)))
    return path


def test_reports_come_back_as_they_were(tmp_path):
    assert documents.read(stored(tmp_path, FILE)) == FILE
    models = documents.read(stored(tmp_path, {"machine": {"cores": 2}, "models": [SPEED], "bandwidth": {}}))
    assert models == documents.ModelSpeeds({"cores": 2}, [SPEED])
    assert documents.read(stored(tmp_path, {"machine": {}, "layers": [LAYER]})) == documents.LayerSpeeds({}, [LAYER])
    device = DeviceReport([CELL], [], [Footprint("e", "TensorRT, fp16", "fp16", None, 5, None)], [Missing("f", "why")])
    found = documents.read(stored(tmp_path, {"machine": {}, "copy_bandwidth": None, **vars(device)}))
    assert isinstance(found, documents.DeviceSpeeds)
    assert (found.decode, found.footprints, found.missing) == (device.decode, device.footprints, device.missing)


def test_what_was_infinite_is_not_a_number_and_failed(tmp_path):
    """JSON has no infinity: it is written as null."""
    found = documents.read(stored(tmp_path, ENGINE))
    assert isinstance(found, EngineParityReport)
    assert math.isnan(found.references[0].logits.error)
    assert not found.references[0].logits.passed
    assert found.first_bad_layer == "b"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"model": "m", "perplexity": "low", "tokens": 3}, "perplexity is 'low', not int or float"),
        ({"model": "m", "perplexity": 3.0, "tokens": True}, "tokens is True, not int"),
        ({"model": ["m"], "perplexity": 3.0, "tokens": 3}, "model is list, not str"),
        ({"machine": {}, "models": [{"name": "x"}]}, "models: 0 lacks kernels"),
        ({"machine": {}, "models": {"name": "x"}}, "models is dict, not list"),
        ([1, 2], "holds a list, not a JSON object"),
    ],
)
def test_a_damaged_report_is_a_sentence(tmp_path, content, said):
    content = {"kl": None, "top1_agreement": None, "seconds": 1.0, **content} if isinstance(content, dict) else content
    with pytest.raises(SchemaError, match=said):
        documents.read(stored(tmp_path, content))


def test_a_number_beyond_floats_is_infinite(tmp_path):
    path = tmp_path / "report.json"
    path.write_text(
        '{"model": "m", "perplexity": 1%s, "kl": null, "top1_agreement": null, "tokens": 1, "seconds": 0}' % ("0" * 400)
    )
    found = documents.read(path)
    assert isinstance(found, documents.Evaluation)
    assert found.perplexity == math.inf


def test_other_json_is_none_and_a_huge_file_is_not_read(tmp_path, monkeypatch):
    path = stored(tmp_path, {"name": "package"})
    assert documents.read(path) is None
    monkeypatch.setattr(documents, "LARGEST", 5)
    with pytest.raises(SchemaError, match="more than a report has"):
        documents.read(path)


def test_perplexities_are_comparable_on_the_same_windows_of_the_same_text():
    common: dict[str, Any] = {
        "model": "m",
        "perplexity": 1.0,
        "kl": None,
        "top1_agreement": None,
        "tokens": 5,
        "seconds": 1,
    }
    windows = {"count": 4, "length": 32}
    first = documents.Evaluation(**common, text="a/eval.txt", windows=windows)
    assert first.on == "eval.txt, 4 x 32 tokens"
    assert documents.Evaluation(**common, text="a/eval.txt", windows={**windows, "count": 5}).on != first.on
    assert documents.Evaluation(**common).on == "a text that is not named, 5 tokens"
