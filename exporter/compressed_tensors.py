"""A checkpoint in the format compressed-tensors (``pack-quantized``), which transformers and vLLM read.

Layers with evenly spaced levels become integers of 4 or 8 bits with scales and zero points; 2 and 3 bits are stored as
4, the narrowest that vLLM has kernels for. Layouts, of compressed-tensors 0.20:

* ``weight_packed`` (N, K b / 32) int32: integers plus ``2**(b - 1)``, one behind the other from the lowest bits on
* ``weight_scale`` (N, G)
* ``weight_zero_point`` (N b / 32, G) int32: packed along N

Embeddings and output layer are written decoded: nothing reads packed ones.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rankbook.calibration.checkpoint.card import write_served_card
from rankbook.calibration.checkpoint.extras import copy_extras, settle_tokenizer
from rankbook.calibration.checkpoint.format import MANIFEST, Checkpoint, open_checkpoint, write_tensors
from rankbook.calibration.checkpoint.output import replaced_folder
from rankbook.calibration.checkpoint.results import carry_results
from rankbook.calibration.model.custom_code import is_trusted
from rankbook.calibration.model.experts import matrix_of
from rankbook.calibration.model.language import language_view
from rankbook.calibration.model.loading import auto_class
from rankbook.calibration.model.source_config import read_config
from rankbook.calibration.notes import note
from rankbook.calibration.record.halves import narrowed
from rankbook.calibration.source import ONNX_NAME
from rankbook.exporter.affine import AffineLayer, NotAffineError, pack_bits
from rankbook.exporter.refusal import by_reason
from rankbook.plugins.forms import Form
from rankbook.plugins.layer_spec import LayerSpec

NAME = "compressed-tensors"
"""What ``--format`` and config.json call it."""
WIDTHS = (4, 8)
"""Bits of stored integers."""
SERVED_GROUPS = (32, 64, 128)
"""Groups that vLLM's kernels take, beside whole rows."""
_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_ROUNDING = {Form.FLOAT16: 2.0**-10, Form.FLOAT32: 2.0**-22, Form.INT8: 2.0**-22}
"""Change, relative to an offset, that storing it may have made."""


class NotCompressibleError(ValueError):
    """A checkpoint that the format cannot hold; the message names layers, reasons, and what to do."""


class Scheme(NamedTuple):
    """How the weight of a layer is stored.

    Attributes:
        bits: Of the integers.
        symmetric: Whether the zero point is the middle of them, and is not stored.
        group: Weights of a row that share a scale, or None for the whole row.
    """

    bits: int
    symmetric: bool
    group: int | None

    def __str__(self) -> str:
        """Return it for people."""
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"W{self.bits}A16 {kind}, {f'groups of {self.group}' if self.group else 'one scale a row'}"

    def to_json(self, targets: list[str]) -> dict[str, Any]:
        """Return the entry of ``config_groups``."""
        weights = {
            **{"num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "dynamic": False},
            **{"strategy": "group" if self.group else "channel", "group_size": self.group, "observer": "minmax"},
        }
        return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}


@dataclass(frozen=True)
class CompressedReport:
    """What was written.

    Attributes:
        folder: Output folder.
        data_bytes: Size of the files of weights.
        layers: Packed layers.
        schemes: For how many layers each way of storing them holds.
        decoded: Packed layers that were written as dense weights: embeddings and output layer.
        dtype: Of scales and of everything that is not packed.
        seconds: Wall-clock time.
    """

    folder: str
    data_bytes: int
    layers: int
    schemes: Mapping[str, int]
    decoded: tuple[str, ...]
    dtype: str
    seconds: float


