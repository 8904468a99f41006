"""What ends a generation, and what the model's own configuration forbids, forces and suggests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from rankbook.exporter.export import export
from rankbook.exporter.options import ExportOptions
from rankbook.tools import errors
from rankbook.tools.generation.loop import GenerateOptions, NextTokens, generate
from rankbook.tools.generation.settings import GenerationSettings
from rankbook.tools.runtimes import LanguageModel, open_model
from tests.exporter.checkpoints import make_checkpoint
from tests.tiny import tiny_tokenizer
from tests.tools.files import run_cli, stdout_json

if TYPE_CHECKING:
    from rankbook.tools.runtimes.base import Logits, Tokens


class Alphabet(LanguageModel):
    """Prefers the byte after the last one, then the one after that."""

    name = "alphabet"

    def __init__(self, context: int | None = None, **config: Any) -> None:
        self.tokenizer = tiny_tokenizer()
        self._context, self._config = context, config
        self.fed, self.broken = 0, 0.0

    @property
    def context(self) -> int | None:
        return self._context

    @property
    def generation_config(self) -> Mapping[str, Any]:
        return self._config

    def start(self, tokens: Tokens) -> Logits:
        self.fed = tokens.shape[1]
        return self._scores(int(tokens[0, -1]))

    def step(self, token: int) -> Logits:
        self.fed += 1
        return self._scores(token)

    def _scores(self, token: int) -> Logits:
        scores = np.zeros(259, np.float32)
        scores[[(token + 1) % 256, (token + 2) % 256]] = 2, 1
        scores[7] += np.float32(self.broken)
        return scores


TWELVE = GenerateOptions(max_new_tokens=12)


def letter(character: str) -> int:
    (token,) = tiny_tokenizer()(character)["input_ids"]
    return int(token)


def continued(model: Alphabet, prompt: str = "a", count: int = 6, **more: Any) -> tuple[str, str]:
    result = generate(model, prompt, GenerateOptions(max_new_tokens=count, **more))
    assert result.text == tiny_tokenizer().decode(result.ids) or result.finish_reason == "stop"
    return result.text, result.finish_reason


def test_what_ends_a_text() -> None:
    assert continued(Alphabet()) == ("bcdefg", "length")
    assert continued(Alphabet(eos_token_id=[letter("z"), letter("e")])) == ("bcd", "stop")
    assert continued(Alphabet(eos_token_id=letter("e")), ignore_eos=True) == ("bcdefg", "length")
    assert continued(Alphabet(stop_strings=["de", "x"])) == ("bc", "stop")
    assert continued(Alphabet(stop_strings="ef"), ignore_eos=True) == ("bcdefg", "length")


def test_the_context_ends_a_text_and_is_never_passed() -> None:
    model = Alphabet(context=4)
    assert continued(model) == ("bcd", "context")
    assert model.fed <= 4
    assert continued(model, count=3) == ("bcd", "length")
    for prompt in ("abcd", "abcde"):
        with pytest.raises(errors.UsageError, match="holds 4, new ones included"):
            continued(model, prompt)


def test_tokens_that_are_not_allowed_or_asked_for() -> None:
    assert continued(Alphabet(suppress_tokens=[letter("c")])) == ("bdefgh", "length")
    assert continued(Alphabet(begin_suppress_tokens=[letter("b"), letter("d")])) == ("cdefgh", "length")
    assert continued(Alphabet(bad_words_ids=[[letter("c"), letter("d")], [letter("g")]])) == ("bcefhi", "length")
    assert continued(Alphabet(forced_bos_token_id=letter("x")), count=3) == ("xyz", "length")
    assert continued(Alphabet(forced_bos_token_id=letter("x")), "aa", count=2) == ("bc", "length")
    assert continued(Alphabet(forced_eos_token_id=letter("."), eos_token_id=letter("q")), count=3) == ("bc.", "length")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("more", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 4}])
def test_no_token_is_chosen_among_logits_that_are_no_numbers(bad: float, more: dict[str, Any]) -> None:
    """An fp16 file whose activations overflow gave token 0 again and again, without a word."""
    model = Alphabet()
    assert generate(model, "a", GenerateOptions(max_new_tokens=2, **more)).tokens == 2
    model.broken = bad
    for config in ({}, {"suppress_tokens": [letter("z")]}):
        model._config = config
        with pytest.raises(errors.CheckFailedError, match="NaN or infinite"):
            generate(model, "a", GenerateOptions(max_new_tokens=2, **more))


def test_temperatures_and_numbers_of_tokens() -> None:
    for wrong in (np.nan, np.inf, -1.0):
        with pytest.raises(errors.UsageError, match="is negative or not finite"):
            GenerateOptions(temperature=wrong)
    for count in (0, -3):
        with pytest.raises(ValueError, match="give at least 1"):
            GenerateOptions(max_new_tokens=count)
    assert continued(Alphabet(), temperature=1e-320) == ("bcdefg", "length"), "next to greedy"


def test_a_stop_string_that_is_a_special_token_is_one() -> None:
    assert GenerationSettings.of({"stop_strings": ["<pad>", "x"]}, tiny_tokenizer()).end_tokens == {257, 258}


def test_sampling_of_the_model_is_offered_and_not_taken() -> None:
    config: dict[str, Any] = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "repetition_penalty": 1.05,
    }
    result = generate(Alphabet(**config), "a", GenerateOptions(max_new_tokens=3))
    assert result.text == "bcd"
    assert result.suggested == {key: value for key, value in config.items() if key != "do_sample"}
    advice = GenerationSettings(suggested=result.suggested).advice()
    assert "--temperature 0.6 --top-p 0.9 --top-k 20" in advice
    assert "repetition_penalty 1.05 is not served" in advice
    assert not GenerationSettings.of({**config, "do_sample": False, "repetition_penalty": 1.0}, None).suggested


@pytest.mark.parametrize("field", [{"eos_token_id": "x"}, {"bad_words_ids": [1]}, {"suppress_tokens": ["a"]}])
def test_damaged_settings_are_named(field: dict[str, Any]) -> None:
    with pytest.raises(errors.UsageError, match="damaged"):
        GenerationSettings.of(field, None)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of a tiny Llama of 128 positions, and two files: portable, and for ONNX Runtime."""
    folder = tmp_path_factory.mktemp("generation")
    checkpoint = make_checkpoint(folder, "llama", model={"head_dim": 16}, bits=4)
    export(checkpoint, folder / "onnx")
    export(checkpoint, folder / "ort", ExportOptions(graph="ort"))
    return folder


