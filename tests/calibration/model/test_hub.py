"""A revision of a model of the hub, fetched into its cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rankbook.calibration.model.hub import at_revision
from rankbook.calibration.source import hub_origin

COMMIT = "0123456789" * 4


def test_a_revision_is_a_folder_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models--owner--some-name" / "snapshots" / COMMIT
    asked: list[dict[str, Any]] = []

    def download(hub_id: str, **given: Any) -> str:
        asked.append({"id": hub_id, **given})
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert at_revision("owner/some-name", None) == "owner/some-name"
    assert not asked
    assert at_revision("owner/some-name", "v1") == str(folder)
    assert (asked[0]["id"], asked[0]["revision"]) == ("owner/some-name", "v1")
    assert "*.bin" in asked[0]["ignore_patterns"]
    assert not {"*.safetensors", "*.index.json"} & set(asked[0]["ignore_patterns"])
    assert hub_origin(folder) == {"hub_id": "owner/some-name", "revision": COMMIT}
    assert hub_origin(tmp_path) == {}


def test_what_has_no_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is a Hugging Face folder"):
        at_revision(str(tmp_path), "v1")

    def fail(*_: Any, **__: Any) -> str:
        raise OSError("no such revision")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ValueError, match=r"revision 'v9' of owner/name cannot be fetched: no such revision"):
        at_revision("owner/name", "v9")
