"""Small runs of the driver: their options, what they write, one that is interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rankbook.calibration.checkpoint.format import MANIFEST
from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.report import Progress
from rankbook.calibration.driver.run import quantize_model
from tests.tiny import write_text


def options(folder: Path, **changes: Any) -> QuantizeOptions:
    """Small settings; writes the calibration text."""
    text = folder / "text.txt"
    if not text.exists():
        write_text(text)
    values = {"method": "trained-toy", "bits": 4, "calib": str(text), "calib_sequences": 4, "calib_length": 16}
    return QuantizeOptions(**{**values, **changes})


def files(folder: Path) -> dict[str, bytes]:
    """Everything a run writes but the manifest, which holds times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}


def interrupted(folder: Path, chosen: QuantizeOptions) -> None:
    """Run until the second block and stop."""

    def stop(step: Progress) -> None:
        if step.block == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(folder / "model", folder / "out", chosen, progress=stop)
