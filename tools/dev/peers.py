"""Quantizes a model with another project's own package, for the accuracy table only.

    python -m rankbook.tools.dev.peers auto-round MODEL --bits 3 --group-size 64 --calib calib.txt -o DIR

What comes out is a Hugging Face folder of decoded weights, so that ``rankbook eval`` judges peers and checkpoints
by the same code on the same tokens, and a report with the bits that the peer's own packed format stores. The packages
are needed for the table only: ``pip install 'rankbook[race]'``, best in an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from rankbook.tools.errors import MISSING, USAGE

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PeerOptions:
    """What a peer gets.

    Attributes:
        bits: Bits per code.
        group_size: Weights per group.
        iterations: Training steps per block, where the peer trains.
        tokens: Calibration windows (sequences, length) int64, those of rankbook's rows.
        seed: Of everything random.
    """

    bits: int
    group_size: int
    iterations: int
    tokens: torch.Tensor
    seed: int


@dataclass(frozen=True)
class Peer:
    """Another project's quantizer.

    Attributes:
        package: Its distribution, whose version is reported.
        module: What to import.
        quantize: Changes the linear layers of a model's blocks to their decoded weights.
        side_bits: Bits of scale and zero per group in its packed format, an integer zero excepted.
        zero_codes: Integer zeros per group, as wide as a code.
    """

    package: str
    module: str
    quantize: Callable[[Any, Any, PeerOptions], Any]
    side_bits: int
    zero_codes: int


def auto_round(model: Any, tokenizer: Any, options: PeerOptions) -> Any:
    """AutoRound (Cheng et al. 2023, arXiv 2309.05516): signSGD on rounding offsets and clipping, by block."""
    from auto_round import AutoRound
    from torch.utils.data import DataLoader

    windows = [{"input_ids": row, "attention_mask": row.new_ones(row.shape)} for row in options.tokens]
    quantizer = AutoRound(
        model,
        tokenizer,
        bits=options.bits,
        group_size=options.group_size,
        sym=False,
        iters=options.iterations,
        seqlen=options.tokens.shape[1],
        nsamples=len(windows),
        dataset=DataLoader(windows, batch_size=8),  # type: ignore[arg-type]
        device_map="cpu",
        enable_torch_compile=False,
        seed=options.seed,
    )
    quantized, _ = quantizer.quantize()
    return quantized


def hqq(model: Any, _: Any, options: PeerOptions) -> Any:
    """HQQ (Badri and Shaji 2023): half-quadratic fit of the zeros; sees no calibration text."""
    import torch
    from hqq.core.quantize import Quantizer

    for layer in (module for module in model.base_model.modules() if isinstance(module, torch.nn.Linear)):
        codes, meta = Quantizer.quantize(
            layer.weight.data,
            nbits=options.bits,
            group_size=options.group_size,
            axis=1,
            device="cpu",
            compute_dtype=torch.float32,
            bitpack=False,
        )
        layer.weight.data = Quantizer.dequantize(codes, meta).to(layer.weight.dtype)
    return model


def llm_compressor_gptq(model: Any, _: Any, options: PeerOptions) -> Any:
    """GPTQ (Frantar et al. 2022) of LLM Compressor: static groups, columns in the order of their inputs' energy."""
    from llmcompressor.modifiers.gptq import GPTQModifier

    return _oneshot(model, options, [GPTQModifier(config_groups=_groups(options), ignore=["lm_head"])])


def llm_compressor_awq(model: Any, _: Any, options: PeerOptions) -> Any:
    """AWQ (Lin et al. 2023) of LLM Compressor: input scales by search, then rounding to nearest."""
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    rounding = QuantizationModifier(config_groups=_groups(options), ignore=["lm_head"])
    # Version 0.14.0.1 pins its cache even where there is nothing to pin it for; that changes no number.
    with patch.object(IntermediatesCache, "pin_memory"):
        return _oneshot(model, options, [AWQModifier(), rounding])


