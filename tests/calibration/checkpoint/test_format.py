"""A checkpoint comes back as written, is replaced as a whole or not at all, and damage is named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rankbook.calibration.checkpoint import format as ck
from rankbook.calibration.record.quantized_linear import QuantizedLinear
from tests.calibration.checkpoint.writing import write


def same(a: QuantizedLinear, b: QuantizedLinear) -> bool:
    """Return whether two records hold equal tensors."""
    pa, pb = a.pack(), b.pack()
    return pa.keys() == pb.keys() and all(torch.equal(pa[n], pb[n]) for n in pa) and a.method == b.method


@pytest.mark.parametrize("shard_bytes", [ck.SHARD_BYTES, 3000])
def test_round_trip(tmp_path: Path, shard_bytes: int) -> None:
    records = write(tmp_path / "out", shard_bytes)
    loaded = ck.load_records(tmp_path / "out")
    assert loaded.keys() == records.keys()
    assert all(same(loaded[name], records[name]) for name in records)
    assert loaded["head"] is loaded["blocks.0.linear"]
    opened = ck.open_checkpoint(tmp_path / "out", verify=True)
    assert sorted(opened.unquantized()) == ["embedding.weight", "norm.weight"]
    assert opened.tensor("norm.weight").dtype == torch.bfloat16
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == (
        1 if shard_bytes > 3000 else len(set(opened.files.values()))
    )


def test_manifest_names_versions_and_hashes(tmp_path: Path) -> None:
    write(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / ck.MANIFEST).read_text())
    assert manifest["format_version"] == ck.FORMAT_VERSION
    assert {"rankbook", "torch", "transformers", "python"} <= set(manifest["versions"])
    assert set(manifest["files"]) == {"README.md", "config.json", "model.safetensors"}
    assert len(manifest["files"]["model.safetensors"]["sha256"]) == 64


def test_an_earlier_checkpoint_is_replaced_and_nothing_is_left_over(tmp_path: Path) -> None:
    write(tmp_path / "out")
    records = write(tmp_path / "out", seed=1)
    assert same(ck.load_records(tmp_path / "out")["head"], records["head"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_someone_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match=r"rankbook\.json"):
        write(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "precious"
    with pytest.raises(FileExistsError, match="is a file"):
        write(tmp_path / "thesis.tex")


def test_a_full_disk_leaves_the_previous_output(tmp_path: Path) -> None:
    records = write(tmp_path / "out")
    script = (
        "import resource, signal, sys; from pathlib import Path;"
        "from tests.calibration.checkpoint.writing import write;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000));"
        "write(Path(sys.argv[1]), seed=1)"
    )
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    paths = {"PYTHONPATH": f"{root / '.pkg'}:{root}", "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=paths, check=False)
    assert done.returncode == 1
    assert "OSError" in done.stderr.splitlines()[-1]
    assert same(ck.load_records(tmp_path / "out")["head"], records["head"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interruption_leaves_the_previous_output(tmp_path: Path) -> None:
    records = write(tmp_path / "out")

    def interrupt(_: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ck.write_checkpoint(tmp_path / "out", ck.CheckpointParts({}, {}, {"a": torch.ones(1)}, {}, interrupt))
    assert same(ck.load_records(tmp_path / "out")["head"], records["head"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def edit_json(path: Path, **changes: Any) -> None:
    """Overwrite top-level keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_truncated_weights(tmp_path: Path) -> None:
    write(tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ck.CheckpointError, match="truncated"):
        ck.load_records(tmp_path / "out")


def test_changed_weights_are_found_by_verify(tmp_path: Path) -> None:
    write(tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ck.CheckpointError, match="SHA-256"):
        ck.open_checkpoint(tmp_path / "out", verify=True)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_missing_file(tmp_path: Path, name: str) -> None:
    write(tmp_path / "out")
    (tmp_path / "out" / name).unlink()
    with pytest.raises(ck.CheckpointError, match=f"{name} is missing"):
        ck.load_records(tmp_path / "out")


def test_damaged_manifest_or_config(tmp_path: Path) -> None:
    write(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text('{"model_type": ')
    with pytest.raises(ck.CheckpointError, match=r"config\.json cannot be read"):
        ck.load_records(tmp_path / "out")
    (tmp_path / "out" / ck.MANIFEST).write_text("[]")
    with pytest.raises(ck.CheckpointError, match=r"rankbook\.json holds a list"):
        ck.load_records(tmp_path / "out")


def test_other_version(tmp_path: Path) -> None:
    write(tmp_path / "out")
    edit_json(tmp_path / "out" / ck.MANIFEST, format_version=99)
    with pytest.raises(ck.CheckpointError, match=r"version 99.*reads versions 1, 2, 3"):
        ck.load_records(tmp_path / "out")


def test_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ck.CheckpointError, match=r"holds no rankbook\.json"):
        ck.load_records(tmp_path)


def test_a_layer_without_its_tensors(tmp_path: Path) -> None:
    write(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    layers = config["quantization_config"]["layers"]
    layers["ghost"] = layers["blocks.0.linear"]
    edit_json(tmp_path / "out" / "config.json", quantization_config=config["quantization_config"])
    with pytest.raises(ck.CheckpointError, match="ghost"):
        ck.load_records(tmp_path / "out")


def test_no_pickles_are_written(tmp_path: Path) -> None:
    write(tmp_path / "out", 3000)
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".md", ".safetensors"}
