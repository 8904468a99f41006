"""What a user chooses about an exported file. Nothing is imported here that costs time."""

from __future__ import annotations

from dataclasses import dataclass

from rankbook.calibration.option import Options, option
from rankbook.exporter import dialects

LOGITS = ("last", "all")
"""Whether the logits of the last position or of all positions are an output."""
INPUTS = {"ids": "input_ids", "embeds": "inputs_embeds"}
"""What tokens are given as, and the name of the input: numbers, or embedded ones (with image features among them)."""


@dataclass(frozen=True)
class ExportOptions(Options):
    """What the file is to be.

    Raises:
        ValueError: At construction, for a value that does not exist; the message names those that do.
    """

    dtype: str = option("fp32", "activations and unquantized weights", choices=("fp32", "fp16", "bf16"))
    logits: str = option("last", "last is for generation, all for `rankbook eval`", choices=LOGITS)
    dialect: str = option(
        dialects.NATIVE,
        "operators of packed layers: rankbook (its own, any method), qdq (standard DequantizeLinear, which TensorRT"
        " fuses), ort (MatMulNBits of ONNX Runtime); a layer that a dialect cannot hold is refused with the reason",
        choices=dialects.names(),
    )
    activations: str = option(
        "float",
        "int8: operators of packed layers round their input to 8 bits, with one scale per token and group; float is"
        " what the checkpoint says: exact, or its static ranges",
        choices=("float", "int8"),
    )
    graph: str = option(
        "standard",
        "operators of everything else: standard (any runtime), or ort (ONNX Runtime's own attention and"
        " normalization: faster there)",
        choices=("standard", "ort"),
    )
    kv: str = option(
        "float",
        "cache inputs and outputs: the type of the activations, or INT8 with a scale for each token and head",
        choices=("float", "int8"),
    )
    inputs: str = option(
        "ids",
        "token numbers, or embedded tokens (inputs_embeds) among which a vision tower may put its features",
        choices=tuple(INPUTS),
    )
    weights_only: bool = option(False, "leave out the checkpoint's --activations and --kv-bits")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.graph == "ort" and self.kv == "int8":
            raise ValueError("graph 'ort' has a cache in the type of the activations; give kv float, or graph standard")

    def described(self) -> dict[str, str]:
        """Return what the file is, by the names of `rankbook.exporter.properties.Metadata`."""
        return {name: getattr(self, name) for name in ("dtype", "logits", "dialect", "graph", "kv", "inputs")}