def export_compressed_tensors(
    checkpoint_dir: str | Path, output_dir: str | Path, dtype: torch.dtype, *, weights_only: bool = False
) -> CompressedReport:
    """Write a Hugging Face folder in the format compressed-tensors.

    Of a model with a vision tower this is the language model alone, as in an exported ONNX file.

    Memory: the packed model once, and its embeddings in ``dtype``.

    Args:
        checkpoint_dir: What ``rankbook quantize`` or ``rankbook import`` wrote.
        output_dir: Folder of the result; an earlier result there is replaced when the new one is complete.
        dtype: Of scales and of everything that is not packed.
        weights_only: Leave out the checkpoint's activation format and bits of the cache.

    Raises:
        NotCompressibleError: Layers that are not affine, experts, or settings beside the weights.
        NotHeldError: ``dtype`` is float16, which does not hold a tensor.
        CheckpointError: The checkpoint is missing, damaged or of another version.
        FileExistsError: ``output_dir`` holds something else, or another run writes there.
        OSError: Writing failed; what was in ``output_dir`` is unchanged.
    """
    started, output = time.monotonic(), Path(output_dir).absolute()
    if other := [name for name in (MANIFEST, ONNX_NAME) if (output / name).is_file()]:
        raise FileExistsError(f"{output} holds a {other[0]}, which {NAME} would replace; give a new folder")
    checkpoint = language_view(open_checkpoint(checkpoint_dir, verify=True)).kept_open().for_operators()
    if checkpoint.settings and not weights_only:
        raise NotCompressibleError(
            f"the checkpoint rounds {' and '.join(checkpoint.settings)} too, which {NAME} of weights does not; give"
            " --weights-only to export the weights alone"
        )
    model = _empty(checkpoint)
    embeddings = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    decoded = [name for name in checkpoint.layers if id(model.get_submodule(name)) in embeddings]
    schemes = _schemes(checkpoint, decoded)
    with replaced_folder(output, "config.json") as folder:
        write_tensors(folder, dict(_tensors(checkpoint, schemes, decoded, dtype)))
        _write_config(folder, checkpoint, model, schemes, dtype)
        copy_extras(checkpoint.folder, folder)
        settle_tokenizer(folder)
        write_served_card(folder, checkpoint.layers, checkpoint.manifest, {"format": NAME, "dtype": _DTYPES[dtype]})
        carry_results(checkpoint.folder, folder)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    _note(schemes, decoded)
    counts: dict[str, int] = defaultdict(int)
    for scheme in schemes.values():
        counts[str(scheme)] += 1
    seconds = time.monotonic() - started
    return CompressedReport(str(output), size, len(schemes), counts, tuple(decoded), _DTYPES[dtype], seconds)


def _empty(checkpoint: Checkpoint) -> Any:
    """Return the language model of a checkpoint without memory for its weights."""
    config = read_config(str(checkpoint.folder))
    config = config.get_text_config() if checkpoint.stored_names else config
    for part in (config, config.get_text_config()):
        part.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        return auto_class(config).from_config(config, trust_remote_code=is_trusted())


def _schemes(checkpoint: Checkpoint, decoded: list[str]) -> dict[str, Scheme]:
    """Return how each packed layer is stored.

    Raises:
        NotCompressibleError: Some cannot be, or there are none.
    """
    found: dict[str, Scheme] = {}
    refused: dict[str, str] = {}
    for name, spec in checkpoint.layers.items():
        if name in decoded:
            continue
        try:
            found[name] = _scheme(spec, _affine(checkpoint, name))
        except NotAffineError as error:
            refused[name] = str(error)
    if refused:
        raise NotCompressibleError(f"{NAME} cannot hold this checkpoint: {by_reason(refused)}")
    if not found:
        raise NotCompressibleError(f"{checkpoint.folder} packs no layer of its blocks, so {NAME} has nothing to hold")
    return found


def _affine(checkpoint: Checkpoint, name: str) -> AffineLayer:
    spec = checkpoint.layers[name]
    if matrix_of(name):
        raise NotAffineError("it belongs to experts that share one tensor; export it to ONNX")
    if spec.branch_rank:
        raise NotAffineError(
            f"it has an error branch of rank {spec.branch_rank}, which the format has no place for; quantize without"
            " --error-branch, or export to ONNX"
        )
    return AffineLayer.of(spec, lambda part: checkpoint.part(name, part))


