"""What the exporter writes about a file is what a reader finds."""

from __future__ import annotations

from rankbook.exporter.properties import DATA_SHA256, Metadata

LAYERS = {"model.layers.0.mlp.up_proj": {"bits": 3, "error": 0.5}}


def test_what_is_written_is_read() -> None:
    written = Metadata(method="rtn", bits="3", layers=LAYERS, versions={"torch": "2"}, dtype="fp16", context="128")
    texts = written.texts()
    assert texts["rankbook.versions"] == '{"torch":"2"}'
    assert DATA_SHA256 not in texts, "not known yet"
    read = Metadata.of({**texts, DATA_SHA256: "ab", "other.key": "x"})
    assert (read.method, read.bits, read.layers, read.dtype, read.context) == ("rtn", "3", LAYERS, "fp16", "128")
    assert (read.versions, read.data_sha256) == ({"torch": "2"}, "ab")
    assert read.properties["other.key"] == "x"


def test_a_file_without_properties_is_the_simplest_one() -> None:
    assert Metadata.of({}) == Metadata(properties={})
    assert Metadata.of({"rankbook.unknown": "1", "rankbook.properties": "x"}).properties == {
        "rankbook.unknown": "1",
        "rankbook.properties": "x",
    }


def test_damaged_descriptions_count_as_none() -> None:
    for text in ("[" * 100_000, '{"a": 3}', "[]", "{"):
        assert Metadata.of({"rankbook.layers": text}).layers == {}
