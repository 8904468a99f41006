"""`rankbook report` writes one file that needs nothing else, shows what is there, and names what is not."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from rankbook.tools import errors
from rankbook.tools.page.page import make_page
from rankbook.tools.report import plain
from tests.tools.files import run_cli, stdout_json
from tests.tools.page.reports import FILE, LOST, SPEED

HEADINGS = [
    *("Overview", "Accuracy", "Error of each layer", "Spectrum of the error", "Codebooks", "Where the bytes go"),
    *("Speed", "Parity", "Environment", "Commands"),
]
_VOID = {"meta", "br", "img", "link", "input"}


class Reader(HTMLParser):
    """Collects elements, attributes and text, and checks that elements end where they should."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def check_self_contained(page: Reader, text: str) -> None:
    """No script, no address, and a policy that lets nothing in."""
    assert not {"script", "iframe", "object", "embed", "link", "img", "form", "base"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "srcset", "action")]
    assert all(value.startswith("#") for name, value in page.attributes if name == "href")
    assert "@import" not in text
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'") in (
        page.attributes
    )


def test_everything_of_two_runs_side_by_side(made, tmp_path, capsys):
    (tmp_path / "bench").mkdir()
    speeds = {"machine": {"processor": "a CPU"}, "models": [plain(SPEED) | {"name": f"{made / 'onnx'}@native"}]}
    (tmp_path / "bench" / "bench.json").write_text(json.dumps(speeds))
    target = tmp_path / "deep" / "report.html"
    given = [made / "three", made / "four", made / "onnx", made / "reports", tmp_path / "bench"]
    assert run_cli("report", *given, "-o", target, "--title", "Two runs", "--looks", 1, "--json", "--quiet") == 0
    report = stdout_json(capsys)
    text = target.read_text("utf-8")
    page = Reader(text)
    check_self_contained(page, text)
    assert "http" not in text.replace("http-equiv", "")
    assert [tag for tag in page.tags if tag == "h2"] == ["h2"] * len(HEADINGS)
    assert all(heading in page.texts for heading in HEADINGS)
    for words in (
        *("Two runs", "2 runs from 3 folders and 4 reports", "rtn 3 bits", "error branch of rank 4", "rtn 4 bits"),
        *(
            "unquantized model",
            "Lower and further left",
            "text.txt, 4 x 32 tokens",
            "up_proj",
            "without the branch",
            "rank 4",
        ),
        *("plane 1", "error branch", "100.0 tokens/s", "cached decoding", "a CPU", "rankbook quantize --config"),
        *("rankbook eval", "method: rtn", "B: no ONNX file was given", "A: no engine was given", "transformers"),
    ):
        assert words in page.text, words
    assert [run["letter"] for run in report["runs"]] == ["A", "B"]
    assert report["bytes"] == len(text.encode())
    assert report["runs"][0]["bits_per_weight"] > 3
    assert report["runs"][0]["reports"][0]["content"]["perplexity"] > 1
    assert [section["title"] for section in report["sections"]] == HEADINGS
    assert [file.name for file in target.parent.iterdir()] == ["report.html"]


def test_names_from_files_are_text_and_never_markup(made, tmp_path):
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&`<b>`"
    folder = tmp_path / "<i>runs"
    folder.mkdir()
    result = {
        **LOST,
        "model": evil,
        "text": evil,
        "reference_perplexity": 3.0,
        "kernels": evil,
        "windows": {"count": evil},
    }
    (folder / "eval.json").write_text(json.dumps(result))
    scores = {"model": evil, "kernels": evil, "tasks": {evil: {evil: 0.5, "other": evil}}}
    (folder / "tasks.json").write_text(json.dumps(scores))
    (folder / "parity.json").write_text(
        json.dumps(plain(FILE) | {"model": evil, "problems": [evil], "checkpoint": evil})
    )
    (folder / "bench.json").write_text(
        json.dumps({"machine": {evil: {evil: evil}}, "models": [plain(SPEED) | {"name": evil}]})
    )
    text = make_page([folder], evil, 1).html()
    page = Reader(text)
    check_self_contained(page, text)
    assert page.text.count("alert(1)") > 10
    assert "b" not in page.tags


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "RUN is missing"),
        (["nothing"], "nothing does not exist"),
        (["nothing", "-o", "report.pdf"], "the page is HTML"),
    ],
)
def test_wrong_arguments_are_sentences(tmp_path, monkeypatch, capsys, given, said):
    monkeypatch.chdir(tmp_path)
    assert run_cli("report", *given) == errors.USAGE
    assert said in capsys.readouterr().err


def test_a_failure_leaves_the_page_that_was_there(made, tmp_path, capsys):
    target = tmp_path / "report.html"
    target.write_text("before")
    (tmp_path / "bad.json").write_text('{"model": "m", "perplexity": [], "tokens": 3}')
    assert run_cli("report", made / "four", tmp_path / "bad.json", "-o", target, "--quiet") == errors.USAGE
    assert "perplexity is list" in capsys.readouterr().err
    assert target.read_text() == "before"


def test_without_matplotlib_it_says_what_to_install(made, tmp_path, monkeypatch, capsys):
    from rankbook.tools.page import figures

    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    assert run_cli("report", made / "four", "-o", tmp_path / "r.html") == errors.MISSING
    assert "pip install 'rankbook[report]'" in capsys.readouterr().err