def _groups(options: PeerOptions) -> dict[str, Any]:
    weights = {"num_bits": options.bits, "type": "int", "symmetric": False, "strategy": "group"}
    return {"group_0": {"targets": ["Linear"], "weights": weights | {"group_size": options.group_size}}}


def _oneshot(model: Any, options: PeerOptions, recipe: list[Any]) -> Any:
    """Run LLM Compressor's recipe and return a plain model of decoded weights (its own saves packed ones)."""
    import torch
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader

    windows = [{"input_ids": row, "attention_mask": row.new_ones(row.shape)} for row in options.tokens]
    plain = type(model)(model.config)
    data: DataLoader[Any] = DataLoader(windows, batch_size=1)  # type: ignore[arg-type]
    quantized = oneshot(model=model, dataset=data, recipe=recipe, pipeline="sequential")
    with torch.no_grad():
        for layer in quantized.modules():
            scheme = getattr(layer, "quantization_scheme", None)
            if scheme is not None:
                zero = layer.weight_zero_point
                layer.weight.copy_(fake_quantize(layer.weight, layer.weight_scale, zero, scheme.weights))
    side = (".weight_scale", ".weight_zero_point", ".weight_g_idx")
    plain.load_state_dict({name: value for name, value in quantized.state_dict().items() if not name.endswith(side)})
    return plain


PEERS: Mapping[str, Peer] = {
    "auto-round": Peer("auto-round", "auto_round", auto_round, 16, 1),
    "hqq": Peer("hqq", "hqq", hqq, 32, 0),
    "llm-compressor-gptq": Peer("llmcompressor", "llmcompressor", llm_compressor_gptq, 16, 1),
    "llm-compressor-awq": Peer("llmcompressor", "llmcompressor", llm_compressor_awq, 16, 1),
}
"""By name. A scale is fp16 in all; the zero is an integer of the code's width, in HQQ fp16."""


def main(argv: Sequence[str] | None = None) -> int:
    """Quantize, save the decoded weights, print the report as JSON."""
    args = _parser().parse_args(argv)
    peer = PEERS[args.peer]
    if find_spec(peer.module) is None:
        print(f"{peer.package} is not installed: pip install {peer.package}", file=sys.stderr)
        return MISSING
    if args.output.exists():
        print(f"{args.output} exists; name a new folder", file=sys.stderr)
        return USAGE
    import torch

    from rankbook.calibration.data import calibration_batches
    from rankbook.calibration.model.loading import load_model

    torch.manual_seed(args.seed)
    model, tokenizer = load_model(args.model, torch.float32)
    data = calibration_batches(tokenizer, args.calib, sequences=args.calib_sequences, length=512, seed=args.seed)
    options = PeerOptions(args.bits, args.group_size, args.iterations, data.tokens, args.seed)
    start = time.perf_counter()
    model = peer.quantize(model, tokenizer, options)
    seconds = time.perf_counter() - start
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    report = {
        "bits_per_weight": args.bits + (peer.side_bits + peer.zero_codes * args.bits) / args.group_size,
        "quantize_seconds": seconds,
        "peer": f"{peer.package} {version(peer.package)}",
        "calibration": data.description,
    }
    print(json.dumps(report))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rankbook.tools.dev.peers", description=__doc__.split("\n\n")[0])
    parser.add_argument("peer", choices=sorted(PEERS), help="whose quantizer")
    parser.add_argument("model", type=Path, help="Hugging Face folder or .gguf file")
    parser.add_argument("--bits", type=int, default=3, help="bits per code (default: 3)")
    parser.add_argument("--group-size", type=int, default=64, help="weights per group (default: 64)")
    parser.add_argument("--iterations", type=int, default=50, help="training steps per block (default: 50)")
    parser.add_argument("--calib", type=Path, required=True, help="calibration text")
    parser.add_argument("--calib-sequences", type=int, default=32, help="windows of 512 tokens (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="seed (default: 0)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())
