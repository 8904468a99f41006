"""``rankbook push`` against a stand-in for the hub: a server of this machine that keeps what it is sent."""

from __future__ import annotations

import base64
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rankbook.tools import errors
from tests.exporter.checkpoints import make_checkpoint
from tests.tools.files import run_cli, stdout_json


class Hub(http.server.BaseHTTPRequestHandler):
    """What the client of the hub asks when it uploads; every file is small to it, so that it comes with the commit."""

    calls: list[tuple[str, Any]]
    refused = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        lines = [json.loads(line) for line in body.splitlines()] if "ndjson" in self.headers["Content-Type"] else []
        content: Any = lines or json.loads(body or "{}")
        model = f"http://{self.headers['Host']}/owner/model"
        self.calls.append((f"{self.path} {self.headers.get('Authorization')}", content))
        if self.refused:
            self._answer({"error": "not yours"}, 403)
        elif self.path == "/api/repos/create":
            self._answer({"url": model, "id": "owner/model"})
        elif "/preupload/" in self.path:
            files = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in content["files"]]
            self._answer({"files": files})
        elif "/commit/" in self.path:
            self._answer(
                {"commitUrl": f"{model}/commit/1", "commitOid": "1", "commitMessage": "", "commitDescription": ""}
            )
        else:
            self._answer({})

    def do_GET(self) -> None:
        self._answer({"id": "owner/model", "siblings": [], "private": False, "tags": [], "sha": "0" * 40})

    def _answer(self, content: Any, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    handler = type("Kept", (Hub,), {"calls": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "secret")
        monkeypatch.setenv("NO_PROXY", "*")
        yield handler
        server.shutdown()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("push"), "llama", model={"num_hidden_layers": 1})
    (folder / "rankbook-quantize.yaml").write_text("quantize: {model: /home/somebody}\n")
    return folder


def test_what_is_pushed(checkpoint: Path, hub: type[Hub], capsys: pytest.CaptureFixture[str]) -> None:
    """Every file of the checkpoint as it is, and nothing of this machine."""
    (checkpoint / "notes.txt").write_text("of somebody else")
    assert run_cli("push", checkpoint, "owner/model", "--private", "--message", "first", "--json", "--quiet") == 0
    report = stdout_json(capsys)
    (created, asked), *_, (committed, lines) = hub.calls
    assert created == "/api/repos/create Bearer secret"
    assert asked.get("visibility", "private" if asked.get("private") else "") == "private"
    assert committed.startswith("/api/models/owner/model/commit/main")
    assert lines[0]["value"]["summary"] == "first"
    sent = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines[1:]}
    assert sorted(sent) == sorted(report["files"])
    assert {"README.md", "config.json", "rankbook.json", "tokenizer.json", "model.safetensors"} <= set(sent)
    assert not {"notes.txt", "rankbook-quantize.yaml"} & set(sent)
    assert all(content == (checkpoint / name).read_bytes() for name, content in sent.items())
    assert report["url"].endswith("/owner/model/commit/1")


def test_a_hub_that_refuses(checkpoint: Path, hub: type[Hub], capsys: pytest.CaptureFixture[str]) -> None:
    hub.refused = True
    assert run_cli("push", checkpoint, "owner/model", "--quiet") == errors.CHECK_FAILED
    assert "owner/model cannot be written" in capsys.readouterr().err


def test_what_is_not_pushed(
    checkpoint: Path, tmp_path: Path, hub: type[Hub], capsys: pytest.CaptureFixture[str]
) -> None:
    """Damaged weights, a file that is gone, a folder of somebody else: nothing is sent."""
    bad = shutil.copytree(checkpoint, tmp_path / "bad")
    weights = bytearray((bad / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (bad / "model.safetensors").write_bytes(weights)
    assert run_cli("push", bad, "owner/model", "--quiet") == errors.USAGE
    (bad / "README.md").unlink()
    assert run_cli("push", bad, "owner/model", "--quiet") == errors.USAGE
    assert "lacks README.md" in capsys.readouterr().err
    (bad / "rankbook-files.json").unlink()
    assert run_cli("push", bad, "owner/model", "--quiet") == errors.USAGE
    assert "quantize or export it again" in capsys.readouterr().err
    assert run_cli("push", tmp_path, "owner/model", "--quiet") == errors.USAGE
    assert not hub.calls
