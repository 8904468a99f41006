"""Streamed pieces together are the text of all tokens, for every kind of tokenizer, with bounded work for each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rankbook.tools.generation.stream import TextStream
from tests.tiny import tiny_tokenizer

TEXTS = (
    "I don't know, do you? It's 3 o'clock ! We 're here , they 've gone .",
    "naïve café: 你好，世界 — 🙂🙃 ok\n\n    indented = 'x'  # two  spaces",
    "the quick brown fox jumps over a lazy dog while seven wizards boil " * 8,
)


def wrapped(tokenizer: Tokenizer, **options: Any) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **options)


def unigram() -> Any:
    """Sentence pieces with their space in front, as T5 and XLNet."""
    letters = sorted({character for text in TEXTS for character in text} - {" "})
    pieces = [("<unk>", 0.0), ("▁", -2.0), *((letter, -4.0) for letter in letters)]
    pieces += [(f"▁{word}", -3.0) for word in ("the", "do", "you", "know,", "a", "I")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return wrapped(tokenizer)


def byte_fallback() -> Any:
    """Pieces, and bytes for what they lack, as Llama 2 and Gemma."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz'.,"]
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrapped(tokenizer)


def cleaned_up() -> Any:
    """Words, of which a clean-up joins some with the one before, as BERT and old GPT files ask for."""
    words = sorted({*" ".join(TEXTS).split(), "n't", "'s", "'re", "'ve", "##ing", "do", "not"})
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(["<unk>", *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return wrapped(tokenizer, clean_up_tokenization_spaces=True)


KINDS = {"bytes": tiny_tokenizer, "unigram": unigram, "byte fallback": byte_fallback, "clean-up": cleaned_up}


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_make_the_text(kind: str) -> None:
    tokenizer = KINDS[kind]()
    rng = np.random.default_rng(0)
    sequences = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    if kind != "byte fallback":
        sequences += [rng.integers(0, len(tokenizer), 200).tolist() for _ in range(20)]
    for ids in sequences:
        stream = TextStream(tokenizer)
        assert streamed(stream, ids) == tokenizer.decode(ids, skip_special_tokens=True) == stream.text


def streamed(stream: TextStream, ids: list[int]) -> str:
    return "".join([*(stream.push(token) for token in ids), stream.finish()])


def test_bytes_that_are_no_character_lose_nothing_else() -> None:
    """A byte fallback makes every byte of a run unreadable for one that is wrong; the letters around it are shown."""
    tokenizer = byte_fallback()
    for seed in range(20):
        ids = np.random.default_rng(seed).integers(1, len(tokenizer), 300).tolist()
        whole = tokenizer.decode(ids, skip_special_tokens=True).replace("\N{REPLACEMENT CHARACTER}", "")
        shown = iter(streamed(TextStream(tokenizer), ids))
        assert all(letter in shown for letter in whole), "in this order"


@pytest.mark.parametrize("kind", KINDS)
def test_work_for_a_token_is_bounded(kind: str) -> None:
    tokenizer = KINDS[kind]()
    sizes: list[int] = []

    class Counting:
        def decode(self, ids: list[int], **options: Any) -> str:
            sizes.append(len(ids))
            return str(tokenizer.decode(ids, **options))

    stream = TextStream(Counting())
    ids = tokenizer(TEXTS[2] * 4, add_special_tokens=False)["input_ids"]
    shown = sum(len(stream.push(token)) for token in ids)
    assert max(sizes) <= 64
    assert len(sizes) <= 2 * len(ids)
    assert shown >= len(TEXTS[2] * 4) - 8, "text is shown as it comes"


def test_a_stop_string_ends_the_text_wherever_its_tokens_begin() -> None:
    tokenizer = tiny_tokenizer()
    stream = TextStream(tokenizer, ["\n\nUser:", "END"])
    pieces = []
    for token in tokenizer("one EN two\n\nUser: three")["input_ids"]:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text == "one EN two"
    begun = TextStream(tokenizer, ["END"])
    shown = [begun.push(token) for token in tokenizer("an E")["input_ids"]]
    assert "".join(shown) + begun.finish() == begun.text == "an E"
    assert not begun.stopped


def test_a_stop_string_of_short_words_is_seen_at_its_last_token() -> None:
    tokenizer = tiny_tokenizer()
    stream = TextStream(tokenizer, ["go a"])
    pieces = [stream.push(token) for token in tokenizer("we go a")["input_ids"]]
    assert stream.stopped
    assert "".join(pieces) == "we "
