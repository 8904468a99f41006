"""What a user chooses about an exported file. Nothing is imported here that costs time."""

from __future__ import annotations

from dataclasses import dataclass

from rankbook.calibration.option import Options, option
from rankbook.exporter import dialects

DTYPES = ("fp32", "fp16", "bf16")
"""Types of activations and of weights that are not quantized."""
LOGITS = ("last", "all")
"""Whether the logits of the last position or of all positions are an output."""
SAMPLES = ("none", "greedy", "top-k")
"""What the graph chooses from the logits."""
BEST = 64
"""Tokens of ``--sample top-k``; fewer where the vocabulary is smaller."""
NO_TOKEN = -1
"""What ``--sample greedy`` gives where logits are NaN or infinite."""
INPUTS = {"ids": "input_ids", "embeds": "inputs_embeds"}
"""What tokens are given as, and the name of the input: numbers, or embedded ones (with image features among them)."""


@dataclass(frozen=True)
class ExportOptions(Options):
    """What the file is to be.

    Raises:
        ValueError: At construction, for a value that does not exist; the message names those that do.
    """

    dtype: str = option("fp32", "activations and unquantized weights", choices=DTYPES)
    logits: str = option(
        "last", "positions that get logits: last for generation, all for `rankbook eval`", choices=LOGITS
    )
    dialect: str = option(
        dialects.NATIVE,
        "operators of packed layers: rankbook (its own, any method), qdq (standard DequantizeLinear, which TensorRT"
        " fuses), ort (MatMulNBits of ONNX Runtime), dense (plain products with decoded weights, as a baseline); a"
        " layer that a dialect cannot hold is refused with the reason",
        choices=dialects.names(),
    )
    activations: str = option(
        "float",
        "int8: operators of packed layers round their input to 8 bits, with one scale per token and group; float: as"
        " the checkpoint says, exact or with its static ranges",
        choices=("float", "int8"),
    )
    graph: str = option(
        "standard",
        "operators of everything else, and the cache: standard (any runtime; it grows), ort (ONNX Runtime's own"
        " attention and normalization: faster there), or static (for engines: a cache of --max-context positions,"
        " written in place)",
        choices=("standard", "ort", "static"),
    )
    max_context: int | None = option(
        None,
        "positions of the cache of --graph static, prompt and answer together; default: 1024, or the model's"
        " context if that is shorter",
        metavar="N",
        least=1,
    )
    sample: str = option(
        "none",
        "an additional output, so that a step need not read the logits: the best token of each row (greedy: next_token)"
        f" or the {BEST} best ones with their logits (top-k: top_tokens, top_logits); --graph static only",
        choices=SAMPLES,
    )
    kv: str = option(
        "float",
        "type of the cache: that of the activations; float16, half the memory for float32 activations; or INT8 with a"
        " scale for each token and head",
        choices=("float", "float16", "int8"),
    )
    inputs: str = option(
        "ids",
        "token ids, or embedded tokens (inputs_embeds), where image features may be inserted",
        choices=tuple(INPUTS),
    )
    with_library: bool | None = option(
        None,
        "copy the native library into the folder, where ONNX Runtime GenAI finds it; default: with --graph ort, if"
        " the library is built",
    )
    weights_only: bool = option(False, "ignore the checkpoint's --activations and --kv-bits")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.graph == "ort" and self.kv == "int8":
            raise ValueError("graph 'ort' has a cache of floats; give kv float or float16, or graph standard")
        if self.kv == "float16" and self.dtype != "fp32":
            raise ValueError(f"kv 'float16' is for dtype 'fp32', and this is {self.dtype!r}; give kv float")
        if self.kv == "float16" and self.graph == "static":
            raise ValueError(
                "kv 'float16' is not for graph 'static', whose cache an engine keeps in the type of the activations;"
                " give dtype fp16, or graph ort"
            )
        if self.graph != "static" and (self.max_context or self.sample != "none"):
            raise ValueError(
                f"max_context and sample belong to graph 'static', and this is {self.graph!r}; leave them out"
            )
        if self.sample != "none" and self.logits != "last":
            raise ValueError(f"sample {self.sample!r} gives the token behind the last one; give logits 'last'")

    def described(self) -> dict[str, str]:
        """Return what the file is, by the names of `rankbook.exporter.properties.Metadata`."""
        names = ("dtype", "logits", "dialect", "graph", "kv", "inputs", "sample")
        return {name: getattr(self, name) for name in names}
