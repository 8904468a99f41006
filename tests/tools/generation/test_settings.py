"""What a generation configuration asks for: ends, tokens that are not allowed, and what is offered only."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rankbook.calibration.schema import SchemaError
from rankbook.tools.errors import UsageError
from rankbook.tools.generation.settings import GenerationSettings, read_settings

TOKENIZER = SimpleNamespace(eos_token_id=7, all_special_tokens=("<end>",), all_special_ids=(9,))


def banned(settings: GenerationSettings, before: list[int], produced: int, *, last: bool = False) -> set[int]:
    scores = settings.allow(np.zeros(10, np.float32), before, produced, last=last)
    return {int(token) for token in np.flatnonzero(np.isneginf(scores))}


def test_ends_are_those_of_configuration_and_tokenizer() -> None:
    found = GenerationSettings.of({"eos_token_id": [1, 2], "stop_strings": ["###", "<end>"]}, TOKENIZER)
    assert found.end_tokens == {1, 2, 7, 9}  # a special token is not part of the text, where it could be found
    assert found.stop_strings == ("###",)
    assert GenerationSettings.of({"eos_token_id": 3}, None).end_tokens == {3}


def test_tokens_that_are_not_allowed() -> None:
    found = GenerationSettings.of(
        {"suppress_tokens": [1], "begin_suppress_tokens": [2], "bad_words_ids": [[3], [4, 5], [7]]}, TOKENIZER
    )
    assert banned(found, [0, 8], 0) == {1, 2, 3}
    assert banned(found, [0, 4], 1) == {1, 3, 5}  # [7] is the end token, which may always come


def test_tokens_that_must_come() -> None:
    found = GenerationSettings.of({"forced_bos_token_id": 5, "forced_eos_token_id": 6}, None)
    assert banned(found, [0], 0) == set(range(10)) - {5}
    assert banned(found, [0, 5], 1, last=True) == set(range(10)) - {6}
    assert banned(found, [0, 5], 1) == set()


def test_sampling_is_offered_not_taken() -> None:
    given = {"do_sample": True, "temperature": 0.6, "top_k": 50, "repetition_penalty": 1.1}
    found = GenerationSettings.of(given, None)
    assert found.suggested == {"temperature": 0.6, "repetition_penalty": 1.1}
    assert "give --temperature 0.6 to follow it; repetition_penalty 1.1 is not served" in found.advice()
    assert GenerationSettings.of({"temperature": 0.6}, None).advice() == ""


def test_files_of_a_folder(tmp_path: Path) -> None:
    assert read_settings(tmp_path) == {}
    (tmp_path / "config.json").write_text('{"eos_token_id": 4, "hidden_size": 8}')
    assert read_settings(tmp_path) == {"eos_token_id": 4}
    (tmp_path / "generation_config.json").write_text("[1]")
    with pytest.raises(SchemaError, match="holds a list, not a JSON object"):
        read_settings(tmp_path)
    for wrong in ("x", float("inf"), float("nan"), [[1]]):
        with pytest.raises(UsageError, match=r"generation_config\.json is damaged"):
            GenerationSettings.of({"eos_token_id": wrong}, None)
