"""The pipeline from a checkpoint to a folder with one ONNX model."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common

from rankbook.calibration.activations.inputs import ActivationConfig
from rankbook.calibration.checkpoint.card import write_export_card
from rankbook.calibration.checkpoint.extras import copy_extras, settle_tokenizer
from rankbook.calibration.checkpoint.format import Checkpoint, open_checkpoint
from rankbook.calibration.checkpoint.output import replaced_folder
from rankbook.calibration.checkpoint.results import carry_results
from rankbook.calibration.model.adapter import adapter_of
from rankbook.calibration.model.experts import stacks
from rankbook.calibration.model.language import language_view
from rankbook.calibration.source import ONNX_NAME
from rankbook.exporter import attention, conform, dialects, external
from rankbook.exporter.dialects import NATIVE
from rankbook.exporter.dialects.base import check_layers
from rankbook.exporter.genai import GenAiReport, wants_library, write_genai_config
from rankbook.exporter.options import ExportOptions as ExportOptions
from rankbook.exporter.passes.attention import DecomposeAttention
from rankbook.exporter.passes.functions import AddBodies
from rankbook.exporter.passes.gates import FuseGates
from rankbook.exporter.passes.group_query import GroupQueryAttention
from rankbook.exporter.passes.kv_cache import HalveCache, QuantizeCache
from rankbook.exporter.passes.masks import CheckMasks
from rankbook.exporter.passes.merge import MergeProducts
from rankbook.exporter.passes.metadata import AddMetadata
from rankbook.exporter.passes.norms import UnifyNormTypes
from rankbook.exporter.passes.recurrence import LowerRecurrence
from rankbook.exporter.passes.reshape import StaticReshape
from rankbook.exporter.passes.rotary import FuseRotary
from rankbook.exporter.passes.selects import SplitSelects
from rankbook.exporter.passes.shapes import InferShapes
from rankbook.exporter.passes.skip_norms import FuseSkipNorms
from rankbook.exporter.passes.static_cache import PadHeads, RaiseOpset, ScatterCache, SinkSlots
from rankbook.exporter.passes.weights import BindWeights, packed_layers
from rankbook.exporter.properties import DATA_SHA256, Metadata
from rankbook.exporter.skeleton import Skeleton, build
from rankbook.exporter.trace import max_context, trace
from rankbook.plugins import contract

MODEL, DATA = ONNX_NAME, f"{ONNX_NAME}.data"
"""Names of the graph and of its weights in the output folder."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Dtypes of activations and of weights that are not quantized."""