def _scheme(spec: LayerSpec, layer: AffineLayer) -> Scheme:
    bits = next(width for width in WIDTHS if spec.bits <= width)
    half, group = 1 << (bits - 1), None if spec.group == spec.in_features else spec.group
    layer.scales()  # which refuses what is no scale
    first, top = layer.first, layer.first + int(layer.recode.max())
    if not spec.has_offset and first == round(first) and -half <= first and top < half:
        return Scheme(bits, True, group)
    whole = layer.zeros().round()
    allowed = _ROUNDING[spec.params] * (whole + layer.first).abs().clamp_min(1)
    if bool(((layer.zeros() - whole).abs() > allowed).any()):
        raise NotAffineError(
            "its zero points are no whole numbers, since its offsets are stored in 8 bits; quantize with"
            " --weight-format symmetric or --param-bits 16"
        )
    if bool((whole < 0).any() or (whole >= 1 << bits).any()):
        raise NotAffineError(
            f"it has zero points outside of 0 to {(1 << bits) - 1}; quantize with --weight-format symmetric"
        )
    return Scheme(bits, False, group)


def _tensors(
    checkpoint: Checkpoint, schemes: Mapping[str, Scheme], decoded: list[str], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield every stored tensor under its name."""
    for name, scheme in schemes.items():
        for part, tensor in _packed(_affine(checkpoint, name), scheme).items():
            full = f"{name}.{part}"
            yield full, narrowed(full, tensor, dtype) if tensor.is_floating_point() else tensor
    for name in [*schemes, *decoded]:
        if checkpoint.layers[name].bias:
            yield f"{name}.bias", narrowed(f"{name}.bias", checkpoint.part(name, "bias"), dtype)
    for name in decoded:
        if not checkpoint.layers[name].shared_with:
            weight = checkpoint.record(name).weight(with_low_rank=True)
            yield f"{name}.weight", narrowed(f"{name}.weight", weight, dtype)
    for name in checkpoint.unquantized():
        tensor = checkpoint.tensor(name)
        yield name, narrowed(name, tensor, dtype) if tensor.is_floating_point() else tensor


def _packed(layer: AffineLayer, scheme: Scheme) -> dict[str, Tensor]:
    integers, spec = layer.integers(), layer.spec
    if scheme.symmetric:
        integers = (integers.int() + int(layer.first) + (1 << (scheme.bits - 1))).to(torch.uint8)
    found = {
        "weight_packed": _words(integers, scheme.bits),
        "weight_scale": layer.scales(),
        "weight_shape": torch.tensor([spec.out_features, spec.in_features]),
    }
    if not scheme.symmetric:
        zeros = layer.zeros().round().to(torch.uint8)
        found["weight_zero_point"] = _words(zeros.T, scheme.bits).T.contiguous()
    return found


def _words(integers: Tensor, bits: int) -> Tensor:
    """Pack uint8 integers (A, B) into int32 (A, B bits / 32), the first ones in the lowest bits."""
    padded = nn.functional.pad(integers, (0, -integers.shape[1] % (32 // bits)))
    return pack_bits(padded, bits).contiguous().view(torch.int32)


def _write_config(
    folder: Path, checkpoint: Checkpoint, model: nn.Module, schemes: Mapping[str, Scheme], dtype: torch.dtype
) -> None:
    """Write config.json: one group of layers for each scheme, and linear layers outside of all by name."""
    layers: dict[Scheme, list[str]] = defaultdict(list)
    for name, scheme in schemes.items():
        layers[scheme].append(name)
    groups = {
        f"group_{index}": scheme.to_json(["Linear"] if len(layers) == 1 else names)
        for index, (scheme, names) in enumerate(layers.items())
    }
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    others = [name for name in linear if name not in schemes]
    entry = {
        **{"quant_method": NAME, "format": "pack-quantized", "quantization_status": "compressed"},
        **{
            "config_groups": groups,
            "ignore": others,
            "kv_cache_scheme": None,
        },
    }
    config = {key: value for key, value in checkpoint.config.items() if key not in ("dtype", "torch_dtype")}
    config |= {"architectures": [type(model).__name__], "torch_dtype": _DTYPES[dtype], "quantization_config": entry}
    (folder / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _note(schemes: Mapping[str, Scheme], decoded: list[str]) -> None:
    """Say what is larger than in the checkpoint, and what vLLM has no kernel for."""
    if decoded:
        note(f"written decoded, since nothing reads packed embeddings in this format: {', '.join(decoded)}")
    if other := sorted({scheme.group for scheme in schemes.values() if scheme.group} - {*SERVED_GROUPS}):
        note(
            f"groups of {', '.join(map(str, other))} are read by transformers; vLLM's kernels take"
            f" {', '.join(map(str, SERVED_GROUPS))} and whole rows (--group-size)"
        )
