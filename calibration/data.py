"""Text to fixed-length token windows: plain text, JSONL, a `datasets` name, or text sampled from the model itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SAMPLING_BATCH = 16


@dataclass(frozen=True)
class CalibrationData:
    """Windows of tokens and where they came from.

    Attributes:
        tokens: (sequences, length) int64.
        description: One line for reports, e.g. ``64 windows x 512 tokens of calib.txt``.
    """

    tokens: Tensor
    description: str


def calibration_batches(
    tokenizer: Any, source: str | Path | None, *, sequences: int, length: int, seed: int = 0, model: Any = None
) -> CalibrationData:
    """Return at most ``sequences`` windows of ``length`` tokens.

    Args:
        tokenizer: Of the model; needed for text.
        source: See `read_text`; None samples from ``model``.
        sequences: Windows wanted. A text with more is sampled without replacement, a text with fewer gives what it has.
        length: Tokens per window; a text shorter than that gives one shorter window.
        seed: Of the choice of windows and of the sampling.
        model: The unquantized model, for sampling.

    Raises:
        ValueError: No text, empty text, no tokenizer for a text, or token ids outside the model's vocabulary.
    """
    if source is None:
        if model is None:
            raise ValueError("no calibration text is given and there is no model to sample one from; give a text")
        tokens = sample_from_model(model, sequences, length, seed)
        note = f"{sequences} windows x {length} tokens sampled from the model itself; a text of your own may fit better"
        return CalibrationData(tokens, note)
    windows = token_windows(tokenizer, read_text(source), length, what=str(source))
    if len(windows) > sequences:
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
        windows = windows[order[:sequences].sort().values]
    _check_vocabulary(windows, model)
    return CalibrationData(windows, f"{windows.shape[0]} windows x {windows.shape[1]} tokens of {source}")


def token_windows(tokenizer: Any, text: str, length: int, *, what: str = "the text") -> Tensor:
    """Cut a text into non-overlapping windows (windows, length) int64; the remainder is dropped.

    Where the tokenizer starts a text with a special token, each window starts with it too (and holds one token of
    text less): models trained so, like Gemma, are far off without it. A text with fewer tokens gives one short window.

    Raises:
        ValueError: No tokenizer, or fewer than two tokens.
    """
    if tokenizer is None:
        raise ValueError("the model has no tokenizer, so text cannot be used; add tokenizer.json to its folder")
    if not text.strip():
        raise ValueError(f"{what} is empty; give a file with some thousand words of text like that of the model's use")
    prefix = list(tokenizer("")["input_ids"])
    if len(prefix) != 1 or prefix[0] != tokenizer.bos_token_id:
        prefix = []
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    if len(ids) + len(prefix) < 2:
        raise ValueError(f"{what} has {len(ids)} tokens; at least 2 are needed, some thousand are useful")
    payload = min(length - len(prefix), len(ids))
    windows = ids[: len(ids) // payload * payload].view(-1, payload)
    start = torch.tensor(prefix, dtype=torch.long).expand(len(windows), len(prefix))
    return torch.cat([start, windows], dim=1)


def read_text(source: str | Path) -> str:
    """Return the text of a plain text file, of the ``text`` fields of a .jsonl file, or of a `datasets` name.

    A name is ``name``, ``name:config`` or ``name:config:split`` (default split: train) of a dataset with a text column.

    Raises:
        ValueError: No such file or dataset, not UTF-8, or a line of JSONL without text.
    """
    path = Path(source)
    if path.is_file():
        try:
            content = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it") from error
        return _jsonl_text(path, content) if path.suffix in (".jsonl", ".ndjson") else content
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a .txt or .jsonl file")
    return _dataset_text(str(source))


def sample_from_model(model: Any, sequences: int, length: int, seed: int) -> Tensor:
    """Sample windows (sequences, length) int64 from the model, beginning with its start token (temperature 1).

    Without a start token each window begins with a random one, as in LLM-QAT (Liu et al. 2023, section 3.1). Sampling
    goes on after an end token, as documents follow each other in training text.
    """
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(seed)
    start = config.bos_token_id
    batches = []
    for begin in range(0, sequences, _SAMPLING_BATCH):
        rows = min(_SAMPLING_BATCH, sequences - begin)
        if start is None or start >= config.vocab_size:
            first = torch.randint(0, config.vocab_size, (rows, 1), generator=generator)
        else:
            first = torch.full((rows, 1), int(start))
        batches.append(_sample_batch(model, first, length, generator))
    return torch.cat(batches)


@torch.no_grad()
def _sample_batch(model: Any, first: Tensor, length: int, generator: torch.Generator) -> Tensor:
    tokens, past = [first], None
    while len(tokens) < length:
        output = model(input_ids=tokens[-1], past_key_values=past, use_cache=True)
        past = output.past_key_values
        probabilities = output.logits[:, -1].float().softmax(-1)
        tokens.append(torch.multinomial(probabilities, 1, generator=generator))
    return torch.cat(tokens, dim=1)


def _jsonl_text(path: Path, content: str) -> str:
    texts = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}); each line must be an object") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise ValueError(f"{path}, line {number} has no field 'text' that holds a string")
        texts.append(entry["text"])
    return "\n\n".join(texts)


def _dataset_text(name: str) -> str:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{name} is not a file, and dataset names need the package 'datasets' (pip install datasets)"
        ) from error
    dataset, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    try:
        rows = datasets.load_dataset(dataset, config or None, split=split or "train")
    except Exception as error:  # the library raises many types; all mean that there is no such text
        raise ValueError(f"{name} is neither a file nor a dataset that can be loaded: {error}") from error
    if "text" not in rows.column_names:
        raise ValueError(f"dataset {name} has the columns {rows.column_names}, none of them 'text'")
    return "\n\n".join(rows["text"])


def _check_vocabulary(tokens: Tensor, model: Any) -> None:
    if model is None:
        return
    size = model.get_input_embeddings().weight.shape[0]
    if int(tokens.max()) >= size:
        raise ValueError(
            f"the tokenizer gives token {int(tokens.max())}, the model knows {size}: they do not belong together"
        )