@pytest.mark.parametrize("name", ["checkpoint", "onnx", "ort"])
def test_every_runtime_stops_at_the_context_and_says_so(
    name: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", work / name, "-p", "x" * 120, "--max-new-tokens", 20, "--ignore-eos"]
    assert run_cli(*command, "--json", "--quiet") == 0
    report = stdout_json(capsys)
    assert (report["tokens"], report["finish_reason"]) == (8, "context")
    assert run_cli(*command) == 0
    assert "ended by the context of the model, which is full" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["checkpoint", "onnx"])
def test_end_tokens_of_a_folder_are_obeyed(name: str, work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / name, tmp_path / "model")
    free = list(NextTokens(open_model(tmp_path / "model"), [1, 2, 3], TWELVE))
    path = tmp_path / "model" / "generation_config.json"
    ends = [257, free[5]]
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": ends}))
    stopped = NextTokens(open_model(tmp_path / "model"), [1, 2, 3], TWELVE)
    assert list(stopped) == free[: free.index(free[5])]
    assert stopped.finish_reason == "stop"
    if name == "checkpoint":  # its files are all needed
        return
    path.unlink()  # transformers takes the end token of config.json then
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": ends}))
    assert list(NextTokens(open_model(tmp_path / "model"), [1, 2, 3], TWELVE)) == list(free[: free.index(free[5])])


def test_windows_are_no_longer_than_the_context(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "text.txt").write_text("the quick brown fox " * 60)
    command = ["eval", work / "checkpoint", "--text", work / "text.txt", "--json", "--quiet"]
    assert run_cli(*command, "--context", 200, "--max-tokens", 200) == 0
    report = stdout_json(capsys)
    assert any("windows have 128 tokens instead of 200" in note for note in report["notes"])


def test_parity_asks_for_no_more_than_the_context(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beyond it positions of the two sides may mean different things, or nothing."""
    assert run_cli("parity", work / "onnx", "--checkpoint", work / "checkpoint", "--tokens", 200) == errors.USAGE
    assert "--tokens asks for 200 positions" in capsys.readouterr().err
