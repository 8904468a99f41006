"""Reading text for calibration and evaluation, part by part: plain files, JSONL and JSON, chats, `datasets` names."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

PIECE = 1 << 16
"""Characters that are tokenized at once."""
MOST_PIECES = 256
"""Pieces that a sample of windows is taken from: 16 million characters; of a longer text, this many are chosen."""

_READ = 1 << 20
_LINES, _LIST = (".jsonl", ".ndjson"), ".json"
_NOT_TEXT = frozenset(
    ".parquet .arrow .feather .pdf .docx .xlsx .zip .gz .bz2 .xz .zst .tar .tgz .npy .npz .pt .pth .bin .pkl .h5 .onnx"
    " .gguf .safetensors .png .jpg .jpeg .wav .mp3".split()
)
_KINDS = "give a .txt, .jsonl or .json file, or the name of a dataset"

Render = Callable[[list[Any]], str]
"""Messages of a chat to the text that the model reads."""


@dataclass(frozen=True)
class Text:
    """A text that is there, and is read when it is asked for.

    Attributes:
        name: What the user called it.
        rows: Reads it: strings whose concatenation is the text, or, where ``chat``, rows with messages.
        chat: Whether it holds chats, to which a template is applied.
    """

    name: str
    rows: Callable[[], Iterator[Any]]
    chat: bool = False

    def parts(self, tokenizer: Any) -> Iterator[str]:
        """Yield strings whose concatenation is the text.

        Args:
            tokenizer: Of the model, whose chat template is applied to chats.

        Raises:
            ValueError: It is not UTF-8, a row without text, or a chat that the template refuses.
        """
        yield from (map(_renderer(tokenizer), self.rows()) if self.chat else self.rows())


def read_text(source: str | Path, *, chat: bool = False) -> Text:
    """Find a text: a plain file, a .jsonl or .json file, or a `datasets` name.

    Rows of JSON are strings or objects with ``text``, or with ``messages`` where ``chat``. A name is ``name``,
    ``name:config`` or ``name:config:split`` (default split: train) of a dataset with such a column.

    Raises:
        ValueError: No such file or dataset, or a file that is no text.
    """
    path = Path(source)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; {_KINDS}")
    if path.suffix.lower() in _NOT_TEXT:
        raise ValueError(f"{path} is a {path.suffix} file, not text; {_KINDS}")
    name = str(source)
    if not path.is_file():
        return Text(name, _dataset(name, chat), chat)
    if path.suffix.lower() == _LIST:
        return Text(name, lambda: _joined(_list(path), chat), chat)
    if path.suffix.lower() in _LINES:
        found = Text(name, lambda: _joined(_lines(path), chat), chat)
    elif chat:
        raise ValueError(f"{path} cannot hold chat messages; give a .jsonl or .json file whose rows have 'messages'")
    else:
        found = Text(name, lambda: _plain(path))
    next(found.rows(), None)  # a file that is no text should not cost the time of loading a model
    return found


def plain_text(text: str, name: str = "the text") -> Text:
    """Return a text that is in memory already."""
    return Text(name, lambda: iter((text,)))


def pieces(parts: Iterable[str], size: int | None = None) -> Iterator[str]:
    """Regroup a text into pieces of about ``size`` (`PIECE`) characters.

    A piece ends between two words; the next then begins with the space, which `rankbook.calibration.data` knows.
    """
    size = size or PIECE
    held = ""
    for part in parts:
        held += part
        while len(held) > 2 * size:
            cut = _cut(held, size)
            yield held[:cut]
            held = held[cut:]
    while held:
        cut = _cut(held, size) if len(held) > size else len(held)
        yield held[:cut]
        held = held[cut:]


def sample_pieces(found: Iterable[str], most: int, seed: int) -> tuple[list[str], int]:
    """Return at most ``most`` pieces, chosen with equal chances and in their order, and how many there are."""
    chosen: list[tuple[int, str]] = []
    draw = random.Random(seed)
    count = 0
    for count, piece in enumerate(found, 1):
        if count <= most:
            chosen.append((count, piece))
        elif (place := draw.randrange(count)) < most:  # Vitter's algorithm R
            chosen[place] = (count, piece)
    return [piece for _, piece in sorted(chosen)], count


def _cut(text: str, size: int) -> int:
    """Return where to cut: before the last space between two words, else after a line, else at ``size``."""
    place = text.rfind(" ", 1, size)
    while place > 0 and not (text[place - 1].isalnum() and text[place + 1].isalnum()):
        place = text.rfind(" ", 1, place)
    return place if place > 0 else text.rfind("\n", 0, size) + 1 or size


def _plain(path: Path) -> Iterator[str]:
    with _opened(path) as stream:
        while part := stream.read(_READ):
            if "\0" in part:
                raise ValueError(f"{path} holds zero bytes: it is not text; {_KINDS}")
            yield part


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """Open UTF-8 text, a byte-order mark left out; what is not UTF-8 is a sentence."""
    with path.open(encoding="utf-8-sig") as stream:
        try:
            yield stream
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error.reason}); convert it") from error


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield where and what each line of JSON is; lines end with a line feed alone, not with U+2028 or U+0085."""
    with _opened(path) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield f"{path}, line {number}", _parsed(line, f"{path}, line {number}")


def _list(path: Path) -> Iterator[tuple[str, Any]]:
    with _opened(path) as stream:
        content = stream.read()
    try:
        found = json.loads(content)
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply; {_KINDS}") from error
    except ValueError as error:
        if str(error).startswith("Extra data"):  # lines of JSON under another name
            yield from _lines(path)
            return
        raise ValueError(f"{path} is not JSON ({error}); name it .txt if it is plain text") from error
    if isinstance(found, dict) and not found.keys() & {"text", "messages"}:
        raise ValueError(f"{path} holds an object; give a list of texts, or of objects with 'text'")
    for index, row in enumerate(found if isinstance(found, list) else [found], 1):
        yield f"{path}, row {index}", row


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply; each line must be an object with 'text'") from error
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}); each line must be an object") from error


def _joined(rows: Iterator[tuple[str, Any]], chat: bool) -> Iterator[Any]:
    """Yield the texts with an empty line between them, or the messages as they are."""
    for index, (where, row) in enumerate(rows):
        content = _content(where, row, chat)
        yield content if chat or not index else f"\n\n{content}"


def _content(where: str, row: Any, chat: bool) -> Any:
    fields = row if isinstance(row, dict) else {"text": row}
    if chat:
        if isinstance(fields.get("messages"), list):
            return fields["messages"]
        raise ValueError(f"{where} has no field 'messages' that holds a list; leave the chat flag out for plain texts")
    if isinstance(fields.get("text"), str):
        return fields["text"]
    hint = ""
    if isinstance(fields.get("messages"), list):
        hint = ": it holds chat messages; give --chat (quantize: --calib-chat) to put them into the model's template"
    raise ValueError(f"{where} has no field 'text' that holds a string{hint}")


def _renderer(tokenizer: Any) -> Render:
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("the tokenizer has no chat template; give plain texts, without the chat flag")

    def render(messages: list[Any]) -> str:
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # templates raise what they like
            raise ValueError(f"the model's chat template refuses {str(messages)[:80]!r}: {error}") from error

    return render


def _dataset(name: str, chat: bool) -> Callable[[], Iterator[Any]]:
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
    column = "messages" if chat else "text"
    if column not in rows.column_names:
        raise ValueError(f"dataset {name} has the columns {rows.column_names}, none of them {column!r}")
    return lambda: _joined(((f"{name}, row {i}", {column: item}) for i, item in enumerate(rows[column], 1)), chat)
