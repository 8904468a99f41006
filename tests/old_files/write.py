"""Writes the files of the version that is checked out: ``python -m tests.old_files.write NAME``, once for each format.

What is there is never written again: it shows what users have.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

from rankbook.tools.cli import main as rankbook
from rankbook.tools.runtimes.torch import TorchModel
from tests.tiny import tiny_model

HERE = Path(__file__).parent
IDS = [[3, 14, 15, 9, 26, 5, 31, 8]]
_SIZES = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def write(folder: Path) -> None:
    """Write a checkpoint, the file exported from it, and the logits that PyTorch computes."""
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        tiny_model("llama", None, seed=0, **_SIZES, **_TOKENS).save_pretrained(work / "model")
        how = ["--bits", "3", "--rank", "2", "--effort", "fast", "--error-branch", "lqer", "--error-rank", "4"]
        for words in (
            ["quantize", str(work / "model"), *how, "-o", str(work / "checkpoint")],
            ["export", str(work / "checkpoint"), "--logits", "all", "-o", str(work / "onnx")],
        ):
            if rankbook([*words, "--quiet", "--threads", "1"]):
                raise SystemExit(f"{' '.join(words)} failed")
        for name in ("checkpoint", "onnx"):
            shutil.copytree(work / name, folder / name, ignore=shutil.ignore_patterns("rankbook-*.yaml"))
        logits = TorchModel(work / "checkpoint").logits(np.array(IDS))
    (folder / "expected.json").write_text(json.dumps({"ids": IDS, "logits": logits.tolist()}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(HERE / sys.argv[1])
