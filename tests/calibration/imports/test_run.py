"""Checkpoints that the real packages have written: each weight is what the package decodes, to the last bit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rankbook.calibration.checkpoint.format import load_records
from rankbook.calibration.imports.formats import formats
from rankbook.calibration.imports.run import import_model
from rankbook.calibration.model.loading import load_model

FIXTURES = Path(__file__).parent / "fixtures"
REFUSED = ("gptq-act-order",)
WRITTEN = sorted(path.parent.name for path in FIXTURES.glob("*/config.json") if path.parent.name not in REFUSED)
BITS = {"compressed-w4-symmetric": 4.5, "compressed-mxfp4": 4.25, "auto-round": 4.5, "gptq-v2-3bit": 3.5}
"""Stored bits per weight but for levels, where scales keep the bits that the source has for them."""

WITHOUT_PACKAGE = {"fp8", "mxfp4", "modelopt"}
"""Formats whose writers need a GPU: `test_places` and `test_modelopt` write them from their definitions."""


def expected(name: str) -> dict[str, Any]:
    """Return what the package decodes."""
    found: dict[str, Any] = json.loads((FIXTURES / name / "expected.json").read_text("utf-8"))
    return found


def test_every_format_has_a_checkpoint_of_its_package() -> None:
    methods = {
        json.loads((FIXTURES / n / "config.json").read_text("utf-8"))["quantization_config"]["quant_method"]
        for n in WRITTEN
    }
    assert methods | WITHOUT_PACKAGE == set(formats())


@pytest.mark.parametrize("name", WRITTEN)
def test_weights_and_logits_are_those_of_the_package(name: str, tmp_path: Path) -> None:
    wanted = expected(name)
    report = import_model(FIXTURES / name, tmp_path / "q")
    records, dtype = load_records(tmp_path / "q"), getattr(torch, wanted["dtype"])
    assert set(records) == set(wanted["weights"])
    for layer, digest in wanted["weights"].items():
        stored = (records[layer].weight().to(dtype) + 0).view(torch.uint8).numpy().tobytes()
        assert hashlib.sha256(stored).hexdigest() == digest, layer
    model, _ = load_model(tmp_path / "q", dtype)
    with torch.no_grad():
        logits = model(torch.tensor(wanted["ids"])).logits[0, -1:].float()
    torch.testing.assert_close(logits, torch.tensor(wanted["logits"]), rtol=2e-3, atol=2e-3)
    assert report.format == json.loads((tmp_path / "q/rankbook.json").read_text("utf-8"))["imported"]["format"]
    if name in BITS:
        parts = report.totals["linear"]["parts"]
        stored_bits = (parts["codes"] + parts.get("params", 0) + parts["step"]) / report.totals["linear"]["weights"]
        assert stored_bits == pytest.approx(BITS[name], abs=0.03)


def test_act_order_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layer model.layers.0.*activation order.*desc_act false"):
        import_model(FIXTURES / "gptq-act-order", tmp_path / "q")
    assert not (tmp_path / "q").exists()
