"""Text becomes windows of tokens; what cannot become any is refused with the reason."""

from __future__ import annotations

import itertools
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from rankbook.calibration import text as reading
from rankbook.calibration.data import calibration_batches, sample_from_model, special_tokens, token_windows
from rankbook.calibration.notes import Note
from rankbook.calibration.text import pieces, sample_pieces
from tests.tiny import VOCABULARY, tiny_model, tiny_tokenizer, write_text


def read_text(source: str | Path, tokenizer: Any = None, *, chat: bool = False) -> str:
    """Read a whole text."""
    return "".join(reading.read_text(source, chat=chat).parts(tokenizer))


def with_template(single: str) -> Any:
    """Return the byte tokenizer with special tokens around a text."""
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    return tokenizer


def test_windows_are_the_text_without_its_end() -> None:
    text = "abcdefghij" * 5
    windows = token_windows(tiny_tokenizer(), text, 8).tokens
    assert windows.shape == (6, 8)
    assert tiny_tokenizer().decode(windows.flatten()) == text[:48]


@pytest.mark.parametrize(
    ("template", "prefix", "suffix"),
    [
        ("$A", (), ()),
        ("<s> $A", (256,), ()),
        ("<s> $A </s>", (256,), (257,)),
        ("</s> $A", (257,), ()),  # the end token in front, as in OPT
        ("<s> </s> $A", (256, 257), ()),
        ("$A </s>", (), (257,)),
    ],
)
def test_windows_begin_as_a_prompt_does(template: str, prefix: Any, suffix: Any) -> None:
    tokenizer = with_template(template)
    tokenizer.bos_token = None  # what the tokenizer does counts, not what it is said to have
    windows = token_windows(tokenizer, "abcdefghijkl", 4)
    assert (windows.prefix, windows.suffix) == (prefix, suffix) == special_tokens(tokenizer, "one two")
    assert windows.tokens.shape == (12 // (4 - len(prefix)), 4)
    assert windows.tokens[0].tolist() == tokenizer("abcdefghijkl").input_ids[:4]
    body = windows.tokens[:, len(prefix) :].flatten()
    assert body.tolist() == tokenizer("abcdefghijkl", add_special_tokens=False).input_ids
    assert (windows.tokens[:, : len(prefix)] == torch.tensor(prefix)).all()
    about = windows.describe(tokenizer)
    assert about["text_tokens"] == 12
    assert about["prefix"] == {"ids": list(prefix), "tokens": [{256: "<s>", 257: "</s>"}[i] for i in prefix]}


def test_sampled_windows_begin_as_a_prompt_does() -> None:
    take: dict[str, Any] = {"sequences": 3, "length": 6, "model": tiny_model("llama")}
    assert calibration_batches(with_template("</s> <s> $A"), None, **take).tokens[:, :2].tolist() == [[257, 256]] * 3
    assert (calibration_batches(tiny_tokenizer(), None, **take).tokens[:, 0] == 256).all()  # the model's own start


def test_only_the_windows_wanted_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PIECE", 50)
    read: list[str] = []

    def rows() -> Any:
        for number in range(1000):
            read.append(f"line {number} ")
            yield read[-1]

    windows = token_windows(tiny_tokenizer(), reading.Text("long", rows), 8, most=3)
    assert windows.tokens.shape == (3, 8)
    assert len(read) < 40


class Metaspace:
    """Words as tokens, with a space in front of every text, as SentencePiece has it."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [hash(word) % 1000 for word in f" {text}".split(" ")[1:]]}


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), Metaspace()], ids=["bytes", "spaces in front"])
def test_tokenizing_in_pieces_gives_the_tokens_of_the_whole(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(f"word{number}, and" for number in range(500))
    whole = token_windows(tokenizer, text, 10)
    monkeypatch.setattr(reading, "PIECE", 300)
    assert torch.equal(token_windows(tokenizer, text, 10).tokens, whole.tokens)


def test_pieces_are_the_text_cut_between_words() -> None:
    text = "the quick, brown fox\n" * 40
    for parts in ([text], list(text), [text[:7], text[7:]]):
        cut = list(pieces(parts, 100))
        assert "".join(cut) == text
        assert all(len(piece) <= 200 for piece in cut)
        assert all(before[-1].isalnum() and after[0] == " " for before, after in itertools.pairwise(cut))
    assert [len(piece) for piece in pieces(["x" * 250], 100)] == [100, 100, 50]  # no place to cut


def test_a_long_text_is_sampled_with_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, count = sample_pieces(map(str, range(1000)), 10, seed=0)
    assert (len(kept), count) == (10, 1000)
    assert kept == sorted(kept, key=int) == sample_pieces(map(str, range(1000)), 10, seed=0)[0]
    assert kept != sample_pieces(map(str, range(1000)), 10, seed=1)[0]
    assert int(kept[-1]) > 500  # the end has its chance
    monkeypatch.setattr(reading, "PIECE", 1000)
    monkeypatch.setattr(reading, "MOST_PIECES", 3)
    source = write_text(tmp_path / "long.txt", 20000)
    data = calibration_batches(tiny_tokenizer(), source, sequences=4, length=16)
    assert "chosen from 3 of its 20 parts" in data.description or "chosen from 3 of its 21 parts" in data.description


def test_more_windows_than_asked_for_are_sampled_by_seed(tmp_path: Path) -> None:
    source = write_text(tmp_path / "text.txt", 2000)
    take: dict[str, Any] = {"sequences": 4, "length": 16}
    first = calibration_batches(tiny_tokenizer(), source, seed=0, **take)
    assert first.tokens.shape == (4, 16)
    assert torch.equal(first.tokens, calibration_batches(tiny_tokenizer(), source, seed=0, **take).tokens)
    assert not torch.equal(first.tokens, calibration_batches(tiny_tokenizer(), source, seed=1, **take).tokens)
    assert first.description.startswith("4 windows x 16 tokens of")


def test_a_text_shorter_than_asked_is_said(tmp_path: Path) -> None:
    source = write_text(tmp_path / "short.txt", 40)
    with pytest.warns(Note, match=r"short\.txt is short: 2 of 4 calibration windows of 16 tokens"):
        data = calibration_batches(tiny_tokenizer(), source, sequences=4, length=16)
    assert data.tokens.shape == (2, 16)
    assert data.description.startswith("2 windows x 16 tokens of")
    assert "4 windows were asked for" in data.description


def test_less_than_one_calibration_window_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("abcde")
    with pytest.raises(ValueError, match="has 5 tokens, less than one calibration window of 16"):
        calibration_batches(tiny_tokenizer(), tmp_path / "short.txt", sequences=4, length=16)
    assert token_windows(tiny_tokenizer(), "abcde", 16).tokens.shape == (1, 5)  # one can be evaluated on it


def test_sampling_is_seeded_and_begins_with_the_start_token() -> None:
    model = tiny_model("llama")
    tokens = sample_from_model(model, 20, 6, seed=0)
    assert tokens.shape == (20, 6)
    assert (tokens[:, 0] == 256).all()
    assert torch.equal(tokens, sample_from_model(model, 20, 6, seed=0))
    assert not torch.equal(tokens, sample_from_model(model, 20, 6, seed=1))
    assert len({tuple(row) for row in tokens.tolist()}) == 20


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_sampling_with_a_cache_follows_the_model(family: str) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        parameter = model.get_input_embeddings().weight
        parameter.mul_(50)  # distributions so sharp that the likeliest token is drawn nearly always
    tokens = sample_from_model(model, 2, 12, seed=0)
    probabilities = model(tokens).logits[:, :-1].double().softmax(-1)
    drawn = probabilities.gather(2, tokens[:, 1:, None])
    assert (drawn > 1e-4).all()


def test_sampling_without_a_start_token() -> None:
    tokens = sample_from_model(tiny_model("llama", bos_token_id=None), 8, 3, seed=0)
    assert len(set(tokens[:, 0].tolist())) > 1
    assert int(tokens.max()) < VOCABULARY


def test_no_text_samples_and_says_so() -> None:
    data = calibration_batches(None, None, sequences=2, length=4, model=tiny_model("llama"))
    assert "sampled from the model itself" in data.description


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "id": 1}) for text in ("one", "two")) + "\n\n")
    assert read_text(path) == "one\n\ntwo"
    path.write_text('{"text": "one"}\n{"text":')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_text(path)
    path.write_text('{"content": "one"}')
    with pytest.raises(ValueError, match="line 1 has no field 'text'"):
        read_text(path)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_lines_of_json_end_with_a_line_feed_alone(mark: str, tmp_path: Path) -> None:
    text = "one\u2028two\u0085three\u2029\x0bfour"
    (tmp_path / "a.jsonl").write_text(mark + json.dumps({"text": text}, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert read_text(tmp_path / "a.jsonl") == text
    (tmp_path / "a.txt").write_text(f"{mark}{text}", encoding="utf-8")
    assert read_text(tmp_path / "a.txt") == text


def test_a_list_in_json_is_its_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for rows in (["one", "two"], [{"text": "one", "id": 1}, {"text": "two"}]):
        path.write_text(json.dumps(rows, indent=1))
        assert read_text(path) == "one\n\ntwo"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')  # lines of JSON under another name
    assert read_text(path) == "one\n\ntwo"
    path.write_text('{"text": "one"}')
    assert read_text(path) == "one"
    for content, said in (
        ('{"weights": [1]}', "holds an object"),
        ("just text", "name it .txt"),
        ("[1, 2]", "row 1 has no field 'text'"),
        ('["one", {"content": "two"}]', "row 2 has no field 'text'"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=said):
            read_text(path)


def test_chats_go_through_the_template_where_asked(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    chats = [[{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "so"}] for i in range(3)]
    path.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    tokenizer = with_template("<s> $A")
    tokenizer.chat_template = "<s>{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
    rendered = "".join(tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats)
    assert read_text(path, tokenizer, chat=True) == rendered
    windows = token_windows(tokenizer, reading.read_text(path, chat=True), 20).tokens
    ids = tokenizer(rendered, add_special_tokens=False).input_ids
    assert windows[0].tolist() == ids[:20]  # one start token, not two
    assert windows[1].tolist() == [256, *ids[20:39]]
    data = calibration_batches(tokenizer, path, sequences=2, length=16, chat=True)
    assert "in the model's chat template" in data.description
    with pytest.raises(ValueError, match=r"line 1 has no field 'text'.*give --chat"):
        read_text(path)
    with pytest.raises(ValueError, match="no chat template"):
        read_text(path, tiny_tokenizer(), chat=True)
    path.write_text('{"text": "plain"}')
    with pytest.raises(ValueError, match="no field 'messages'"):
        read_text(path, tokenizer, chat=True)
    with pytest.raises(ValueError, match="cannot hold chat messages"):
        read_text(write_text(tmp_path / "a.txt"), tokenizer, chat=True)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    path.write_text(json.dumps({"messages": chats[0]}))
    with pytest.raises(ValueError, match=r"template refuses .*roles must alternate"):
        read_text(path, tokenizer, chat=True)


def test_a_dataset_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows:
        column_names = ("text",)

        def __getitem__(self, name: str) -> list[str]:
            return ["one", "two"]

    asked: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Rows:
        asked.append((args, kwargs))
        return Rows()

    module: Any = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert read_text("wikitext:wikitext-2-raw-v1:test") == "one\n\ntwo"
    assert asked == [(("wikitext", "wikitext-2-raw-v1"), {"split": "test"})]
    Rows.column_names = ("content",)
    with pytest.raises(ValueError, match="none of them 'text'"):
        read_text("wikitext")


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"nowhere\.txt is not a file"):
        read_text(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match="is a folder"):
        read_text(tmp_path)
    (tmp_path / "table.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"is a \.parquet file, not text"):
        read_text(tmp_path / "table.parquet")
    (tmp_path / "zeros.txt").write_bytes(b"a\0b")
    with pytest.raises(ValueError, match="zero bytes"):
        read_text(tmp_path / "zeros.txt")
    (tmp_path / "empty.txt").write_text("  \n")
    with pytest.raises(ValueError, match=r"empty\.txt is empty"):
        calibration_batches(tiny_tokenizer(), tmp_path / "empty.txt", sequences=1, length=4)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_text(tmp_path / "latin.txt")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="has 1 tokens"):
        calibration_batches(tiny_tokenizer(), tmp_path / "a.txt", sequences=1, length=4)
    with pytest.raises(ValueError, match="no tokenizer"):
        calibration_batches(None, write_text(tmp_path / "b.txt", 100), sequences=1, length=4)
    with pytest.raises(ValueError, match="do not belong together"):
        calibration_batches(
            tiny_tokenizer(),
            tmp_path / "b.txt",
            sequences=1,
            length=4,
            model=tiny_model("llama", vocab_size=50, pad_token_id=1),
        )
