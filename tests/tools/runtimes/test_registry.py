"""Runtimes are discovered, and every command takes them from one list."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rankbook.calibration.source import Kind
from rankbook.tools import errors, runtimes
from rankbook.tools.runtimes import kernels, open_model, peers
from rankbook.tools.runtimes.base import LanguageModel
from tests.tiny import tiny_model, tiny_tokenizer
from tests.tools.files import pretend, run_cli, stdout_json

TOY = '''
import numpy as np
from rankbook.calibration.source import Kind
from rankbook.tools.runtimes.base import LanguageModel, Runtime

class Alphabet(LanguageModel):
    """Goes through the alphabet."""

    name, kernels, file_bytes = "toy", "toy", 1

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def start(self, tokens):
        return self.step(int(tokens[0, -1]))

    def step(self, token):
        return np.eye(259, dtype=np.float32)[token + 1]

def open_toy(source, setting):
    from tests.tiny import tiny_tokenizer
    return Alphabet(tiny_tokenizer())

RUNTIMES = (
    Runtime(
        "toy", "Toy", "testing", lambda: None, lambda: "1.0", frozenset({Kind.ENGINE}), open=open_toy, automatic=True
    ),
)
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime of engine folders that is one file; gives such a folder."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "toy_runtime.py").write_text(TOY)
    monkeypatch.setattr(runtimes, "__path__", [*runtimes.__path__, str(tmp_path / "modules")])
    runtimes.runtimes.cache_clear()
    (tmp_path / "engine.json").write_text("{}")
    (tmp_path / "model.engine").write_bytes(b"x")
    yield tmp_path
    runtimes.runtimes.cache_clear()


def test_names_and_roles() -> None:
    found = runtimes.runtimes()
    assert {"torch", "bodies", "native", "native-int8", "native-cuda", "rtx", "trt", "trt-rtx"} | set(peers()) <= set(
        found
    )
    assert set(peers()) == {"genai", "llamacpp", "matmulnbits"}
    assert runtimes.builders() == ("rtx", "trt")
    assert set(kernels()) - set(kernels(exact=True)) == {"native-int8"}
    for name, item in found.items():
        assert item.name == name
        assert item.title
        assert item.enables
        assert item.open or item.build
        assert item.opens or not item.peer


def test_a_runtime_is_one_file(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Generation, the bench and doctor know it without being told."""
    assert run_cli("generate", toy, "-p", "a", "--max-new-tokens", 3, "--json", "--quiet") == 0
    assert stdout_json(capsys)["text"] == tiny_tokenizer().decode([ord("a") - ord("!") + n for n in (1, 2, 3)])
    run_cli("doctor", "--json")
    assert {"name": "Toy", "kind": "runtime", "detail": "1.0", "enables": "testing"}.items() <= next(
        item for item in stdout_json(capsys)["findings"] if item["name"] == "Toy"
    ).items()


def test_the_first_that_is_available_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    pretend(monkeypatch, "native")
    assert runtimes.find(tmp_path)[0].name == "native"
    pretend(monkeypatch, "native", "run `make native`")
    assert runtimes.find(tmp_path)[0].name == "bodies"
    pretend(monkeypatch, "bodies", "onnxruntime is not installed")
    with pytest.raises(errors.MissingError, match="make native`; onnxruntime is not installed"):
        runtimes.find(tmp_path)


def test_a_runtime_that_does_not_open_the_model_is_no_silent_choice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("llama", tmp_path / "model")
    assert run_cli("generate", tmp_path / "model", "-p", "x", "--kernels", "bodies") == errors.USAGE
    assert "holds no .onnx file; give an exported folder" in capsys.readouterr().err


def test_a_builder_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "engine.json").write_text("{}")
    pretend(monkeypatch, "rtx")
    with pytest.raises(errors.UsageError, match="does not run models"):
        open_model(tmp_path, "rtx")


def test_an_engine_of_an_unknown_builder(tmp_path: Path) -> None:
    (tmp_path / "engine.json").write_text('{"target": "vulkan"}')
    with pytest.raises(errors.UsageError, match="an engine folder, which no runtime opens"):
        open_model(tmp_path)


class LastOnly(LanguageModel):
    """Scores the last position: the last token, one hot."""

    name = "last"

    def start(self, tokens):
        import numpy as np

        return np.eye(8, dtype=np.float32)[tokens[0, -1]]

    def step(self, token):
        raise NotImplementedError


def test_a_model_of_last_logits_says_so() -> None:
    import numpy as np

    tokens = np.array([[1, 2, 3], [4, 5, 6]])
    assert LastOnly().scores(tokens).argmax(-1).tolist() == [[3], [6]]
    with pytest.raises(errors.UsageError, match="last position only"):
        LastOnly().logits(tokens)
    assert LastOnly().logits(tokens[:, :1]).shape == (2, 1, 8)


def test_kinds_of_every_runtime() -> None:
    """Each kind that can be run has an automatic runtime."""
    automatic = {kind for item in runtimes.runtimes().values() if item.automatic for kind in item.kinds}
    assert automatic == set(Kind)
