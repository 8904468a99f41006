"""The options that distribute a run; what a cluster does is in `rankbook.calibration.driver.cluster`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rankbook.calibration.option import ADVANCED, Options, option

AUTO, LOCAL = "auto", "local:"
SEQUENTIAL, PARALLEL = "sequential", "parallel"
STORE, PATH = "store", "path"


def cluster_name(text: str) -> str:
    """Read the name of a cluster: ``auto``, ``local:N`` or ``HOST:PORT``.

    Raises:
        ValueError: It is none of these.
    """
    if not re.fullmatch(rf"{AUTO}|{LOCAL}[1-9]\d*|(?!{LOCAL})[^\s:/]+:\d+|\[[0-9a-fA-F:]+\]:\d+", text):
        raise ValueError(
            f"{text!r} is not a cluster; give local:N for N workers of this machine, HOST:PORT of a Ray cluster that"
            " this machine belongs to, or auto for the one that runs on it"
        )
    return text


@dataclass(frozen=True, kw_only=True)
class ClusterOptions(Options):
    """Which workers compute, and what can be computed at the same time."""

    cluster: str | None = option(
        None,
        "solve the layers of a block on a Ray cluster: local:N (N workers of this machine), HOST:PORT, or auto; needs"
        " ray",
        metavar="ADDRESS",
        parse=cluster_name,
        group=ADVANCED,
    )
    cluster_gpus: float = option(
        1.0,
        "GPUs of each task of a cluster that has some, unless --device is cpu; with a fraction, tasks share one",
        metavar="F",
        group=ADVANCED,
    )
    cluster_weights: str = option(
        STORE,
        "where workers get the weights of whole blocks from: store (this process sends them), or path (the model's"
        " files, which every machine has at the same path)",
        choices=(STORE, PATH),
        group=ADVANCED,
    )
    order: str = option(
        SEQUENTIAL,
        "sequential: a block is solved with what the quantized blocks before it give; parallel: with what the original"
        " ones give, so that a cluster solves several blocks at the same time",
        choices=(SEQUENTIAL, PARALLEL),
        group=ADVANCED,
    )
    calib_shards: int = option(
        1,
        "parts of the calibration text whose statistics are computed apart, by the workers of a cluster, and summed",
        metavar="N",
        least=1,
        group=ADVANCED,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cluster is not None:
            cluster_name(self.cluster)
        if not self.cluster_gpus > 0:
            raise ValueError(f"cluster_gpus is {self.cluster_gpus}; give more than 0, or --device cpu to use none")

    def local_workers(self) -> int | None:
        """Return N of ``local:N``, None for another cluster or none."""
        return int(self.cluster[len(LOCAL) :]) if self.cluster and self.cluster.startswith(LOCAL) else None
