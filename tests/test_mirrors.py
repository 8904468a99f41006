"""A library module of weight has its tests where one looks for them: the same path under tests/."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEAST = 80
"""Lines from which on a module is asked for its tests."""
PIPELINE, ENGINE, BENCH = "tools/test_pipeline.py", "tools/deploy/test_engine.py", "tools/test_bench.py"
ELSEWHERE = {
    **dict.fromkeys(("parity", "parity_tables", "quantize"), PIPELINE),
    **dict.fromkeys(("checks", "engine_commands", "engine_log", "manifest", "options", "rtx_worker", "trt"), ENGINE),
    **dict.fromkeys(
        ("trt_engine", "trt_load", "trt_memory", "trt_model", "step"), "tools/runtimes/test_engine_model.py"
    ),
    **dict.fromkeys(("device_bench", "device_report", "gpu"), "tools/test_bench_engines.py"),
    **dict.fromkeys(("bench", "layer_bench", "layers", "model_bench"), BENCH),
    **dict.fromkeys(("genai", "llamacpp"), "tools/test_bench_peers.py"),
    **dict.fromkeys(("ort", "torch", "exported"), "tools/runtimes/test_registry.py"),
    **dict.fromkeys(("app", "scheduler", "serve", "slots"), "tools/serve/test_serve.py"),
    "errors": "tools/test_cli.py",
    "ort_steps": "tools/runtimes/test_ort_device.py",
    "block": "calibration/driver/test_run.py",
    "eval": "tools/evaluate/test_quality.py",
    "export": "tools/test_pipeline.py",
    "cuda_abi": "calibration/model/test_packed_ops.py",
    "device": "second_device/test_second_device.py",
    "inspect": "tools/inspect/test_inspection.py",
    "node_checks": "tools/test_int8_operators.py",
}
"""Modules that need a whole run, a builder or another program, by stem: the test module that runs them."""


def without_tests() -> list[Path]:
    """Return the modules of weight without a test module at their place."""
    modules = [path for part in ("calibration", "tools", "plugins") for path in (ROOT / part).rglob("[a-z]*.py")]
    heavy = [path.relative_to(ROOT) for path in modules if path.read_text("utf-8").count("\n") >= LEAST]
    heavy = [path for path in heavy if path.parts[:2] != ("tools", "dev")]
    return [path for path in heavy if not (ROOT / "tests" / path.with_name(f"test_{path.name}")).is_file()]


def test_modules_of_weight_have_their_tests_at_their_place() -> None:
    missing = sorted(str(path) for path in without_tests() if path.stem not in ELSEWHERE)
    assert not missing, f"no test module mirrors {', '.join(missing)}; write one, or say in ELSEWHERE what runs it"


def test_what_is_tested_elsewhere_still_is() -> None:
    stems = {path.stem for path in without_tests()}
    assert sorted(set(ELSEWHERE) - stems) == [], "these have a test module of their own now, or are gone"
    assert [name for name in ELSEWHERE.values() if not (ROOT / "tests" / name).is_file()] == []