Progress = Callable[[str, int, int], None]
"""Called with a stage, steps done and steps in all."""


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        folder: Output folder.
        model_bytes: Size of the graph's file.
        data_bytes: Size of the weights' file.
        packed_bytes: Stored bytes of the packed layers, counted once where they are shared.
        other_bytes: Bytes of all other tensors.
        layers: Packed layers.
        bits_per_weight: Stored bits per weight of the packed layers, biases left out.
        nodes: Number of nodes by op_type; operators of rankbook by their name.
        dtype: ``fp32``, ``fp16`` or ``bf16``.
        logits: ``last`` or ``all``.
        dialect: In which operators the packed layers are written.
        opset: Version of the standard operators.
        standard_attention: Why layers of ``--graph ort`` keep the standard attention, by number.
        data_sha256: Hash of the weights' file.
        genai: What was written for ONNX Runtime GenAI.
        seconds: Wall-clock time.
    """

    folder: str
    model_bytes: int
    data_bytes: int
    packed_bytes: int
    other_bytes: int
    layers: int
    bits_per_weight: float
    nodes: Mapping[str, int]
    dtype: str
    logits: str
    dialect: str
    opset: int
    standard_attention: Mapping[str, str]
    data_sha256: str
    genai: GenAiReport
    seconds: float


def export(
    checkpoint_dir: str | Path,
    output_dir: str | Path,
    options: ExportOptions | None = None,
    *,
    progress: Progress | None = None,
) -> ExportReport:
    """Write ``model.onnx``, its weights, and the tokenizer and configuration files beside them.

    >>> rankbook.export("checkpoint", "onnx-int8", rankbook.ExportOptions(activations="int8")).layers
    14

    Of a model with a vision tower (LLaVA) this is the language model alone; its nodes have the names that the language
    model has alone (``model.layers.0...`` for ``model.language_model.layers.0...``).

    Memory: the constants of one node, or the largest tensor; all others are read from the memory-mapped checkpoint and
    written one by one.

    Args:
        checkpoint_dir: What ``rankbook quantize`` wrote.
        output_dir: Folder of the result; an earlier result there is replaced when the new one is complete.
        options: What the file is to be; the defaults without.
        progress: Called while stages run.

    Raises:
        ValueError: Settings of the checkpoint that exist in PyTorch only.
        DialectError: The dialect cannot express a layer; the message says which, why and what to do.
        CheckpointError: The checkpoint is missing, damaged or of another version.
        FileExistsError: ``output_dir`` holds something else, or another run writes there.
        NotExportableError: The model has something that is not served.
        RuntimeError: The result breaks the contract of an operator.
        FileNotFoundError: The native library is asked for and not built.
        OSError: Writing failed; what was in ``output_dir`` is unchanged.
    """
    started = time.monotonic()
    options = options or ExportOptions()
    output = Path(output_dir).absolute()
    report = progress or (lambda *_: None)
    with_library = wants_library(options)
    with replaced_folder(output, MODEL) as folder:
        opened = language_view(open_checkpoint(checkpoint_dir, verify=True)).kept_open()
        checkpoint = _with_settings(opened.for_operators(), options)
        report("trace", 0, 1)
        model = build_model(checkpoint, options)
        digest = external.write(model, folder / DATA, lambda done, total: report("write", done, total))
        model.metadata_props[DATA_SHA256] = digest
        ir.save(model, folder / MODEL)
        copy_extras(checkpoint.folder, folder, also=("config.json",))
        settle_tokenizer(folder)
        served = write_genai_config(folder, model, checkpoint.config, options, with_library=with_library)
        write_export_card(folder, checkpoint.layers, checkpoint.manifest, options.described())
        carry_results(checkpoint.folder, folder)
        if problems := conform.check_model(folder / MODEL):
            raise RuntimeError("the exported model breaks the contract of its operators: " + "; ".join(problems))
        report("check", 0, 1)
        onnx.checker.check_model(str(folder / MODEL), full_check=True)
    sizes, specs = dict(_tensor_bytes(model)), checkpoint.layers.values()
    owners = {*checkpoint.layers, *stacks(checkpoint.layers)}
    packed = {name: size for name, size in sizes.items() if name.rpartition(".")[0] in owners}
    stored = 8 * sum(size for name, size in packed.items() if not name.endswith(".bias"))
    if options.dialect == NATIVE:  # other operators store other side data than the records
        stored = sum(sum(spec.stored_bits().values()) for spec in specs)
    return ExportReport(
        folder=str(output),
        model_bytes=(output / MODEL).stat().st_size,
        data_bytes=(output / DATA).stat().st_size,
        packed_bytes=sum(packed.values()),
        other_bytes=sum(sizes.values()) - sum(packed.values()),
        layers=len(checkpoint.layers),
        bits_per_weight=stored / sum(spec.weights for spec in specs if not spec.shared_with),
        nodes=dict(collections.Counter(node.op_type for node in model.graph)),
        dtype=options.dtype,
        logits=options.logits,
        dialect=options.dialect,
        opset=model.opset_imports[""],
        standard_attention=Metadata.of(model.metadata_props).standard_attention,
        data_sha256=digest,
        genai=served,
        seconds=time.monotonic() - started,
    )


def build_model(checkpoint: Checkpoint, options: ExportOptions, config: Any = None) -> ir.Model:
    """Return the model of a checkpoint; its large tensors are lazy. ``config`` is for one without a folder."""
    dialect, dtype = dialects.dialect(options.dialect), DTYPES[options.dtype]
    int8 = options.activations == "int8"
    check_layers(dialect, packed_layers(checkpoint, dtype, int8_activations=int8))
    kind = "int8" if int8 else checkpoint.settings.get("activations", {}).get("kind", "none")
    skeleton = build(checkpoint, dtype, config)
    model = trace(skeleton, options)
    fixed = options.graph == "static"
    fused = _fused_attention(skeleton) if options.graph == "ort" else None
    passes: list[ir.passes.InPlacePass] = [
        common.ClearMetadataAndDocStringPass(),
        CheckMasks(),
        LowerRecurrence(),
        *([ScatterCache()] if fixed else []),
        BindWeights(checkpoint, skeleton, dialect, int8_activations=int8),
        *([QuantizeCache()] if options.kv == "int8" else [HalveCache()] if options.kv == "float16" else []),
        common.CommonSubexpressionEliminationPass(),  # cos and sin of every rotary embedding, shapes of every reshape
        UnifyNormTypes(),
        StaticReshape(),
        FuseRotary(),
        *([fused] if fused else []),
        *([SinkSlots(), PadHeads(), SplitSelects()] if fixed else []),
        DecomposeAttention(),
        *([FuseSkipNorms(), FuseGates(), MergeProducts()] if fused else []),
        common.RemoveUnusedNodesPass(),
        AddBodies(),
        *([RaiseOpset()] if fixed else []),
        InferShapes(),
    ]
    for step in passes:
        step(model)
    kept = fused.kept if fused else {}
    limits = _limits(skeleton, options)
    AddMetadata(checkpoint, **options.described(), activations=kind, standard_attention=kept, **limits)(model)
    return model


def _fused_attention(skeleton: Skeleton) -> GroupQueryAttention:
    return GroupQueryAttention(attention.rotary_tables(skeleton.model), adapter_of(skeleton.model).windows())


def _limits(skeleton: Skeleton, options: ExportOptions) -> dict[str, str]:
    """Return up to how many positions, past ones included, the file is right; empty where there is no limit."""
    if options.graph == "static":
        slots = str(max_context(skeleton, options))
        return {"context": slots, "max_context": slots}
    limit = adapter_of(skeleton.model).context()
    return {"context": str(limit) if limit else ""}


def _with_settings(checkpoint: Checkpoint, options: ExportOptions) -> Checkpoint:
    """Return the checkpoint with those of its settings that a file can have.

    Raises:
        ValueError: It has others; the message says what to do.
    """
    config = ActivationConfig.from_json(checkpoint.settings.get("activations"))
    quantization = dict(checkpoint.config.get("quantization_config", {}))
    if options.weights_only:
        quantization.pop("activations", None)
        return replace(checkpoint, config={**checkpoint.config, "quantization_config": quantization})
    if config.kind != "none" and not config.static:
        raise ValueError(
            f"the checkpoint's activations {config.kind!r} are rounded with the range of each token, which exists in"
            " PyTorch only; give --weights-only to export the weights alone (with --activations int8 the operators"
            " round), or quantize with --activations static8"
        )
    if config.static and options.activations == "int8":
        raise ValueError(
            f"the checkpoint's activations {config.kind!r} round the inputs of packed layers already; give"
            " --weights-only to leave that out, or --activations float to keep it"
        )
    if checkpoint.settings.get("kv_bits"):
        raise ValueError(
            f"the checkpoint's keys and values in {checkpoint.settings['kv_bits']} bits (before the rotary embedding)"
            " exist in PyTorch only; give --weights-only, and --kv int8 for a cache of 8 bits"
        )
    return checkpoint


def _tensor_bytes(model: ir.Model) -> Iterator[tuple[str, int]]:
    """Yield name and size of every stored tensor: initializers and tensors in attributes of nodes."""
    for name, value in model.graph.initializers.items():
        yield name, 0 if value.const_value is None else value.const_value.nbytes
    for node in model.graph:
        for attribute in node.attributes.values():
            if node.domain == contract.DOMAIN and attribute.type == ir.AttributeType.TENSOR:
                tensor = attribute.as_tensor()
                yield str(tensor.name), tensor.nbytes
