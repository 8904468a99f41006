"""`doctor` says what is here and what each missing piece would enable."""

from __future__ import annotations

from rankbook.tools.commands import ORDER, doctor
from tests.tools.files import pretend, run_cli, stdout_json


def test_everything_has_a_purpose(capsys):
    assert run_cli("doctor", "--json") == 0
    findings = {item["name"]: item for item in stdout_json(capsys)["findings"]}
    assert findings["torch"]["found"]
    assert {"onnxruntime", "tensorrt-rtx", "tensorrt", "NVIDIA GPU", "TensorRT headers", "nvcc"} <= set(findings)
    for verb in (
        "generate",
        "eval",
        "parity",
        "bench",
        "serve",
    ):  # what running an engine lacks is said of each of them
        for name in ("tensorrt-rtx, engines", "tensorrt", "GPU memory of PyTorch", "trt"):
            assert verb in findings[name]["enables"]
    assert findings["pynvml"]["detail"].startswith("pip install nvidia-ml-py") or findings["pynvml"]["found"]
    assert all(item["enables"] and item["detail"] for item in findings.values())


def test_what_each_verb_lacks(monkeypatch, capsys):
    """Names for each verb, in the JSON and in a table; what is missing for one is no fault of another."""
    packages = (("scipy_", "quantize --target-bits", False), ("onnx_", "export", True), ("fastapi_", "serve", False))
    monkeypatch.setattr(doctor, "_PACKAGES", packages)
    pretend(monkeypatch, "rtx", "tensorrt-rtx is not installed: pip install 'rankbook[cpu]'")
    run_cli("doctor", "--json")
    verbs = stdout_json(capsys)["verbs"]
    assert set(verbs) == set(ORDER)
    assert [verb for verb in ORDER if not verbs[verb]["works"]] == ["export", "serve"]
    assert "scipy_" in verbs["quantize"]["missing"]
    assert "scipy_" not in verbs["export"]["missing"]
    assert [verb for verb in ORDER if "tensorrt-rtx" in verbs[verb]["missing"]] == ["build"]
    assert not {"nvcc", "TensorRT headers"} & {name for found in verbs.values() for name in found["missing"]}


def test_a_missing_necessity_fails_the_check(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert run_cli("doctor") == 1
    assert "needed and missing: torch" in capsys.readouterr().out


def test_headers_are_found_through_their_variable(monkeypatch, tmp_path):
    (tmp_path / "NvInfer.h").write_text("")
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(tmp_path))
    found = {item.name: item for item in doctor._native()}["TensorRT headers"]
    assert found.found
    assert found.detail == str(tmp_path)
