"""What `rankbook bench --device cuda` shows: tables, a picture, and what it looks at beside the clock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankbook.tools.bench.device_bench import Instruments
from rankbook.tools.report import Table

if TYPE_CHECKING:
    from rankbook.tools.bench.device_bench import DeviceReport


def instruments() -> tuple[Callable[[], dict[str, Any]], Instruments]:
    """Return what describes the GPU at the end, and what is looked at; what cannot be is named there."""
    from rankbook.tools.bench import gpu
    from rankbook.tools.runtimes import trt

    if reason := trt.gpu_unavailable():
        return lambda: {"gpu": reason}, Instruments()
    import torch

    copy = gpu.copy_bandwidth()
    torch.cuda.empty_cache()

    def free() -> int:
        return int(torch.cuda.mem_get_info()[0])

    if reason := gpu.nvml_unavailable():
        name = torch.cuda.get_device_name()
        return lambda: {"gpu": name, "clocks and power": reason}, Instruments(copy, free)
    watch = gpu.GpuWatch(str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid))
    return watch.describe, Instruments(copy, free, watch.look)


def tables(report: DeviceReport) -> list[Table]:
    """One table for decoding, one for prompts, one for sizes."""
    times = ("ms, p10", "p50", "p90", "tokens/s", "times as fast as the last")
    decode = [
        (
            item.contender,
            item.name,
            item.tokens,
            item.batch,
            item.p10,
            item.p50,
            item.p90,
            item.tokens_per_second,
            item.ratio,
            None if item.bandwidth_share is None else f"{100 * item.bandwidth_share:.0f} %",
        )
        for item in report.decode
    ]
    prefill = [
        (item.contender, item.name, item.tokens, item.p10, item.p50, item.p90, item.tokens_per_second, item.ratio)
        for item in report.prefill
    ]
    sizes = [
        (
            item.contender,
            item.name,
            item.kernels,
            item.bits,
            item.file_bytes / 1e6,
            None if item.device_bytes is None else item.device_bytes / 1e6,
        )
        for item in report.footprints
    ]
    return [
        Table(
            "decoding, one step",
            ("what", "model", "context", "batch", *times, "file over time, of a copy"),
            decode,
        ),
        Table("prompt, until the first token", ("what", "model", "tokens", *times), prefill),
        Table("sizes", ("what", "model", "kernels", "stored bits", "file, MB", "device memory, MB"), sizes),
    ]


def draw(report: DeviceReport, path: Path) -> None:
    """Write a PNG: decoded tokens/s over the context at the first batch, and prompt tokens/s over its length."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5))
    first = min((cell.batch for cell in report.decode), default=1)
    parts = (
        ([cell for cell in report.decode if cell.batch == first], f"decoding, batch {first}", "tokens in the cache"),
        (report.prefill, "prompt", "tokens of the prompt"),
    )
    for axes, (cells, title, label) in zip(panels, parts, strict=True):
        for name in dict.fromkeys(cell.name for cell in cells):
            points = sorted((cell.tokens, cell.tokens_per_second) for cell in cells if cell.name == name)
            contender = next(cell.contender for cell in cells if cell.name == name)
            axes.plot(*zip(*points, strict=True), "o-", label=f"{contender}: {Path(name).name}")
        axes.set(title=title, xlabel=label, ylabel="tokens/s", ylim=(0, None))
        if cells:
            axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
