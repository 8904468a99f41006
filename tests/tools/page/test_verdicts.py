"""Speeds, verdicts of parity and the environment, as the reports state them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rankbook.calibration.source import Kind
from rankbook.tools.bench.device_bench import Missing
from rankbook.tools.commands.eval import Eval, _flags
from rankbook.tools.page import verdicts
from rankbook.tools.page.documents import DeviceSpeeds, Evaluation, LayerSpeeds, ModelSpeeds, make
from rankbook.tools.page.runs import Collection, Part, Report, Run
from tests.tools.page.reports import CELL, ENGINE, LAYER, LOST, SPEED


def shared(*contents: Any) -> Collection:
    return Collection([], [Report(Path(f"{index}.json"), content) for index, content in enumerate(contents)], [])


def test_speeds_of_every_kind_of_bench(made):
    device = DeviceSpeeds([CELL], [], [], [Missing("f", "too large")], {}, None)
    section: Any = verdicts.speed(shared(ModelSpeeds({}, [SPEED]), LayerSpeeds({}, [LAYER]), device))
    bars, table, cells = section.blocks
    assert (bars.title, [bar.text for bar in bars.bars]) == ("decode, 0.json", ["100.0 tokens/s"])
    assert table.rows == [("3 bits", "8 x 16", 1, 2, 4.5, 20.0, "matmulnbits", 1.5)]
    assert (cells.title, cells.longest, cells.legend) == ("decode, 128 tokens, batch 1, 2.json", 500.0, {})
    assert section.missing == ["2.json: f: too large"]


def test_verdicts_of_an_engine_and_its_checks():
    facts = {
        "checks": [{"name": "weights", "passed": False, "detail": "too many"}],
        "commands": {"trtexec": "trtexec x"},
    }
    engine = Part(Kind.ENGINE, Path("e"), type("Found", (), {"facts": facts, "layers": ()})())
    run = Run("A", "e", [engine], [Report(Path("p.json"), ENGINE)])
    section: Any = verdicts.parity(Collection([run], [], []))
    verdicts_of_rows = [row[-1] for row in section.blocks[0].rows]
    assert verdicts_of_rows == ["FAILED", "ok", "FAILED"]
    assert section.blocks[1].rows == [("weights", "FAILED", "too many")]
    assert section.missing == ["A: e was not compared with PyTorch: gone", "A: the first layer out of tolerance is b"]


def test_a_speed_that_is_no_number_is_said():
    rows = verdicts._bars("decode", [("a", 2.0), ("b", float("nan"))])
    assert [(bar.label, bar.text) for bar in rows[0].bars] == [("a", "2.0 tokens/s"), ("b", "no number of tokens/s")]
    assert rows[0].longest == 2


def test_an_evaluation_is_repeated_with_its_flags():
    flags = _flags(Eval(model="gone", text="t.txt", kv_bits=4, chat=True, no_native=True))
    found = make(Evaluation, {**LOST, "text": "t.txt", "flags": flags}, "e.json")
    assert found.on == "t.txt, 3 tokens, in the chat template"
    command = verdicts._command(Report(Path("e.json"), found))
    assert command == "rankbook eval gone --text t.txt --kernels bodies --kv-bits 4 --chat"
